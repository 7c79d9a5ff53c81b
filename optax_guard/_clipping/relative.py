"""The unit of thresholds that are relative to the norms of the parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._clipping.group_norms import norms_of_groups
from optax_guard._norms.axis_norms import norm_of_norms
from optax_guard._norms.groups import Groups
from optax_guard._norms.mesh_axes import AxisName, mesh_axes
from optax_guard._norms.tree_norm import tree_norm
from optax_guard._trees import is_inexact
from optax_guard.threshold._base import ParamNorms, Threshold


def unit_of_all(
    factory: str, threshold: Threshold, params: optax.Params | None, axis_name: AxisName
) -> jax.Array | None:
    """The unit for the global norm, float[]; ``None`` if the threshold has none."""
    if threshold.unit is None:
        return None
    check_params(factory, params)
    norm = tree_norm(params, None, axis_name).value
    count = sum(_counts(params, mesh_axes(params, axis_name)))
    return threshold.unit(_param_norms(norm, norm, np.array(count)))


def unit_of_groups(
    factory: str,
    threshold: Threshold,
    params: optax.Params | None,
    groups: Groups,
    num_groups: int,
    axis_name: AxisName,
) -> jax.Array | None:
    """The unit for the norm of each group, float[G]; ``None`` as above."""
    if threshold.unit is None:
        return None
    check_params(factory, params)
    over = mesh_axes(params, axis_name)
    parts = groups.norms(groups.floating(params), over)
    of_leaves = zip(_counts(params, over), groups.members, strict=True)
    counts = np.zeros(num_groups)
    for count, members in of_leaves:
        np.add.at(counts, members.ravel(), count / max(members.size, 1))
    norms = norms_of_groups(parts, groups.group_of_part, num_groups)
    return threshold.unit(_param_norms(norms, norm_of_norms(parts), counts))


def check_params(factory: str, params: optax.Params | None) -> None:
    """Raises if there are no parameters to compare with."""
    if params is None:
        raise ValueError(
            f"`params` of `{factory}` must be given, because the threshold is relative "
            "to their norm: `tx.update(updates, state, params)`."
        )


def _param_norms(norms: jax.Array, total: jax.Array, counts: np.ndarray) -> ParamNorms:
    rms = total / jnp.asarray(math.sqrt(max(counts.sum(), 1.0)), total.dtype)
    return ParamNorms(norms, jnp.asarray(counts, norms.dtype), rms)


def _counts(tree: Any, over: list[Any]) -> list[float]:
    """For each floating leaf how many entries it has, on all devices together."""
    leaves = [x for x in jax.tree.leaves(tree) if is_inexact(x)]
    return [
        float(np.size(x)) * math.prod(lax.axis_size(name) for name in names)
        for x, names in zip(leaves, over, strict=True)
    ]
