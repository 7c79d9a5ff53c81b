"""Running statistics of norms, carried in the optimizer state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._norms.sketch import sketch_add, sketch_init
from optax_guard._trees import increment

# Weight of the past in the running mean and variance: about the last 100 updates.
_DECAY = 0.99
# With a larger squared deviation the variance would become infinite, for good.
_LARGEST_SQUARE = 1e37

# The relative error of the sketch of every clip: finer than a choice of a threshold.
NORM_SKETCH_ERROR = 0.02


class NormStats(NamedTuple):
    """Statistics of the global norm of all updates that a clip was given.

    All are scalars; float32 even under x64. Units are those of the gradient. "Last" is
    the most recent call of ``update``, even if its step was skipped.

    Attributes:
      num_updates: int32[], updates seen; 0 after ``init``.
      num_clipped: int32[], updates that were changed by clipping; 0 after ``init``.
      num_nonfinite: int32[], updates with a NaN or infinite norm; 0 after ``init``.
      grad_norm: float32[], norm of the last updates before clipping; NaN or infinite
        if an entry was; 0 after ``init``.
      clipped_norm: float32[], norm of the last updates after clipping; 0 after
        ``init``.
      clip_threshold: float32[], norm above which the last updates would have been
        clipped, infinite where nothing clips; 0 after ``init``.
      norm_mean: float32[], debiased exponential mean (decay 0.99) of finite norms
        before clipping; 0 after ``init``.
      norm_var: float32[], variance around that mean, with the same weights; 0 after
        ``init``.
      norm_max: float32[], largest finite norm before clipping; 0 after ``init``.
      norm_sketch: int32[1408], how many finite norms before clipping fell into each of
        1408 bins, for ``norm_quantile``: 5.6 kB, relative error at most 2 % for norms
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
    """Makes statistics of no updates, with a buffer for each leaf, for donation."""
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
        norm_sketch=sketch_init((), NORM_SKETCH_ERROR),
    )


def update_stats(
    stats: NormStats,
    grad_norm: jax.Array,
    clipped_norm: jax.Array,
    clip_threshold: jax.Array,
    is_clipped: jax.Array,
) -> NormStats:
    """Adds one update. A non-finite norm is counted, and enters no other statistic."""
    stats = update_moments(stats, grad_norm, clipped_norm, clip_threshold, is_clipped)
    sketch = sketch_add(stats.norm_sketch, stats.grad_norm)
    return stats._replace(norm_sketch=sketch)


def update_moments(
    stats: NormStats,
    grad_norm: jax.Array,
    clipped_norm: jax.Array,
    clip_threshold: jax.Array,
    is_clipped: jax.Array,
) -> NormStats:
    """Does the same without the sketch; also for vectors of norms."""
    grad_norm = as_float32(grad_norm)
    is_finite = jnp.isfinite(grad_norm)
    num_updates = increment(stats.num_updates)
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
        norm_sketch=stats.norm_sketch,
    )


class GroupStats(NamedTuple):
    """Statistics of the norm of each of the G groups of a clip.

    All are vectors in the order of ``group_names``; float32 even under x64.
    Units are those of the gradient. "Last" is the most recent call of ``update``.

    Attributes:
      group_names: Names the groups and holds no arrays. For leaves it is a tree like
        the parameters, with ``None`` for a group, ``(None, ..., None)`` for the layers
        of a stacked leaf and ``()`` for a leaf that is not floating. For labelled
        groups it is a dict from label to ``None``.
      group_num_clipped: int32[G], updates in which the group was clipped; 0 after
        ``init``.
      group_num_nonfinite: int32[G], updates in which its norm was NaN or infinite; 0
        after ``init``.
      group_norm: float32[G], its norm in the last updates, before clipping; 0 after
        ``init``.
      group_clipped_norm: float32[G], the same after clipping; 0 after ``init``.
      group_threshold: float32[G], norm above which it would have been clipped; 0 after
        ``init``.
      group_norm_mean: float32[G], debiased exponential mean (decay 0.99) of its finite
        norms before clipping; 0 after ``init``.
      group_norm_var: float32[G], variance around that mean; 0 after ``init``.
      group_norm_max: float32[G], largest finite norm before clipping; 0 after ``init``.
      group_sketch: int32[G, 1408], for ``norm_quantile``; zeros after ``init``;
        ``None`` without ``record_quantiles``.
    """

    group_names: Any
    group_num_clipped: jax.Array
    group_num_nonfinite: jax.Array
    group_norm: jax.Array
    group_clipped_norm: jax.Array
    group_threshold: jax.Array
    group_norm_mean: jax.Array
    group_norm_var: jax.Array
    group_norm_max: jax.Array
    group_sketch: jax.Array | None


def init_group_stats(names: Any, has_sketch: bool) -> GroupStats:
    """Makes statistics of no updates; ``names`` has a ``None`` for each group."""
    num_groups = len(jax.tree.leaves(names, is_leaf=lambda x: x is None))

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(num_groups, dtype)

    return GroupStats(
        group_names=names,
        group_num_clipped=zeros(jnp.int32),
        group_num_nonfinite=zeros(jnp.int32),
        group_norm=zeros(jnp.float32),
        group_clipped_norm=zeros(jnp.float32),
        group_threshold=zeros(jnp.float32),
        group_norm_mean=zeros(jnp.float32),
        group_norm_var=zeros(jnp.float32),
        group_norm_max=zeros(jnp.float32),
        group_sketch=sketch_init((num_groups,), NORM_SKETCH_ERROR)
        if has_sketch
        else None,
    )


def update_group_stats(
    stats: GroupStats,
    num_updates: jax.Array,
    norm: jax.Array,
    clipped_norm: jax.Array,
    threshold: jax.Array,
    is_clipped: jax.Array,
) -> GroupStats:
    """Adds one update, as ``update_stats`` does; ``num_updates`` does not count it."""
    names, *before, sketch = stats
    _, *after, _ = update_moments(
        NormStats(num_updates, *before, norm_sketch=jnp.zeros(())),
        norm,
        clipped_norm,
        threshold,
        is_clipped,
    )
    new = GroupStats(names, *after, group_sketch=sketch)
    if sketch is None:
        return new
    return new._replace(group_sketch=sketch_add(sketch, new.group_norm))


def as_float32(x: jax.Array) -> jax.Array:
    """Converts ``x`` to float32; a finite double stays finite."""
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
    """Adds one value to a debiased exponential mean and variance.

    A value has the weight ``decay ** age``, and the weights are normalised, so that
    after the first value the mean is that value. In the incremental form nothing
    cancels: the variance of values that hardly vary is right, and never negative.

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
    # A weight that is rounded to above one would make the first variance negative.
    weight = jnp.minimum((1 - decay) / sum_of_weights, 1.0)
    deviation = value - mean
    square = bounded_square(deviation)
    return mean + weight * deviation, (1 - weight) * (var + weight * square)


def bounded_square(value: jax.Array) -> jax.Array:
    """Squares a value, with a bound that keeps a variance of such squares finite."""
    return jnp.minimum(value * value, _LARGEST_SQUARE)
