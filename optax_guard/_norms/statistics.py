"""Running statistics of norms, carried in the optimizer state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._norms.group_names import register_with_names
from optax_guard._norms.sketch import sketch_add, sketch_init
from optax_guard._rows import Entry, empty_rows, rows_of
from optax_guard._trees import increment

# Weight of the past in the running mean and variance: about the last 100 updates.
_DECAY = 0.99
# With a larger squared deviation the variance would become infinite, for good.
_LARGEST_SQUARE = 1e37

# The relative error of the sketch of every clip: finer than a choice of a threshold.
NORM_SKETCH_ERROR = 0.02


class NormStats(NamedTuple):
    """Statistics of the global norm of all updates that a clip was given.

    All but the sketch are scalars; float32 even under x64. Units are those of the
    gradient. "Last" is the most recent call of ``update``, even if its step was
    skipped. The scalars are attributes, and share two arrays.

    Attributes:
      norm_counts: int32[8], the row of the three counts, and of codes.
      norm_values: float32[8], the row of the six norms. Where a norm is not finite, it
        holds the last one that was, and ``norm_counts`` says so.
      norm_sketch: int32[1408], how many finite norms before clipping fell into each of
        1408 bins, for ``norm_quantile``: 5.6 kB, relative error at most 2 % for norms
        from 1e-12 to 1e12; a norm outside counts as 0 or as 1e12; zeros after ``init``.
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
    """

    norm_counts: jax.Array
    norm_values: jax.Array
    norm_sketch: jax.Array

    num_updates = Entry("norm_counts", 0)
    num_clipped = Entry("norm_counts", 1)
    num_nonfinite = Entry("norm_counts", 2)
    grad_norm = Entry("norm_values", 0, jnp.float32, codes="norm_counts")
    clipped_norm = Entry("norm_values", 1, jnp.float32, codes="norm_counts")
    clip_threshold = Entry("norm_values", 2, jnp.float32, codes="norm_counts")
    norm_mean = Entry("norm_values", 3, jnp.float32)
    norm_var = Entry("norm_values", 4, jnp.float32)
    norm_max = Entry("norm_values", 5, jnp.float32)


def init_stats() -> NormStats:
    """Makes statistics of no updates, with a buffer for each leaf, for donation."""
    sketch = sketch_init((), NORM_SKETCH_ERROR)
    return NormStats(**empty_rows(NormStats), norm_sketch=sketch)


def update_stats(
    stats: NormStats,
    grad_norm: jax.Array,
    clipped_norm: jax.Array,
    clip_threshold: jax.Array,
    is_clipped: jax.Array,
) -> NormStats:
    """Adds one update. A non-finite norm is counted, and enters no other statistic."""
    num_updates = increment(stats.num_updates)
    before = {name: getattr(stats, name) for name in _LASTING}
    new = _updated(
        before, num_updates, grad_norm, clipped_norm, clip_threshold, is_clipped
    )
    return NormStats(
        **rows_of(NormStats, {"num_updates": num_updates, **new}, stats),
        norm_sketch=sketch_add(stats.norm_sketch, new["grad_norm"]),
    )


def _updated(
    before: dict[str, jax.Array],
    num_updates: jax.Array,
    grad_norm: jax.Array,
    clipped_norm: jax.Array,
    clip_threshold: jax.Array,
    is_clipped: jax.Array,
) -> dict[str, jax.Array]:
    """The numbers after an update, which ``num_updates`` counts; also of vectors."""
    grad_norm = as_float32(grad_norm)
    is_finite = jnp.isfinite(grad_norm)
    num_nonfinite = increment(before["num_nonfinite"], ~is_finite)
    num_finite = num_updates - num_nonfinite
    old = before["norm_mean"], before["norm_var"], before["norm_max"]
    new = (
        *running_moments(*old[:2], grad_norm, num_finite, _DECAY),
        jnp.maximum(old[2], grad_norm),
    )
    mean, var, largest = (
        jnp.where(is_finite, a, b) for a, b in zip(new, old, strict=True)
    )
    return {
        "num_clipped": increment(before["num_clipped"], is_clipped),
        "num_nonfinite": num_nonfinite,
        "grad_norm": grad_norm,
        "clipped_norm": as_float32(clipped_norm),
        "clip_threshold": as_float32(clip_threshold),
        "norm_mean": mean,
        "norm_var": var,
        "norm_max": largest,
    }


class GroupStats(NamedTuple):
    """Statistics of the norm of each of the G groups of a clip.

    All are vectors in the order of ``group_names``; float32 even under x64.
    Units are those of the gradient. "Last" is the most recent call of ``update``. The
    vectors are attributes, and share two arrays.

    Attributes:
      group_names: Names the groups, and is part of the structure, not a tree in the
        state. For leaves it is like the parameters, with ``None`` for a group,
        ``(None, ..., None)`` for the layers of a stacked leaf and ``()`` for a leaf
        that is not floating. For labelled groups it is a dict from label to ``None``.
      group_counts: int32[G, 8], the rows of the two counts, and of codes.
      group_values: float32[G, 8], the rows of the six norms, as ``norm_values``.
      group_sketch: int32[G, 1408], for ``norm_quantile``; zeros after ``init``;
        ``None`` without ``record_quantiles``.
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
    """

    group_names: Any
    group_counts: jax.Array
    group_values: jax.Array
    group_sketch: jax.Array | None

    group_num_clipped = Entry("group_counts", 0)
    group_num_nonfinite = Entry("group_counts", 1)
    group_norm = Entry("group_values", 0, jnp.float32, codes="group_counts")
    group_clipped_norm = Entry("group_values", 1, jnp.float32, codes="group_counts")
    group_threshold = Entry("group_values", 2, jnp.float32, codes="group_counts")
    group_norm_mean = Entry("group_values", 3, jnp.float32)
    group_norm_var = Entry("group_values", 4, jnp.float32)
    group_norm_max = Entry("group_values", 5, jnp.float32)


register_with_names(GroupStats, "group_names")

# What a number of the whole is called for a group.
_OF_GROUP = {
    "num_clipped": "group_num_clipped",
    "num_nonfinite": "group_num_nonfinite",
    "grad_norm": "group_norm",
    "clipped_norm": "group_clipped_norm",
    "clip_threshold": "group_threshold",
    "norm_mean": "group_norm_mean",
    "norm_var": "group_norm_var",
    "norm_max": "group_norm_max",
}
# The numbers that an update takes from those before it.
_LASTING = ("num_clipped", "num_nonfinite", "norm_mean", "norm_var", "norm_max")


def init_group_stats(names: Any, has_sketch: bool) -> GroupStats:
    """Makes statistics of no updates; ``names`` has a ``None`` for each group."""
    shape = (len(jax.tree.leaves(names, is_leaf=lambda x: x is None)),)
    sketch = sketch_init(shape, NORM_SKETCH_ERROR) if has_sketch else None
    return GroupStats(names, **empty_rows(GroupStats, shape), group_sketch=sketch)


def update_group_stats(
    stats: GroupStats,
    num_updates: jax.Array,
    norm: jax.Array,
    clipped_norm: jax.Array,
    threshold: jax.Array,
    is_clipped: jax.Array,
) -> GroupStats:
    """Adds one update, as ``update_stats`` does; ``num_updates`` does not count it."""
    before = {name: getattr(stats, _OF_GROUP[name]) for name in _LASTING}
    new = _updated(
        before, increment(num_updates), norm, clipped_norm, threshold, is_clipped
    )
    numbers = {_OF_GROUP[name]: x for name, x in new.items()}
    rows = rows_of(GroupStats, numbers, stats)
    sketch = stats.group_sketch
    if sketch is not None:
        sketch = sketch_add(sketch, new["grad_norm"])
    return GroupStats(stats.group_names, **rows, group_sketch=sketch)


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
