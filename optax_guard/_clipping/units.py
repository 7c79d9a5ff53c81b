"""Adaptive gradient clipping: each unit by its norm relative to its parameters'."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_positive, check_state
from optax_guard._clipping.group_norms import (
    check_same_groups,
    margin_of,
    pick,
    rescale_groups,
    total_norm,
    update_total,
)
from optax_guard._clipping.parts import (
    ClipParts,
    Measurement,
    clip,
    decide,
    factors_for,
)
from optax_guard._norms.axis_norms import norm_of_norms, ratio
from optax_guard._norms.groups import Groups, each_part, names_of_leaves, unit_axes
from optax_guard._norms.mesh_axes import AxisName, layouts, mesh_axes
from optax_guard._norms.statistics import (
    GroupStats,
    NormStats,
    init_group_stats,
    init_stats,
    update_group_stats,
)
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import as_float, for_each_leaf, is_inexact, path_names
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._coerce import as_absolute_threshold


class ClipByUnitNormState(NamedTuple):
    """State of ``clip_by_unit_norm``.

    Attributes:
      stats: Statistics of the global norm, as in ``ClipByLeafNormState``.
      group_stats: Statistics of the norm of each leaf, a ``GroupStats``.
      units_clipped: float32[], share of the units that the last update clipped, in
        [0, 1], without those of excluded leaves; 0 after ``init``.
      threshold: The threshold's own state, for the vector of the units' ratios, leaf
        after leaf; () for a constant.
    """

    stats: NormStats
    group_stats: GroupStats
    units_clipped: jax.Array
    threshold: Any


@answers_wrong_calls
def clip_by_unit_norm(
    max_ratio: ArrayLike | optax.Schedule | Threshold | Mapping[str, Any],
    *,
    eps: ArrayLike = 1e-3,
    axis: int | tuple[int, ...] | Callable[[str], Any] | None = None,
    exclude: Any = False,
    record_quantiles: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each unit of the updates by its norm relative to its parameters' norm.

    This is adaptive gradient clipping (AGC). A unit holds the weights of one output of
    a layer: a column of a matrix, a filter of a convolution, all of a bias. If a unit
    :math:`g` with parameters :math:`w` is longer than
    :math:`c = \lambda \max(\|w\|, \epsilon)`, it becomes :math:`g \, c / \|g\|`; all
    others come back bit for bit. The result is that of ``optax.adaptive_grad_clip``
    where that is defined. The norms of the parameters cost one more read of them.

    Args:
      max_ratio: Largest ratio :math:`\lambda` of the norms that passes unchanged, such
        as 0.01; otherwise as ``max_norm`` of ``clip_by_global_norm``. A threshold that
        adapts learns the ratios of each unit, and is as large as there are units.
      eps: Smallest norm assumed of a unit's parameters, so that those initialised to
        zero can grow; positive, may be traced.
      axis: The axes along which a unit lies, for all leaves, or a function from the
        path of a leaf to them. With ``None``, the rank decides: all axes of a scalar,
        of a vector and of a leaf with at most one axis longer than 1; axis 0 of rank 2
        and 3; all but the last axis of rank 4 and 5.
      exclude: The leaves that are watched and never clipped (the paper's last layer): a
        function from the path of a leaf to a bool, or a tree prefix of the parameters
        with a bool for each. Under ``optax.inject_hyperparams`` name this and ``axis``
        in ``static_args``.
      record_quantiles: Whether to keep a sketch of the norms of each leaf, 5.6 kB each,
        for ``norm_quantile(state, q, by_group=True)``.
      axis_name: As for ``clip_by_global_norm``. Units that lie on different devices
        need a ``PartitionSpec``; names are taken to split each unit.

    Returns:
      A transformation whose state is a ``ClipByUnitNormState``. Its ``update`` needs
      ``params``.

    Raises:
      ValueError: If ``max_ratio`` or ``eps`` is concrete and not positive;
        if a leaf has more axes than the rule by rank knows, or a device's
        part of one that is split in a way not given by a ``PartitionSpec`` has at most
        one axis longer than 1; if ``params`` is missing.
      TypeError: If ``max_ratio`` is none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_unit_norm(0.1)
      >>> params = jnp.array([[3.0, 0.3], [4.0, 0.4]])
      >>> updates, state = tx.update(jnp.ones((2, 2)), tx.init(params), params)
      >>> updates.round(3)
      Array([[0.354, 0.035],
             [0.354, 0.035]], dtype=float32)

    References:
      Brock et al., `High-performance large-scale image recognition without
      normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    threshold = as_absolute_threshold("max_ratio", max_ratio)
    check_positive("eps", eps)
    check_flag("record_quantiles", record_quantiles)

    config = _Config(threshold, eps, axis, exclude, axis_name)

    def init(params: optax.Params) -> ClipByUnitNormState:
        groups, _ = _units_of(config, params)
        return ClipByUnitNormState(
            stats=init_stats(),
            group_stats=init_group_stats(names_of_leaves(params), record_quantiles),
            units_clipped=jnp.zeros((), jnp.float32),
            threshold=threshold.start(groups.group_of_part.shape),
        )

    def measure(
        updates: optax.Updates,
        state: ClipByUnitNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, ClipByUnitNormState]:
        del extra_args
        check_state("clip_by_unit_norm", state, ClipByUnitNormState)
        if params is None:
            raise ValueError(
                "`params` of `clip_by_unit_norm` must be given, to compare with their "
                "norms: `tx.update(updates, state, params)`."
            )
        names = names_of_leaves(updates)
        check_same_groups("clip_by_unit_norm", names, state.group_stats)
        return _measure_units(config, updates, state, params)

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        groups, _ = _units_of(config, updates)
        return rescale_groups(updates, groups, measured.factors)

    return clip(ClipParts(init, measure, rescale, axis_name))


class _Config(NamedTuple):
    """The arguments of ``clip_by_unit_norm``."""

    threshold: Threshold
    eps: ArrayLike
    axis: int | tuple[int, ...] | Callable[[str], Any] | None
    exclude: Any
    axis_name: AxisName


def _units_of(config: _Config, tree: Any) -> tuple[Groups, np.ndarray]:
    """The units, and the excluded leaves. All of an excluded leaf is one unit."""
    axes = unit_axes(tree, config.axis, config.axis_name)
    excluded = for_each_leaf("exclude", config.exclude, tree)
    for each in excluded:
        check_flag("exclude", each)
    for i, x in enumerate(jax.tree.leaves(tree)):
        if excluded[i]:
            axes[i] = tuple(range(len(np.shape(x))))
    parts = each_part(tree, axes, layouts(tree, config.axis_name))
    return parts, np.array(excluded, bool)


def _measure_units(
    config: _Config,
    updates: optax.Updates,
    state: ClipByUnitNormState,
    params: optax.Params,
) -> tuple[Measurement, ClipByUnitNormState]:
    _check_same_shapes(updates, params)
    groups, excluded = _units_of(config, updates)
    is_excluded = excluded[groups.leaf_of_part]
    norms = groups.norms(groups.floating(updates), mesh_axes(updates, config.axis_name))
    leaf_norms = _of_leaves(groups, norm_of_norms, norms)
    total = total_norm(norms, leaf_norms, groups.indices, updates)
    sizes = _sizes_of_params(config, groups, excluded, params, norms.dtype)
    # A finite norm keeps a finite ratio: only an infinite ratio tells of a bad norm.
    ratios = jnp.minimum(ratio(norms, sizes), jnp.finfo(norms.dtype).max)
    ratios = jnp.where(jnp.isfinite(norms), ratios, norms)
    trigger, target, is_clipped, _, learned = decide(
        "clip_by_unit_norm",
        config.threshold,
        ratios,
        total.value,
        state.threshold,
        is_excluded=is_excluded,
    )
    clipped_norms = jnp.where(is_clipped, target * sizes, norms)
    limits = trigger * sizes
    new_state = ClipByUnitNormState(
        stats=update_total(
            state.stats, total, norms, clipped_norms, limits, is_clipped
        ),
        group_stats=_update_leaves(
            state, groups, leaf_norms, norms, clipped_norms, limits, is_clipped
        ),
        units_clipped=jnp.sum(is_clipped.astype(jnp.float32))
        / float(max(1, np.sum(~is_excluded))),
        threshold=learned,
    )
    factors = factors_for(is_clipped, target * sizes, norms)
    return Measurement(total, jnp.isfinite(total.value), factors), new_state


def _check_same_shapes(updates: optax.Updates, params: optax.Params) -> None:
    """Raises unless updates and parameters have the same units."""
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            "`updates` of `clip_by_unit_norm` must have the structure of `params`, "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(updates)}."
        )
    leaves = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
    for i, (update, param) in enumerate(leaves):
        if is_inexact(update) and np.shape(update) != np.shape(param):
            raise ValueError(
                "`updates` of `clip_by_unit_norm` must have the shapes of `params`, "
                f"{np.shape(param)} for {path_names(params)[i]!r}, got "
                f"{np.shape(update)}. Gradients of single examples have an axis more: "
                "clip them by `clip_by_global_norm`."
            )


def _sizes_of_params(
    config: _Config,
    groups: Groups,
    excluded: np.ndarray,
    params: optax.Params,
    dtype: jnp.dtype,
) -> jax.Array:
    """The norm of each unit's parameters, at least ``eps``."""
    # The parameters of excluded leaves need not be read.
    weights = [
        jnp.zeros((0,) * w.ndim, w.dtype) if excluded[i] else w
        for i, w in zip(groups.indices, groups.floating(params), strict=True)
    ]
    sizes = groups.norms(weights, mesh_axes(params, config.axis_name))
    return jnp.maximum(sizes.astype(dtype), as_float(config.eps, dtype))


def _update_leaves(
    state: ClipByUnitNormState,
    groups: Groups,
    before: jax.Array,
    norms: jax.Array,
    clipped_norms: jax.Array,
    limits: jax.Array,
    is_clipped: jax.Array,
) -> GroupStats:
    """Adds one update to the statistics of the leaves, whose norms are ``before``."""
    of_leaves = functools.partial(_of_leaves, groups)
    is_any = of_leaves(jnp.any, is_clipped)
    smallest = functools.partial(jnp.min, initial=jnp.inf)
    margins = of_leaves(smallest, margin_of(norms, limits))
    return update_group_stats(
        state.group_stats,
        state.stats.num_updates,
        before,
        jnp.where(is_any, of_leaves(norm_of_norms, clipped_norms), before),
        jnp.where(jnp.isfinite(margins), before * margins, jnp.inf),
        is_any,
    )


def _of_leaves(
    groups: Groups, f: Callable[[jax.Array], jax.Array], units: jax.Array
) -> jax.Array:
    """For each leaf ``f`` of the vector of its units."""
    parts = [f(pick(units, m).reshape(-1)) for m in groups.members]
    return jnp.stack(parts) if parts else jnp.zeros((0,), units.dtype)
