"""Reading the state: scalars to log."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import is_concrete
from optax_guard._clipping.global_norm import ClipByNormState, RecordNormState
from optax_guard._clipping.groups import ClipByGroupNormState, ClipByLeafNormState
from optax_guard._clipping.units import ClipByUnitNormState
from optax_guard._clipping.value import ClipByValueState
from optax_guard._guarding.accumulate_state import AccumulateState
from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._guarding.state import GuardState
from optax_guard._guarding.update_bound import UpdateBoundState
from optax_guard._norms.statistics import NormStats
from optax_guard._trees import find_states

# Every state that carries a `NormStats` as `stats`.
_WATCHING = (
    ClipByNormState,
    ClipByValueState,
    ClipByLeafNormState,
    ClipByGroupNormState,
    ClipByUnitNormState,
    RecordNormState,
)
# Scalars that the states of some clips have beside it.
_OF_CLIP = ("entries_clipped", "update_cosine", "units_clipped")


def metrics(state: Any) -> dict[str, jax.Array]:
    """Finds the scalars to log, wherever they are in the optimizer state.

    Inside a jitted step the scalars are arrays, which wait for nothing. On the host
    they are NumPy's: the call waits for the device, and reads it once. To log without
    waiting, return ``metrics(opt_state)`` from the jitted step.

    Args:
      state: An optimizer state, a Flax ``TrainState`` or an ``nnx.Optimizer``.

    Returns:
      A dict of scalars, of vectors for a population. From a clip or ``record_norm``:
      ``grad_norm``, ``clipped_norm``, ``clip_threshold``, ``norm_mean``, ``norm_std``,
      ``norm_max`` (units of the gradient), ``num_updates``, and shares of all updates
      in [0, 1]: ``clip_rate``, ``nonfinite_rate``; from ``clip_by_value`` also
      ``entries_clipped`` and ``update_cosine``, from ``clip_by_unit_norm``
      ``units_clipped``. From a guard: ``num_skipped``, ``skip_rate``,
      ``skip_streak``, ``skip_reason`` (a ``SkipReason``), ``guard_exhausted``,
      ``num_vanished``, ``num_partial`` (see ``GuardState``). From its bound on updates,
      as of the last step taken: ``update_norm`` before the bound, ``update_bound``,
      ``params_norm`` before the step (units of the parameters), ``update_ratio``, which
      is the norm after the bound in units of ``params_norm``, and ``bound_rate``, the
      share of steps whose update was made smaller. From ``accumulate``:
      ``num_dropped`` micro-batches, and their share ``drop_rate``. Where there are
      several, the first in ``find_states``' order has these names, the next
      ``grad_norm_1`` and so on.

    Raises:
      ValueError: If nothing of this library is in ``state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), clip=1.0)
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> m = og.metrics(state)
      >>> m["grad_norm"].item(), m["clipped_norm"].item(), m["clip_rate"].item()
      (5.0, 1.0, 1.0)
    """
    found = find_states(
        state, (*_WATCHING, UpdateBoundState, GuardState, AccumulateState)
    )
    # The state of a clip that bounds updates comes next to that of the bound.
    watching = [
        x
        for before, x in itertools.pairwise([None, *found])
        if isinstance(x, _WATCHING) and not isinstance(before, UpdateBoundState)
    ]
    if not watching:
        raise ValueError(
            "`state` holds no state of this library. Wrap the optimizer in `guard`, or "
            "chain `clip_by_global_norm` or `record_norm` before it."
        )
    warn_if_nested(state)
    scalars = (
        list(map(_scalars_of_clip, watching)),
        [_scalars_of_guard(x) for x in found if isinstance(x, GuardState)],
        [
            x._replace(grad_mean=(), guard_state=())
            for x in found
            if isinstance(x, AccumulateState)
        ],
    )
    leaves, treedef = jax.tree.flatten(scalars)
    rows = {id(leaf): leaf for leaf in leaves}
    if all(map(is_on_this_host, rows.values())):
        # Copies: the buffers may be donated.
        read = (np.array(x)[()] for x in jax.device_get(list(rows.values())))
        by_id = dict(zip(rows, read, strict=True))
        leaves = [by_id[id(leaf)] for leaf in leaves]
        return _as_scalars(np, *treedef.unflatten(leaves))
    return _compiled_scalars(*scalars)


def is_on_this_host(leaf: Any) -> bool:
    """Whether the numbers can be read here and now."""
    if not is_concrete(leaf):
        return False
    return not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def _scalars_of_clip(state: Any) -> Any:
    """The state of a clip without its sketches, groups and threshold."""
    rest = dict.fromkeys({"group_stats", "threshold"} & set(state._fields), ())
    return state._replace(stats=state.stats._replace(norm_sketch=()), **rest)


def _scalars_of_guard(state: GuardState) -> tuple[GuardState, NormStats]:
    """The state of a guard without arrays, and the statistics of its clip."""
    rest = dict.fromkeys(("skip_log", "clip_state", "rule_states", "wrapped_state"), ())
    bound = state.bound_state
    if bound:
        stats = bound.bound_clip_state.stats._replace(norm_sketch=())
        bound = bound._replace(bound_clip_state=stats)
    rows = state._replace(**rest, bound_state=bound)
    return rows, state.clip_state.stats._replace(norm_sketch=())


def _as_scalars(xp: Any, watching: Any, guards: Any, accumulating: Any) -> dict:
    """The scalars by name, computed by ``jax.numpy`` or NumPy."""
    named: dict[str, Any] = {}

    def add(i: int, **values: Any) -> None:
        suffix = f"_{i}" if i else ""
        named.update({name + suffix: value for name, value in values.items()})

    def share(part: Any, whole: Any) -> Any:
        return part.astype(np.float32) / xp.maximum(whole, 1).astype(np.float32)

    for i, state in enumerate(watching):
        stats = state.stats
        add(
            i,
            grad_norm=stats.grad_norm,
            clipped_norm=stats.clipped_norm,
            clip_threshold=stats.clip_threshold,
            norm_mean=stats.norm_mean,
            norm_std=xp.sqrt(stats.norm_var),
            norm_max=stats.norm_max,
            num_updates=stats.num_updates,
            clip_rate=share(stats.num_clipped, stats.num_updates),
            nonfinite_rate=share(stats.num_nonfinite, stats.num_updates),
            **{name: getattr(state, name) for name in _OF_CLIP if hasattr(state, name)},
        )
    for i, (guard, stats) in enumerate(guards):
        add(
            i,
            num_skipped=guard.num_skipped,
            skip_rate=share(guard.num_skipped, stats.num_updates),
            skip_streak=guard.skip_streak,
            skip_reason=guard.skip_reason,
            guard_exhausted=guard.guard_exhausted,
            num_vanished=guard.num_vanished,
            num_partial=guard.num_partial,
        )
        if bound := guard.bound_state:
            of_updates = bound.bound_clip_state
            add(
                i,
                update_norm=of_updates.grad_norm,
                update_bound=of_updates.clip_threshold,
                update_ratio=bound.update_ratio,
                params_norm=bound.params_norm,
                bound_rate=share(of_updates.num_clipped, of_updates.num_updates),
            )
    for i, state in enumerate(accumulating):
        add(
            i,
            num_dropped=state.num_dropped,
            drop_rate=share(state.num_dropped, state.num_micro_batches),
        )
    return named


@jax.jit
def _compiled_scalars(*scalars: Any) -> dict[str, jax.Array]:
    # Copies: an output that is only an input passed on would be donated with it.
    return jax.tree.map(jnp.copy, _as_scalars(jnp, *scalars))
