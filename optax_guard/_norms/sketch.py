"""Quantile sketches give any quantile of all values so far, in fixed memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# A sketch tells values in this range apart. Values outside count as its ends.
SMALLEST_IN_SKETCH = 1e-12
_LARGEST_IN_SKETCH = 1e12
# The search for a rank first looks at sums of so many bins, then at single ones.
_ROW = 128
# Logarithms and exponentials in float32 move a value by at most 9e-6 of it.
_ROUNDING = 2e-5


def sketch_init(
    shape: tuple[int, ...], relative_error: float, dtype: Any = jnp.int32
) -> jax.Array:
    """Makes an empty quantile sketch for each entry of an array of shape ``shape``.

    A DDSketch over a fixed range counts values in bins that grow geometrically from
    1e-12 to 1e12, so every quantile of values within is right to ``relative_error``.
    The functions below read all settings of a sketch from its number of bins.

    Args:
      shape: Shape of the values to come; () for scalars.
      relative_error: Largest relative error of a quantile, in (0, 1).
      dtype: int32 counts exactly and saturates; a sketch that forgets needs float32.

    Returns:
      Zeros of shape ``(*shape, num_bins)``: about ``28 / relative_error`` bins of 4
      bytes, 5.6 kB at 0.02.

    References:
      Masson et al., `DDSketch: A fast and fully-mergeable quantile sketch with
      relative-error guarantees <https://arxiv.org/abs/1908.10693>`_, 2019
    """
    log_growth = 2 * math.atanh(relative_error)
    # One bin in a thousand is added, because logarithms are rounded to float32.
    num_bins = math.ceil(1.001 * _log_range() / log_growth)
    # One more bin is for values at or below the range. The search needs whole rows.
    num_rows = -(-(num_bins + 1) // _ROW)
    return jnp.zeros((*shape, num_rows * _ROW), dtype)


def sketch_add(
    sketch: jax.Array, value: jax.Array, decay: ArrayLike | None = None
) -> jax.Array:
    """Adds one non-negative value to each sketch, unless it is not finite.

    Args:
      sketch: int32[..., bins] or float32[..., bins].
      value: float32[...].
      decay: Multiplies the weight of all earlier values; needs a float32 sketch.

    Returns:
      The new sketch. An int32 bin stays at its largest value for good.
    """
    num_bins = sketch.shape[-1]
    is_finite = jnp.isfinite(value)[..., None]
    bin_of = _bin_of(value, num_bins)[..., None]
    bins = jnp.arange(num_bins, dtype=jnp.int32)
    hit = (bins.reshape((1,) * value.ndim + (num_bins,)) == bin_of) & is_finite
    if decay is not None:
        decay = jnp.asarray(decay, sketch.dtype)
        return jnp.where(is_finite, sketch * decay, sketch) + hit.astype(sketch.dtype)
    if jnp.issubdtype(sketch.dtype, jnp.integer):
        hit &= sketch != jnp.iinfo(sketch.dtype).max
    return sketch + hit.astype(sketch.dtype)


def sketch_quantile(
    sketch: jax.Array, q: ArrayLike, of_nothing: float = math.nan
) -> jax.Array:
    """Computes the ``q``-quantile of all values, interpolated as in ``np.quantile``.

    Args:
      sketch: int32[..., bins] or float32[..., bins].
      q: A number in [0, 1], or several if the sketch is a single one; may be traced.
      of_nothing: The quantile of an empty sketch.

    Returns:
      float32[...] or of the shape of ``q``, within the sketch's relative error. With a
      decay, the quantile of the weighted values.
    """
    num_bins = sketch.shape[-1]
    # A float32 cannot overflow here; beyond 2**24 values a rank is off by 1e-4 at most.
    total = jnp.sum(sketch.astype(jnp.float32), axis=-1)
    last = total - 1
    position = jnp.asarray(q, jnp.float32) * last
    below = jnp.floor(position)
    # One sketch has as many axes as the ranks that are looked up in it.
    sketch = sketch.reshape((1,) * (below.ndim + 1 - sketch.ndim) + sketch.shape)
    low, high = (
        _value_of(_bin_of_rank(sketch, k), num_bins)
        for k in (below, jnp.minimum(below + 1, last))
    )
    # Each neighbour is right to the relative error, and so are the values between them.
    between = low + (position - below) * (high - low)
    return jnp.where(total > 0, between, of_nothing)


def factor_to_end(num_bins: int) -> float:
    """What takes a bin's value above all values that fell into the bin."""
    return (1 + _ROUNDING) * (1 + math.exp(_growth(num_bins))) / 2


@functools.partial(jnp.vectorize, signature="(b),()->()")
def _bin_of_rank(sketch: jax.Array, rank: jax.Array) -> jax.Array:
    """Finds the bin of the value that has this rank; ranks count from 0."""
    # The row is found first, then the bin in it, so that all bins are added up once.
    rows = sketch.reshape(-1, _ROW)
    ends = _running_sum(jnp.sum(rows.astype(jnp.float32), axis=1))
    # Rounding may bring a large rank to the end; there it would be in no bin.
    rank = jnp.minimum(rank, ends[-1] * (1 - 2.0**-20))
    row = jnp.minimum(jnp.sum(ends <= rank), len(rows) - 1)
    start = jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0.0)
    return row * _ROW + jnp.sum(
        start + _running_sum(rows[row].astype(jnp.float32)) <= rank
    )


def _running_sum(x: jax.Array) -> jax.Array:
    # Unlike `jnp.cumsum`, XLA fuses this with the operations around it.
    i = jnp.arange(len(x), dtype=jnp.int32)
    return jnp.sum(jnp.where(i[None, :] <= i[:, None], x[None, :], 0.0), axis=1)


def _log_range() -> float:
    return math.log(_LARGEST_IN_SKETCH / SMALLEST_IN_SKETCH)


def _growth(num_bins: int) -> float:
    """The logarithm of the ratio of neighbouring bins."""
    return _log_range() / (num_bins - 1)


def _bin_of(value: jax.Array, num_bins: int) -> jax.Array:
    growth = _growth(num_bins)
    within = jnp.clip(value, SMALLEST_IN_SKETCH, _LARGEST_IN_SKETCH)
    exponent = (jnp.log(within) - math.log(SMALLEST_IN_SKETCH)) / growth
    bin_of = jnp.clip(jnp.ceil(exponent).astype(jnp.int32), 1, num_bins - 1)
    return jnp.where(value > SMALLEST_IN_SKETCH, bin_of, 0)


def _value_of(bin_of: jax.Array, num_bins: int) -> jax.Array:
    """Returns a value with one relative error to both ends of the bin; 0 for bin 0."""
    growth = _growth(num_bins)
    # Bin i ends at g**i times the smallest value, and this value is 2 g**i / (g + 1).
    first = math.log(SMALLEST_IN_SKETCH) + math.log(2 / (1 + math.exp(growth)))
    exponent = first + growth * jnp.minimum(bin_of, num_bins - 1).astype(jnp.float32)
    return jnp.where(bin_of == 0, 0.0, jnp.exp(exponent))
