"""Reading the state: scalars to log, and the last skipped steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import is_concrete
from optax_guard._clipping.global_norm import ClipByNormState, RecordNormState
from optax_guard._clipping.groups import ClipByGroupNormState, ClipByLeafNormState
from optax_guard._clipping.units import ClipByUnitNormState
from optax_guard._clipping.value import ClipByValueState
from optax_guard._guarding.accumulation import AccumulateState
from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._guarding.state import LOG_LENGTH, GuardState
from optax_guard._norms.statistics import NormStats
from optax_guard._norms.tree_norm import leaves_of_part
from optax_guard._trees import find_states, only_state, path_names
from optax_guard.skip import SkipReason

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

_ADVICE = {
    SkipReason.NONFINITE_UPDATE: (
        "The gradients were finite, and the optimizer made non-finite parameters or "
        "moments of them. Those entries kept their old values. Look at its learning "
        "rate and its schedule, and at `eps`, which float16 rounds to 0."
    ),
    SkipReason.OVERFLOW: (
        "Parameters and optimizer state are those of the last good step. The gradients "
        "are too large for float32: clip them by `guard(tx, clip=1.0)`."
    ),
}
_OTHER_ADVICE = (
    "Parameters and optimizer state are those of the last good step. Look at "
    "`skipped_steps(opt_state, params)` for the leaf and the steps, and at the batches "
    "of those steps; a lower learning rate or threshold helps only if the gradients "
    "were growing before. If the parameters hold a NaN themselves, it was there "
    "before the guard, or something else has written it."
)


class GuardExhaustedError(RuntimeError):
    """The guard has skipped too many steps in a row; see ``raise_if_exhausted``."""


class SkippedStep(NamedTuple):
    """One skipped step, on the host.

    Attributes:
      update: Index of the step among all that the guard has seen, from 0.
      grad_norm: Its global norm before clipping, in units of the gradient.
      value: Its loss; NaN if ``value=`` was not given to ``update``.
      reason: Why it was skipped.
      leaf: Path of the first leaf whose gradient's norm is not finite, or of a run of
        neighbours that holds it; its index among the gradients if they are not known to
        be those of the parameters; ``None`` if all were finite.
    """

    update: int
    grad_norm: float
    value: float
    reason: SkipReason
    leaf: str | int | None


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
      ``num_vanished``, ``num_partial`` (see ``GuardState``). From ``accumulate``:
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
    found = find_states(state, (*_WATCHING, GuardState, AccumulateState))
    watching = [x for x in found if isinstance(x, _WATCHING)]
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
    if all(map(_is_on_this_host, rows.values())):
        # Copies: the buffers may be donated.
        read = (np.array(x)[()] for x in jax.device_get(list(rows.values())))
        by_id = dict(zip(rows, read, strict=True))
        leaves = [by_id[id(leaf)] for leaf in leaves]
        return _as_scalars(np, *treedef.unflatten(leaves))
    return _compiled_scalars(*scalars)


def skipped_steps(state: Any, params: Any = None) -> list[SkippedStep]:
    """The last skipped steps, at most 16, oldest first. Waits for the device.

    Args:
      state: An optimizer state with one guard in it, a ``TrainState`` or an
        ``nnx.Optimizer``.
      params: The parameters that the guard was initialised with, to name leaves by
        their path; taken from ``state.params`` if it has them.

    Returns:
      A list of ``SkippedStep``.

    Raises:
      ValueError: If there is not exactly one guard in ``state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"head": {"bias": jnp.zeros(1), "kernel": jnp.zeros(2)}}
      >>> grads = {"head": {"bias": jnp.ones(1), "kernel": jnp.array([1.0, jnp.inf])}}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> [(r.update, r.reason.name, r.leaf) for r in og.skipped_steps(state, params)]
      [(0, 'NONFINITE', 'head/kernel')]
    """
    guard_state = only_state("state", state, GuardState)
    params = getattr(state, "params", None) if params is None else params
    log, total = jax.device_get((guard_state.skip_log, guard_state.num_skipped))
    if np.shape(total):
        raise ValueError(
            "`state` must be that of one run, got a population of shape "
            f"{np.shape(total)}. Take one: `jax.tree.map(lambda x: x[i], state)`."
        )
    order = np.arange(max(0, int(total) - LOG_LENGTH), int(total)) % LOG_LENGTH
    return [
        SkippedStep(
            update=int(log.skipped_update[i]),
            grad_norm=float(log.skipped_norm[i]),
            value=float(log.skipped_value[i]),
            reason=SkipReason(int(log.skipped_reason[i])),
            leaf=_leaf_name(
                int(log.skipped_leaf[i]), int(log.skipped_num_leaves[i]), params
            ),
        )
        for i in order
    ]


def raise_if_exhausted(metrics: Mapping[str, Any]) -> None:
    """Raises if the guard has skipped too many steps in a row. Waits for the device.

    Args:
      metrics: The dict that ``metrics(state)`` returned.

    Raises:
      GuardExhaustedError: If a ``guard_exhausted`` in it is true.
      ValueError: If there is none.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)
      >>> updates, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
      >>> og.raise_if_exhausted(og.metrics(state))
      Traceback (most recent call last):
      ...
      optax_guard.GuardExhaustedError: The guard skipped the last 1 step(s)...
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            "`metrics` must be the dict that `optax_guard.metrics` returns for a "
            f"state, got a `{type(metrics).__name__}`."
        )
    flags = {k: v for k, v in metrics.items() if k.startswith("guard_exhausted")}
    if not flags:
        raise ValueError(
            "`metrics` must hold `guard_exhausted`, as `optax_guard.metrics` returns "
            f"it for an optimizer with a guard, got the keys {sorted(metrics)}."
        )
    for name, flag in flags.items():
        if np.any(flag):
            suffix = name.removeprefix("guard_exhausted")
            worst = np.argmax(metrics["skip_streak" + suffix])
            reason = SkipReason(int(np.ravel(metrics["skip_reason" + suffix])[worst]))
            streak = int(np.ravel(metrics["skip_streak" + suffix])[worst])
            raise GuardExhaustedError(
                f"The guard skipped the last {streak} step(s) in a row, the last for "
                f"{reason.name}. {_ADVICE.get(reason, _OTHER_ADVICE)}"
            )


def _is_on_this_host(leaf: Any) -> bool:
    """Whether the numbers can be read here and now."""
    if not is_concrete(leaf):
        return False
    return not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    )


def _leaf_name(index: int, num_leaves: int, params: Any) -> str | int | None:
    if index < 0:
        return None
    paths = path_names(params)
    if len(paths) != num_leaves:
        # A part of the parameters, as under a mask: which part is not known here.
        return index
    run = leaves_of_part(params, index)
    return paths[run[0]] if len(run) == 1 else f"{paths[run[0]]} to {paths[run[-1]]}"


def _scalars_of_clip(state: Any) -> Any:
    """The state of a clip without its sketches, groups and threshold."""
    rest = dict.fromkeys({"group_stats", "threshold"} & set(state._fields), ())
    return state._replace(stats=state.stats._replace(norm_sketch=()), **rest)


def _scalars_of_guard(state: GuardState) -> tuple[GuardState, NormStats]:
    """The state of a guard without arrays, and the statistics of its clip."""
    rest = dict.fromkeys(("skip_log", "clip_state", "rule_states", "wrapped_state"), ())
    return state._replace(**rest), state.clip_state.stats._replace(norm_sketch=())


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
