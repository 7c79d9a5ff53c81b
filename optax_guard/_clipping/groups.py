"""Clipping in groups that share a norm: leaves, layers of stacked leaves, labels."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_state
from optax_guard._clipping.group_norms import (
    check_same_groups,
    norms_of_groups,
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
from optax_guard._clipping.relative import unit_of_groups
from optax_guard._clipping.side_by_side import side_by_side
from optax_guard._norms.groups import (
    Groups,
    axes_without,
    by_label,
    each_part,
    names_of_parts,
)
from optax_guard._norms.mesh_axes import AxisName, layouts, mesh_axes
from optax_guard._norms.statistics import (
    GroupStats,
    NormStats,
    init_group_stats,
    init_stats,
    update_group_stats,
)
from optax_guard._public import answers_wrong_calls
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._coerce import as_threshold


class ClipByLeafNormState(NamedTuple):
    """State of ``clip_by_leaf_norm``.

    Attributes:
      stats: Statistics of the global norm, a ``NormStats``. Its ``clip_threshold`` is
        the largest global norm at which the last updates, scaled as a whole, would not
        have been clipped.
      group_stats: Statistics of the norm of each leaf, a ``GroupStats``.
      threshold: The threshold's own state, for all leaves; () for a constant.
    """

    stats: NormStats
    group_stats: GroupStats
    threshold: Any


class ClipByGroupNormState(NamedTuple):
    """State of ``clip_by_group_norm``.

    Attributes:
      stats: Statistics of the global norm, as in ``ClipByLeafNormState``.
      group_stats: Statistics of the norm of each group, a ``GroupStats``.
      threshold: For each label its threshold's own state; () for a constant.
    """

    stats: NormStats
    group_stats: GroupStats
    threshold: Any


@answers_wrong_calls
def clip_by_leaf_norm(
    max_norm: ArrayLike | optax.Schedule | Threshold | Mapping[str, Any],
    *,
    layer_axis: int | Callable[[str], int | None] | None = None,
    record_quantiles: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf of the updates by its own norm, and records all of them.

    A leaf :math:`g_i` with :math:`\|g_i\| > c_i` becomes
    :math:`g_i \, c_i / \|g_i\|`; all others come back bit for bit. One tensor that
    explodes does not shrink the steps of the others, but the direction of the whole
    step changes, unlike with ``clip_by_global_norm``. A threshold that adapts has a
    state for each leaf. Norms are as exact as those of ``clip_by_global_norm``. A leaf
    that is not finite passes unscaled and is counted.

    Args:
      max_norm: As for ``clip_by_global_norm``. With ``threshold.quantile`` the state
        has a sketch for every leaf, 23 kB each by default.
      layer_axis: The axis of stacked leaves along which layers lie, as ``nn.scan``
        makes them. Each layer is then clipped by its own norm. It is a number for all
        leaves, or a function from the path of a leaf (``"blocks/mlp/kernel"``) to its
        axis, or to ``None`` if the leaf is not stacked. ``optax.inject_hyperparams``
        takes a function for a schedule and traces a number: name it by
        ``static_args="layer_axis"``.
      record_quantiles: Whether to keep a sketch of the norms of each leaf, 5.6 kB each,
        for ``norm_quantile(state, q, by_group=True)``.
      axis_name: As for ``clip_by_global_norm``. Layers that lie on different devices
        need a ``PartitionSpec``; names are taken to split each layer.

    Returns:
      A transformation whose state is a ``ClipByLeafNormState``. ``leaf_norms(state)``
      gives the norms by path. To only watch, set ``max_norm`` to infinity.

    Raises:
      ValueError: If ``max_norm`` is concrete and not positive, or ``layer_axis``
        is no axis of a leaf.
      TypeError: If ``max_norm`` is none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_leaf_norm(1.0)
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["a"], updates["b"]
      (Array([0.6, 0.8], dtype=float32), Array([0.5], dtype=float32))
      >>> {path: norm.item() for path, norm in og.leaf_norms(state).items()}
      {'a': 5.0, 'b': 0.5}
    """
    threshold = as_threshold("max_norm", max_norm)
    check_flag("record_quantiles", record_quantiles)

    def split(tree: Any) -> tuple[Groups, Any]:
        axes = axes_without(tree, layer_axis)
        whole = layouts(tree, axis_name)
        return each_part(tree, axes, whole), names_of_parts(tree, axes, whole)

    return _clip_groups(
        "clip_by_leaf_norm",
        ClipByLeafNormState,
        split,
        threshold,
        record_quantiles,
        axis_name,
    )


