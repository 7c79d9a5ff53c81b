"""Norms of groups: their total, their statistics, and the rescaling by them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._clipping.parts import Factors, rescaled
from optax_guard._norms.axis_norms import norm_of_norms, ratio
from optax_guard._norms.groups import Groups
from optax_guard._norms.marks import marks_of, no_marks, run_size
from optax_guard._norms.mesh_axes import local_part
from optax_guard._norms.statistics import GroupStats, NormStats, update_stats
from optax_guard._norms.tree_norm import TreeNorm


def check_same_groups(factory: str, names: Any, stats: GroupStats) -> None:
    """Raises unless the updates form the groups that the state was made for."""
    if jax.tree.structure(names) != jax.tree.structure(stats.group_names):
        raise ValueError(
            f"`updates` of `{factory}` must have the structure of the parameters given "
            f"to `init`, got the groups {names} for {stats.group_names}."
        )


def total_norm(
    norms: jax.Array,
    of_leaves: jax.Array,
    leaves: Sequence[int] | np.ndarray,
    tree: Any,
) -> TreeNorm:
    """The global norm of a tree, and its bad leaves.

    Args:
      norms: float[...], the norms of all parts.
      of_leaves: float[n], norms of which the leaf tells.
      leaves: For each of those the index of its leaf.
      tree: The tree.
    """
    if not norms.size:
        return TreeNorm(jnp.zeros((), norms.dtype), no_marks())
    runs = np.asarray(leaves) // run_size(len(jax.tree.leaves(tree)))
    return TreeNorm(norm_of_norms(norms), marks_of(of_leaves, runs))


def update_total(
    stats: NormStats,
    total: TreeNorm,
    norms: jax.Array,
    clipped_norms: jax.Array,
    triggers: jax.Array,
    is_clipped: jax.Array,
) -> NormStats:
    """Adds one update to the statistics of the global norm."""
    is_any = jnp.any(is_clipped)
    after = jnp.where(is_any, norm_of_norms(clipped_norms), total.value)
    margin = jnp.min(margin_of(norms, triggers), initial=jnp.inf)
    threshold = jnp.where(jnp.isfinite(margin), total.value * margin, jnp.inf)
    return update_stats(stats, total.value, after, threshold, is_any)


def norms_of_groups(
    parts: jax.Array, group_of_part: np.ndarray, num_groups: int
) -> jax.Array:
    """The norm of each group from those of its parts."""
    groups = np.arange(num_groups)
    if np.array_equal(group_of_part, groups):
        return parts
    # Not a sum by index, whose order is not fixed on every device.
    is_member = group_of_part == groups[:, None]
    return norm_of_norms(jnp.where(is_member, parts, 0.0), axis=1)


def margin_of(norms: jax.Array, triggers: jax.Array) -> jax.Array:
    """How many times longer each could be without being clipped."""
    usable = jnp.isfinite(norms) & (norms > 0)
    return jnp.where(usable, ratio(triggers, jnp.where(usable, norms, 1.0)), jnp.inf)


def rescale_groups(
    updates: optax.Updates, groups: Groups, factors: Factors
) -> optax.Updates:
    """Multiplies every part of the updates by the factors of its group."""
    leaves, structure = jax.tree.flatten(updates)
    each = zip(groups.indices, groups.members, groups.dims, strict=True)
    for i, members, dims in each:
        of_leaf = Factors(
            *(local_part(pick(vector, members), dims) for vector in factors)
        )
        leaves[i] = rescaled(jnp.asarray(leaves[i]), of_leaf)
    return structure.unflatten(leaves)


def pick(vector: jax.Array, members: np.ndarray) -> jax.Array:
    """The entries of a leaf's groups, in a shape that broadcasts to the leaf's."""
    if members.size == 0:
        return jnp.zeros(members.shape, vector.dtype)
    first, last = int(members.flat[0]), int(members.flat[-1])
    return vector[first : last + 1].reshape(members.shape)
