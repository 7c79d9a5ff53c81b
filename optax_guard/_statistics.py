"""Running statistics of norms, carried in the optimizer state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Weight of the past in the running mean and variance: about the last 100 updates.
_DECAY = 0.99
# A larger squared deviation would leave infinity in the variance for good.
_LARGEST_SQUARE = 1e37

# The values that quantile sketches tell apart. Outside they still count, as the ends.
SMALLEST_IN_SKETCH = 1e-12
_LARGEST_IN_SKETCH = 1e12
# Of the sketch that every clip carries: 2 % is finer than any choice of a threshold.
_NORM_SKETCH_ERROR = 0.02


class NormStats(NamedTuple):
    """What a clip has seen of the global norm of the updates that it was given.

    All scalars; float32 even under x64. Units are those of the gradient. "Last" is the
    most recent call of ``update``, whatever became of the step.

    Attributes:
      num_updates: int32[], updates seen; 0 after ``init``.
      num_clipped: int32[], updates that were changed by clipping; 0 after ``init``.
      num_nonfinite: int32[], updates with a NaN or infinite norm; 0 after ``init``.
      grad_norm: float32[], norm of the last updates before clipping, NaN or infinite
        if they were; 0 after ``init``.
      clipped_norm: float32[], norm of the last updates after clipping; 0 after
        ``init``.
      clip_threshold: float32[], norm above which the last updates would have been
        clipped, infinite where nothing clips; 0 after ``init``.
      norm_mean: float32[], debiased exponential mean (decay 0.99) of finite norms
        before clipping; 0 after ``init``.
      norm_var: float32[], variance around that mean, with the same weights; 0 after
        ``init``.
      norm_max: float32[], largest finite norm before clipping; 0 after ``init``.
      norm_sketch: int32[1384], how many finite norms before clipping fell into each of
        1384 bins, for ``norm_quantile``: 5.5 kB, relative error at most 2 % for norms
        from 1e-12 to 1e12; a norm outside counts as 0 or as 1e12; zeros after ``init``.
    """

    num_updates: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    grad_norm: jax.Array
    clipped_norm: jax.Array
    clip_threshold: jax.Array
    norm_mean: jax.Array
    norm_var: jax.Array
    norm_max: jax.Array
    norm_sketch: jax.Array


def init_stats() -> NormStats:
    """Statistics of no updates. Every leaf has a buffer of its own, for donation."""
    return NormStats(
        num_updates=jnp.zeros((), jnp.int32),
        num_clipped=jnp.zeros((), jnp.int32),
        num_nonfinite=jnp.zeros((), jnp.int32),
        grad_norm=jnp.zeros((), jnp.float32),
        clipped_norm=jnp.zeros((), jnp.float32),
        clip_threshold=jnp.zeros((), jnp.float32),
        norm_mean=jnp.zeros((), jnp.float32),
        norm_var=jnp.zeros((), jnp.float32),
        norm_max=jnp.zeros((), jnp.float32),
        norm_sketch=sketch_init((), _NORM_SKETCH_ERROR),
    )


def update_stats(
    stats: NormStats,
    grad_norm: jax.Array,
    clipped_norm: jax.Array,
    clip_threshold: jax.Array,
    is_clipped: jax.Array,
) -> NormStats:
    """Adds one update. A non-finite norm is counted and enters no statistic."""
    grad_norm = as_float32(grad_norm)
    is_finite = jnp.isfinite(grad_norm)
    num_updates = increment(stats.num_updates, True)
    num_nonfinite = increment(stats.num_nonfinite, ~is_finite)
    mean, var = running_moments(
        stats.norm_mean,
        stats.norm_var,
        grad_norm,
        num_updates - num_nonfinite,
        _DECAY,
    )
    return NormStats(
        num_updates=num_updates,
        num_clipped=increment(stats.num_clipped, is_clipped),
        num_nonfinite=num_nonfinite,
        grad_norm=grad_norm,
        clipped_norm=as_float32(clipped_norm),
        clip_threshold=as_float32(clip_threshold),
        norm_mean=jnp.where(is_finite, mean, stats.norm_mean),
        norm_var=jnp.where(is_finite, var, stats.norm_var),
        norm_max=jnp.where(
            is_finite, jnp.maximum(stats.norm_max, grad_norm), stats.norm_max
        ),
        norm_sketch=sketch_add(stats.norm_sketch, grad_norm),
    )


def as_float32(x: jax.Array) -> jax.Array:
    """``x`` as float32, in which a finite double stays finite."""
    if x.dtype != jnp.float64:
        return x.astype(jnp.float32)
    largest = jnp.array(jnp.finfo(jnp.float32).max, x.dtype)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(
        jnp.float32
    )


def running_moments(
    mean: jax.Array,
    var: jax.Array,
    value: jax.Array,
    num_values: jax.Array,
    decay: float,
) -> tuple[jax.Array, jax.Array]:
    """Debiased exponential mean and variance after one more value.

    The weights are those of ``decay ** age``, normalised, so that after the first value
    the mean is that value. In the incremental form nothing cancels: the variance stays
    non-negative and right for values that hardly vary.

    Args:
      mean: float32[], before this value.
      var: float32[], before this value.
      value: float32[], the new value.
      num_values: int32[], how many values there are with this one.
      decay: Weight of a value relative to its successor's, in (0, 1).

    Returns:
      The new mean and variance.

    References:
      West, `Updating mean and variance estimates: an improved method
      <https://doi.org/10.1145/359146.359153>`_, 1979
    """
    num_values = jnp.maximum(num_values, 1).astype(jnp.float32)
    sum_of_weights = -jnp.expm1(num_values * math.log(decay))
    # Rounded to above one, the weight would make the first variance negative.
    weight = jnp.minimum((1 - decay) / sum_of_weights, 1.0)
    deviation = value - mean
    square = bounded_square(deviation)
    return mean + weight * deviation, (1 - weight) * (var + weight * square)


def increment(counter: jax.Array, by: jax.Array | bool) -> jax.Array:
    """Counts up by one where ``by``, and stays at the largest int32 for good."""
    is_full = counter == jnp.iinfo(jnp.int32).max
    return counter + jnp.where(is_full, 0, jnp.asarray(by, jnp.int32))


def bounded_square(value: jax.Array) -> jax.Array:
    """The square, bounded so that a variance made of such squares stays finite."""
    return jnp.minimum(value * value, _LARGEST_SQUARE)


def sketch_init(
    shape: tuple[int, ...], relative_error: float, dtype: Any = jnp.int32
) -> jax.Array:
    """An empty quantile sketch for each entry of an array of shape ``shape``.

    A DDSketch over a fixed range: counts in bins that grow geometrically from 1e-12 to
    1e12, so that every quantile of values within is right to ``relative_error``. The
    number of bins says everything about it: the functions below need nothing else.

    Args:
      shape: Shape of the values to come; () for scalars.
      relative_error: Largest relative error of a quantile, in (0, 1).
      dtype: int32 counts exactly and saturates; a sketch that forgets needs float32.

    Returns:
      Zeros of shape ``(*shape, num_bins)``: about ``28 / relative_error`` bins of 4
      bytes, 5.5 kB at 0.02.

    References:
      Masson et al., `DDSketch: A fast and fully-mergeable quantile sketch with
      relative-error guarantees <https://arxiv.org/abs/1908.10693>`_, 2019
    """
    log_growth = 2 * math.atanh(relative_error)
    # A per mille more bins than that, for the rounding of logarithms in float32.
    num_bins = math.ceil(1.001 * _log_range() / log_growth)
    # The first is for what is at or below the range.
    return jnp.zeros((*shape, num_bins + 1), dtype)


def sketch_add(
    sketch: jax.Array, value: jax.Array, decay: ArrayLike | None = None
) -> jax.Array:
    """Adds one non-negative value to each sketch; what is not finite changes nothing.

    Args:
      sketch: int32[..., bins] or float32[..., bins].
      value: float32[...].
      decay: What the weight of all earlier values is multiplied by; needs float32.

    Returns:
      The new sketch. An int32 bin stays at its largest value for good.
    """
    num_bins = sketch.shape[-1]
    is_finite = jnp.isfinite(value)[..., None]
    bin_of = _bin_of(value, num_bins)[..., None]
    hit = (jnp.arange(num_bins, dtype=jnp.int32) == bin_of) & is_finite
    if decay is not None:
        decay = jnp.asarray(decay, sketch.dtype)
        return jnp.where(is_finite, sketch * decay, sketch) + hit.astype(sketch.dtype)
    if jnp.issubdtype(sketch.dtype, jnp.integer):
        hit &= sketch != jnp.iinfo(sketch.dtype).max
    return sketch + hit.astype(sketch.dtype)


def sketch_merge(sketch: jax.Array, other: jax.Array) -> jax.Array:
    """The sketch of all values of two sketches with equally many bins."""
    if jnp.issubdtype(sketch.dtype, jnp.integer):
        other = jnp.minimum(other, jnp.iinfo(sketch.dtype).max - sketch)
    return sketch + other


def sketch_quantile(sketch: jax.Array, q: ArrayLike) -> jax.Array:
    """The ``q``-quantile of all values, between neighbours as in ``np.quantile``.

    Args:
      sketch: int32[..., bins] or float32[..., bins].
      q: A number in [0, 1], or several if the sketch is a single one; may be traced.

    Returns:
      float32[...] or of the shape of ``q``, within the sketch's relative error; NaN if
      it is empty. With a decay, the quantile of the weighted values.
    """
    num_bins = sketch.shape[-1]
    # In float32 nothing overflows; beyond 2**24 values a rank is off by 1e-4 at most.
    ranks = jnp.cumsum(sketch.astype(jnp.float32), axis=-1)
    total = ranks[..., -1]
    last = jnp.maximum(total - 1, 0.0)
    position = jnp.asarray(q, jnp.float32) * last
    below = jnp.floor(position)
    low, high = (
        _value_of(jnp.sum(ranks <= k[..., None], axis=-1), num_bins)
        for k in (below, jnp.minimum(below + 1, last))
    )
    # Each neighbour is right to the relative error, and so is what lies between.
    between = low + (position - below) * (high - low)
    return jnp.where(total > 0, between, jnp.nan)


def _log_range() -> float:
    return math.log(_LARGEST_IN_SKETCH / SMALLEST_IN_SKETCH)


def _bin_of(value: jax.Array, num_bins: int) -> jax.Array:
    growth = _log_range() / (num_bins - 1)
    within = jnp.clip(value, SMALLEST_IN_SKETCH, _LARGEST_IN_SKETCH)
    exponent = (jnp.log(within) - math.log(SMALLEST_IN_SKETCH)) / growth
    bin_of = jnp.clip(jnp.ceil(exponent).astype(jnp.int32), 1, num_bins - 1)
    return jnp.where(value > SMALLEST_IN_SKETCH, bin_of, 0)


def _value_of(bin_of: jax.Array, num_bins: int) -> jax.Array:
    """The value that is off by the same factor at both ends of the bin; 0 for bin 0."""
    growth = _log_range() / (num_bins - 1)
    # 2 g**i / (g + 1) times the smallest value, for bins between powers of g.
    first = math.log(SMALLEST_IN_SKETCH) + math.log(2 / (1 + math.exp(growth)))
    exponent = first + growth * jnp.minimum(bin_of, num_bins - 1).astype(jnp.float32)
    return jnp.where(bin_of == 0, 0.0, jnp.exp(exponent))
