"""What a guard decides about a step, by what was measured of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._checks import check_number
from optax_guard._clipping.parts import Measurement
from optax_guard._norms.mesh_axes import varying_axes
from optax_guard._norms.statistics import NormStats, as_float32
from optax_guard._trees import dtype_of, is_inexact, select
from optax_guard.skip import Signals, SkipReason, SkipRule


def as_rules(skip: Any) -> tuple[SkipRule, ...]:
    """The rules that were given as ``skip=``, checked."""
    rules = (skip,) if isinstance(skip, SkipRule) else skip
    if not isinstance(rules, Sequence) or not all(
        isinstance(rule, SkipRule) for rule in rules
    ):
        raise TypeError(
            "`skip` must be one or several rules of `optax_guard.skip`, got "
            f"{skip!r} of type {type(skip).__name__}."
        )
    return tuple(rules)


def checked_loss(value: Any) -> jax.Array | None:
    """The loss given as ``value=``, checked."""
    if value is None:
        return None
    check_number("value", value)
    return jnp.asarray(value)


def check_shared(value: jax.Array | None, norm: jax.Array) -> None:
    """Raises if some devices could skip a step for their loss that others take."""
    differs = set() if value is None else varying_axes(value) - varying_axes(norm)
    if differs:
        names = tuple(sorted(map(str, differs)))
        raise ValueError(
            "`value` must be the same on all devices that take a step together, but "
            f"varies over the mesh axes {names}: some might skip a step that others "
            f"take. Pass `jax.lax.pmean(value, {names})`."
        )


def verdict(
    rules: tuple[SkipRule, ...],
    measured: Measurement,
    value: jax.Array | None,
    states: tuple[Any, ...],
    is_overruled: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Reason to skip the step (0: none), and the rules' new states."""
    reason = jnp.where(measured.is_finite, SkipReason.NONE, SkipReason.NONFINITE)
    if value is not None:
        is_bad = (reason == SkipReason.NONE) & ~jnp.isfinite(value)
        reason = jnp.where(is_bad, SkipReason.NONFINITE_VALUE, reason)
    reason = reason.astype(jnp.int32)
    is_finite = reason == SkipReason.NONE
    signals = Signals(measured.norm.value, None if value is None else as_float32(value))
    fired = [rule.judge(signals, s) for rule, s in zip(rules, states, strict=True)]
    for rule, fires in reversed(list(zip(rules, fired, strict=True))):
        fires = fires & is_finite & ~is_overruled
        reason = jnp.where(fires, jnp.int32(rule.reason), reason)
    is_skipped = reason != SkipReason.NONE
    new_states = []
    for rule, fires, state in zip(rules, fired, states, strict=True):
        anew = rule.start() if rule.restart is None else rule.restart(state)
        restarted = select(fires & is_overruled, anew, state)
        learned = rule.learn(signals, is_skipped, restarted)
        new_states.append(select(is_finite, learned, state))
    return reason, tuple(new_states)


def is_lost_in_rounding(stats: NormStats, tree: Any) -> jax.Array:
    """Whether clipping has scaled by less than a quarter of the coarsest epsilon."""
    dtypes = [dtype_of(leaf) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    # A change of half the distance to the next number, or less, is rounded away; that
    # distance is at least half of epsilon times the number.
    coarsest = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
    # Strictly, so that zeros have not vanished.
    return stats.clipped_norm < stats.grad_norm * (coarsest / 4)


LOG_LENGTH = 16


class SkipLog(NamedTuple):
    """The last 16 skipped steps, in a ring: entry ``i`` is skipped step ``i mod 16``.

    Attributes:
      skipped_update: int32[16], index of the step among all that the guard has seen,
        from 0; -1 after ``init``.
      skipped_norm: float32[16], its global norm before clipping; 0 after ``init``.
      skipped_value: float32[16], its loss, NaN if ``value=`` was not given; 0 after
        ``init``.
      skipped_reason: int32[16], a ``SkipReason``; 0 after ``init``.
      skipped_leaf: int32[16], index among the leaves of its gradients of the first
        whose norm is not finite, -1 if there was none; -1 after ``init``.
      skipped_num_leaves: int32[16], how many leaves its gradients had; 0 after
        ``init``.
    """

    skipped_update: jax.Array
    skipped_norm: jax.Array
    skipped_value: jax.Array
    skipped_reason: jax.Array
    skipped_leaf: jax.Array
    skipped_num_leaves: jax.Array


def empty_log() -> SkipLog:
    """The log after ``init``."""
    return SkipLog(
        skipped_update=jnp.full(LOG_LENGTH, -1, jnp.int32),
        skipped_norm=jnp.zeros(LOG_LENGTH, jnp.float32),
        skipped_value=jnp.zeros(LOG_LENGTH, jnp.float32),
        skipped_reason=jnp.zeros(LOG_LENGTH, jnp.int32),
        skipped_leaf=jnp.full(LOG_LENGTH, -1, jnp.int32),
        skipped_num_leaves=jnp.zeros(LOG_LENGTH, jnp.int32),
    )


def logged(
    log: SkipLog,
    measured: Measurement,
    value: jax.Array | None,
    reason: jax.Array,
    *,
    update: jax.Array,
    num_skipped: jax.Array,
    num_leaves: int,
) -> SkipLog:
    """The log with this step in it, if there is a reason to skip it.

    Args:
      log: The log before.
      measured: What the clip measured.
      value: The loss, if it was given.
      reason: int32[], 0 if the step is taken.
      update: int32[], index of the step.
      num_skipped: int32[], steps skipped before it.
      num_leaves: How many leaves the gradients have.
    """
    entry = SkipLog(
        skipped_update=update,
        skipped_norm=as_float32(measured.norm.value),
        skipped_value=as_float32(jnp.array(jnp.nan) if value is None else value),
        skipped_reason=reason,
        skipped_leaf=measured.norm.bad_leaf,
        skipped_num_leaves=jnp.int32(num_leaves),
    )
    slot = jnp.arange(LOG_LENGTH, dtype=jnp.int32) == num_skipped % LOG_LENGTH
    return select(slot & (reason != SkipReason.NONE), entry, log)