@answers_wrong_calls
def clip_by_group_norm(
    max_norms: Mapping[str, Any],
    labels: Any,
    *,
    record_quantiles: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips groups of leaves, each by its own norm and with its own threshold.

    Labels make the groups, as in ``optax.partition``. A group here is treated like a
    leaf in ``clip_by_leaf_norm``.

    Args:
      max_norms: For each label a threshold: a positive number (infinite to only watch
        the group), a schedule, one of ``optax_guard.threshold`` or a table.
      labels: A function from the path of a leaf (``"encoder/attention/kernel"``) to its
        label; or a tree of labels like the parameters, or like the top of their tree.
        Under ``optax.inject_hyperparams`` name it in ``static_args``.
      record_quantiles: Whether to keep a sketch of the norms of each group, 5.6 kB
        each, for ``norm_quantile(state, q, by_group=True)``.
      axis_name: As for ``clip_by_global_norm``.

    Returns:
      A transformation whose state is a ``ClipByGroupNormState``.

    Raises:
      ValueError: If a threshold is concrete and not positive; at ``init``, if a
        leaf has a label without a threshold or a threshold's label has no leaf.
      TypeError: If ``max_norms`` is not a dict with strings as keys, or a threshold is
        none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_group_norm(
      ...     {"embedding": 0.1, "rest": og.threshold.zscore()},
      ...     lambda path: "embedding" if "embed" in path else "rest",
      ... )
      >>> grads = {"embed": jnp.array([3.0, 4.0]), "head": jnp.array([2.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["embed"], updates["head"]
      (Array([0.06, 0.08], dtype=float32), Array([2.], dtype=float32))
    """
    if not isinstance(max_norms, Mapping) or not all(
        isinstance(label, str) for label in max_norms
    ):
        raise TypeError(
            "`max_norms` must be a dict from labels, which are strings, to thresholds, "
            f"got {max_norms!r}."
        )
    if not max_norms:
        raise ValueError("`max_norms` must have a label at least, got none.")
    check_flag("record_quantiles", record_quantiles)
    thresholds = {
        label: as_threshold(f"max_norms[{label!r}]", max_norms[label])
        for label in sorted(max_norms)
    }

    def split(tree: Any) -> tuple[Groups, Any]:
        known = list(thresholds)
        return by_label(tree, labels, known), dict.fromkeys(known)

    return _clip_groups(
        "clip_by_group_norm",
        ClipByGroupNormState,
        split,
        side_by_side(thresholds),
        record_quantiles,
        axis_name,
    )


def _clip_groups(
    factory: str,
    make_state: type[ClipByLeafNormState] | type[ClipByGroupNormState],
    split: Callable[[Any], tuple[Groups, Any]],
    threshold: Threshold,
    record_quantiles: bool,
    axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> Any:
        _, names = split(params)
        group_stats = init_group_stats(names, record_quantiles)
        state = threshold.start(group_stats.group_counts.shape[:-1])
        return make_state(init_stats(), group_stats, state)

    def measure(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, Any]:
        del extra_args
        check_state(factory, state, make_state)
        groups, names = split(updates)
        check_same_groups(factory, names, state.group_stats)
        over = mesh_axes(updates, axis_name)
        parts = groups.norms(groups.floating(updates), over)
        num_groups = len(state.group_stats.group_counts)
        norms = norms_of_groups(parts, groups.group_of_part, num_groups)
        total = total_norm(parts, parts, groups.leaf_of_part, updates)
        unit = unit_of_groups(factory, threshold, params, groups, num_groups, axis_name)
        decision = decide(
            factory, threshold, norms, total.value, state.threshold, unit=unit
        )
        trigger, target, is_clipped, clipped_norms, learned = decision
        new_state = make_state(
            update_total(state.stats, total, norms, clipped_norms, trigger, is_clipped),
            update_group_stats(
                state.group_stats,
                state.stats.num_updates,
                norms,
                clipped_norms,
                trigger,
                is_clipped,
            ),
            learned,
        )
        factors = factors_for(is_clipped, target, norms)
        return Measurement(total, jnp.isfinite(total.value), factors), new_state

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        return rescale_groups(updates, split(updates)[0], measured.factors)

    return clip(ClipParts(init, measure, rescale, axis_name))
