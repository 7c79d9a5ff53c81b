"""Statistics of each group of a clip with several: leaves, layers, labelled groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._sketch import sketch_add, sketch_init
from optax_guard._statistics import NORM_SKETCH_ERROR, NormStats, update_moments


class GroupStats(NamedTuple):
    """What a clip has seen of the norm of each of its G groups.

    Vectors over the groups, in the order of ``group_names``; float32 even under x64.
    Units are those of the gradient. "Last" is the most recent call of ``update``.

    Attributes:
      group_names: Says which group is which, and holds no arrays: for leaves a tree
        like the parameters with ``None`` for a group, ``(None, ..., None)`` for the
        layers of a stacked leaf and ``()`` for a leaf that is not floating; for
        labelled groups a dict from label to ``None``.
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
      group_sketch: int32[G, 1408], for ``norm_quantile``, if it was asked for, else
        ``None``; zeros after ``init``.
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
    """Statistics of no updates; ``names`` has a ``None`` for each group."""
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
    """Adds one update, as ``update_stats`` does; ``num_updates`` is without it."""
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
