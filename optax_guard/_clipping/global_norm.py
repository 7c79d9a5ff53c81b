"""Clipping by the global norm, and recording it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_positive,
    check_state,
    static_number,
)
from optax_guard._clipping.parts import (
    ClipParts,
    Measurement,
    clip,
    decide,
    factors_for,
    rescaled,
)
from optax_guard._clipping.relative import unit_of_all
from optax_guard._norms.mesh_axes import AxisName
from optax_guard._norms.statistics import NormStats, init_stats, update_stats
from optax_guard._norms.tree_norm import tree_norm
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import map_inexact
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._coerce import as_threshold


class ClipByNormState(NamedTuple):
    """State of ``clip_by_global_norm``.

    Attributes:
      stats: Statistics of the norm, a ``NormStats``.
      threshold: The threshold's own state; () for a constant.
    """

    stats: NormStats
    threshold: Any


class RecordNormState(NamedTuple):
    """State of ``record_norm``.

    Attributes:
      stats: Statistics of the norm, a ``NormStats``.
      threshold: Always ().
    """

    stats: NormStats
    threshold: Any


@answers_wrong_calls
def clip_by_global_norm(
    max_norm: ArrayLike | optax.Schedule | Threshold | Mapping[str, Any],
    *,
    ord: ArrayLike | None = None,
    axis_name: AxisName = None,
    nonfinite: str = "propagate",
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates by their global norm, and records the norm.

    Bounds the length of a step and keeps its direction: updates :math:`g` with
    :math:`\|g\| > c` become :math:`g \, c / \|g\|`, all others come back bit for bit.
    The norm is over all floating entries of the tree, in float32 (float64 if a leaf
    is). It is right from entries of 1e-25 to a norm of 3e38. Leaves that are not
    floating do not count and are left alone. Non-finite updates pass unscaled and are
    counted; ``guard`` skips them.

    Args:
      max_norm: Largest norm :math:`c` that passes unchanged, in units of the gradient;
        positive, may be traced, a schedule, one of ``optax_guard.threshold`` or a table
        for one, ``{"kind": "zscore", "sigma": 2.5}``. A schedule is called with the
        number of finite updates before this one (in a guard: of updates taken).
      ord: Which norm: ``None`` for the Euclidean; 1, 2, ``inf`` or any positive
        number. Other than 1, 2 and ``inf`` cost a second read of the updates.
      axis_name: The mesh axes over which the updates are split in manual SPMD, that is
        under ``jax.shard_map`` or ``jax.pmap``. Arrays sharded under ``jax.jit`` need
        none. Give one axis or several for all leaves. If leaves differ (experts, tensor
        parallelism), give the tree of ``PartitionSpec`` that is in ``in_specs`` of
        ``shard_map``, or a function from the path of a leaf to its spec, its axes or
        ``None``. Each leaf is then added up over its own axes and counts once on all
        others, with an all-reduce for each distinct set of axes. With names for all
        leaves, a replicated leaf counts once: ``shard_map`` tells by its type, unless
        ``check_vma=False``. Then it is also an error to leave out an axis. With ``()``
        each device clips its own part. ``optax.inject_hyperparams`` takes a function
        for a schedule: name it by ``static_args="axis_name"``.
      nonfinite: ``"propagate"`` passes updates with a NaN or infinite entry on;
        ``"zero"`` makes zeros of them. Note that momentum and weight decay move
        parameters on zeros too.

    Returns:
      A transformation whose state is a ``ClipByNormState``. Post-clipping norms exceed
      ``max_norm`` by rounding at most.

    Raises:
      ValueError: If ``max_norm`` or ``ord`` is concrete and not positive, or
        ``nonfinite`` is unknown; in ``update``, if ``axis_name`` leaves out an axis
        over which a leaf varies, or ``params`` is missing for a threshold relative to
        them.
      TypeError: If ``max_norm`` or ``axis_name`` is none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = optax.chain(og.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, state)
      >>> og.find_state(state, og.ClipByNormState).stats.grad_norm.item()
      5.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    threshold = as_threshold("max_norm", max_norm)
    if ord is not None:
        check_positive("ord", ord)
        ord = float(static_number("ord", ord, "it chooses the reduction"))
    if threshold.unit is not None and ord not in (None, 2.0):
        raise ValueError(
            "`ord` must be 2 with a threshold relative to the parameters, whose norm "
            f"is the Euclidean one, got {ord}."
        )
    check_choice("nonfinite", nonfinite, ("propagate", "zero"))

    def init(params: optax.Params) -> ClipByNormState:
        del params
        return ClipByNormState(init_stats(), threshold.start(()))

    def measure(
        updates: optax.Updates,
        state: ClipByNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, ClipByNormState]:
        del extra_args
        check_state("clip_by_global_norm", state, ClipByNormState)
        norm = tree_norm(updates, ord, axis_name)
        value, is_finite = norm.value, jnp.isfinite(norm.value)
        unit = unit_of_all("clip_by_global_norm", threshold, params, axis_name)
        decision = decide(
            "clip_by_global_norm", threshold, value, value, state.threshold, unit=unit
        )
        trigger, target, is_clipped, clipped_norm, learned = decision
        stats = update_stats(state.stats, value, clipped_norm, trigger, is_clipped)
        factors = is_finite, factors_for(is_clipped, target, value)
        return Measurement(norm, is_finite, factors), ClipByNormState(stats, learned)

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        is_finite, factors = measured.factors
        if nonfinite == "propagate":
            return map_inexact(lambda x: rescaled(x, factors), updates)
        return map_inexact(
            lambda x: jnp.where(is_finite, rescaled(x, factors), jnp.zeros_like(x)),
            updates,
        )

    return clip(ClipParts(init, measure, rescale, axis_name))


@answers_wrong_calls
def record_norm(*, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    """Records the global norm of updates and changes nothing.

    Use it to watch a run before you choose a threshold, or to record the norm at a
    second place of a chain, such as the optimizer's output.

    Args:
      axis_name: As for ``clip_by_global_norm``.

    Returns:
      A transformation whose state is a ``RecordNormState``.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.record_norm()
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> updates, state.stats.norm_mean.item()
      (Array([3., 4.], dtype=float32), 5.0)
    """

    def init(params: optax.Params) -> RecordNormState:
        del params
        return RecordNormState(init_stats(), ())

    def measure(
        updates: optax.Updates,
        state: RecordNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, RecordNormState]:
        del params, extra_args
        check_state("record_norm", state, RecordNormState)
        norm = tree_norm(updates, None, axis_name)
        stats = update_stats(
            state.stats, norm.value, norm.value, jnp.array(jnp.inf), jnp.zeros((), bool)
        )
        is_finite = jnp.isfinite(norm.value)
        return Measurement(norm, is_finite, ()), RecordNormState(stats, ())

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        del measured
        return updates

    return clip(ClipParts(init, measure, rescale, axis_name))
