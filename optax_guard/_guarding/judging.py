"""The guard's verdict on a step, from the measurements of its gradients."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._checks import (
    check_number,
    check_part,
    check_state,
    is_number,
    uncalled,
)
from optax_guard._clipping.parts import Measurement
from optax_guard._guarding.entries import Told
from optax_guard._guarding.masking import hide
from optax_guard._guarding.state import GuardConfig, GuardState, logged, start_rules
from optax_guard._models import params_of
from optax_guard._norms.mesh_axes import varying_axes
from optax_guard._norms.statistics import NormStats, as_float32
from optax_guard._rows import rows_of
from optax_guard._trees import dtype_of, increment, is_inexact
from optax_guard.skip import Signals, SkipReason, SkipRule, is_nonfinite

# Float32 cannot hold the square of more.
_LARGEST_TO_SQUARE = math.sqrt(float(jnp.finfo(jnp.float32).max))


def as_rules(skip: Any) -> tuple[SkipRule, ...]:
    """The rules that were given as ``skip=``, checked."""
    rules = (skip,) if isinstance(skip, SkipRule) else skip
    if not isinstance(rules, Sequence) or not all(
        isinstance(rule, SkipRule) for rule in rules
    ):
        raise TypeError(
            "`skip` must be one or several rules of `optax_guard.skip`, got "
            f"{skip!r} of type {type(skip).__name__}.{uncalled(skip)}"
        )
    return tuple(rules)


def check_one_loss(factory: str, extra_args: dict[str, Any]) -> None:
    """Raises if two different objects are given for the loss of a step."""
    both = [extra_args[name] for name in names_of_loss(extra_args)]
    if len(both) == 2 and both[0] is not both[1]:
        raise ValueError(
            f"`value` and `loss` of `{factory}` must be one object if both are given, "
            "because it reads either as the loss of the step. Give one of them."
        )


def names_of_loss(extra_args: dict[str, Any]) -> list[str]:
    """The extra arguments that are the loss: ``value=``, or ``loss=`` as in levanter.

    An optimizer may take a function as ``loss=``; that is no loss of a step.
    """
    given = {name: extra_args.get(name) for name in ("value", "loss")}
    return [name for name, x in given.items() if x is not None and not callable(x)]


def with_one_loss(extra_args: dict[str, Any], loss: Any = None) -> dict[str, Any]:
    """The arguments, with one object for the loss by both names, as it was given.

    A compiled function takes one object in two arguments for two.
    """
    names = names_of_loss(extra_args)
    if loss is None and len(names) < 2:
        return extra_args
    loss = extra_args[names[0]] if loss is None else loss
    return extra_args | dict.fromkeys(names, loss)


def checked_loss(extra_args: dict[str, Any]) -> jax.Array | None:
    """The loss given as ``value=`` or ``loss=``, checked."""
    if extra_args.get("value") is not None:
        name = "value"
    elif "loss" in names_of_loss(extra_args):
        name = "loss"
    else:
        return None
    value = extra_args[name]
    if is_number(value) and np.shape(value) == (1,):
        value = value[0]
    check_number(name, value)
    return jnp.asarray(value)


def check_shared(value: jax.Array | None, norm: jax.Array) -> None:
    """Raises if devices could differ in their verdict because their losses differ."""
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
    *,
    is_too_large: jax.Array,
    rule_streak: jax.Array,
    is_usable: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Reason to skip the step (0: none), and the rules' new states."""
    reason = jnp.where(measured.is_finite, SkipReason.NONE, SkipReason.NONFINITE)
    others = [] if value is None else [jnp.isfinite(value)]
    for is_good in others if is_usable is None else [*others, is_usable]:
        is_bad = (reason == SkipReason.NONE) & ~is_good
        reason = jnp.where(is_bad, SkipReason.NONFINITE_VALUE, reason)
    is_over = (reason == SkipReason.NONE) & is_too_large
    reason = jnp.where(is_over, SkipReason.OVERFLOW, reason).astype(jnp.int32)
    is_finite = reason == SkipReason.NONE
    signals = Signals(measured.norm.value, None if value is None else as_float32(value))
    fired = [rule.judge(signals, s) for rule, s in zip(rules, states, strict=True)]
    overruled = [rule_streak >= rule.max_consecutive for rule in rules]
    for rule, fires, is_over in reversed(
        list(zip(rules, fired, overruled, strict=True))
    ):
        fires = fires & is_finite & ~is_over
        reason = jnp.where(fires, jnp.int32(rule.reason), reason)
    is_skipped = reason != SkipReason.NONE
    new_states = []
    for rule, fires, is_over, state in zip(
        rules, fired, overruled, states, strict=True
    ):
        anew = rule.start() if rule.restart is None else rule.restart(state)
        restarted = optax.tree.where(fires & is_over, anew, state)
        learned = rule.learn(signals, is_skipped, restarted)
        new_states.append(optax.tree.where(is_finite, learned, state))
    return reason, tuple(new_states)


def next_rule_streak(
    rules: tuple[SkipRule, ...], reason: jax.Array, streak: jax.Array
) -> jax.Array:
    """How many steps rules have skipped since the last one taken, with this step."""
    if not rules:
        return jnp.zeros_like(streak)
    is_of_rule = jnp.any(jnp.stack([reason == rule.reason for rule in rules]))
    return jnp.where(reason == SkipReason.NONE, 0, increment(streak, is_of_rule))


def is_lost_in_rounding(stats: NormStats, tree: Any) -> jax.Array:
    """Whether clipping has scaled by less than a quarter of the coarsest epsilon."""
    dtypes = [dtype_of(leaf) for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
    # A change of at most half the distance to the next number is rounded away. That
    # distance is at least half of epsilon times the number.
    coarsest = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
    # Strictly smaller, because zeros have not vanished.
    return _finite_norm_after(stats) < NormStats.grad_norm.kept_in(stats).last * (
        coarsest / 4
    )


def _finite_norm_after(stats: NormStats) -> jax.Array:
    """The norm after clipping in a step whose gradients are finite.

    To decode it would make a NaN, which alarms a debugger of NaNs.
    """
    return NormStats.clipped_norm.kept_in(stats).last


class Judged(NamedTuple):
    """The verdict on a step, before the optimizer takes it.

    Attributes:
      measured: The measurement of the clip.
      value: The loss, if it was given.
      reason: int32[], a ``SkipReason``.
      clip_state: The clip's state after the step.
      rule_states: The rules' states after it.
      has_vanished: bool[], whether the clip made the gradients too small to count.
      num_leaves: How many leaves the gradients have.
    """

    measured: Measurement
    value: jax.Array | None
    reason: jax.Array
    clip_state: Any
    rule_states: tuple[Any, ...]
    has_vanished: jax.Array
    num_leaves: int


def judge_step(
    config: GuardConfig,
    updates: optax.Updates,
    state: GuardState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
    is_usable: jax.Array | None = None,
) -> Judged:
    """Measures the gradients, and decides whether the step is taken.

    ``is_usable`` says whether what else was given with them is as good as a finite
    loss.
    """
    check_state("guard", state, GuardState)
    check_part(
        "guard",
        "skip rules",
        state.rule_states,
        lambda: start_rules(config.rules),
        "A state made before the rules were changed does not fit.",
    )
    value = checked_loss(extra_args)
    params = params_of(updates, params)
    measured, clip_state = config.clip.measure(
        updates, state.clip_state, params, **extra_args
    )
    check_shared(value, measured.norm.value)
    reason, rule_states = verdict(
        config.rules,
        measured,
        value,
        state.rule_states,
        is_too_large=_is_too_large(measured, clip_state.stats),
        rule_streak=state.rule_streak,
        is_usable=is_usable,
    )
    is_skipped = reason != SkipReason.NONE
    has_vanished = jnp.zeros((), jnp.bool_)
    if config.is_clipping:  # A clip that only measures makes nothing smaller.
        like = updates if params is None else params
        counted = like if config.mask is True else hide(config.mask, like)
        has_vanished = ~is_skipped & is_lost_in_rounding(clip_state.stats, counted)
    # The threshold steers later steps, so it must not learn from a skipped step. The
    # statistics are a record of every step.
    threshold = optax.tree.where(
        is_skipped, state.clip_state.threshold, clip_state.threshold
    )
    return Judged(
        measured=measured,
        value=value,
        reason=reason,
        clip_state=clip_state._replace(threshold=threshold),
        rule_states=rule_states,
        has_vanished=has_vanished,
        num_leaves=len(jax.tree.leaves(updates)),
    )


def _is_too_large(measured: Measurement, stats: NormStats) -> jax.Array:
    """Whether float32 cannot hold the square of the norm after clipping."""
    if measured.norm.value.dtype == jnp.float64:
        return jnp.zeros((), jnp.bool_)
    return _finite_norm_after(stats) > _LARGEST_TO_SQUARE


def recorded(
    config: GuardConfig, judged: Judged, state: GuardState, told: Told | None = None
) -> GuardState:
    """The guard's records after the step; ``wrapped_state`` is still the old one.

    Args:
      config: The configuration.
      judged: The verdict on the gradients.
      state: The state before the step.
      told: What is known of the entries that kept their old values.
    """
    reason, is_partial = judged.reason, jnp.zeros((), jnp.bool_)
    if told is not None:
        is_taken = reason == SkipReason.NONE
        is_lost = is_taken & told.is_lost
        is_partial = is_taken & told.is_partial & ~told.is_lost
        reason = jnp.where(is_lost, jnp.int32(SkipReason.NONFINITE_UPDATE), reason)
        is_of_params = told.were_bad & (is_lost | is_nonfinite(reason))
        reason = jnp.where(is_of_params, jnp.int32(SkipReason.NONFINITE_PARAMS), reason)
    is_skipped = reason != SkipReason.NONE
    streak = jnp.where(is_skipped, increment(state.skip_streak), 0)
    by_rule = next_rule_streak(config.rules, reason, state.rule_streak)
    counts = {
        "num_skipped": increment(state.num_skipped, is_skipped),
        "skip_streak": streak,
        "skip_reason": reason,
        "guard_exhausted": streak - by_rule >= config.max_consecutive_skips,
        "num_vanished": increment(state.num_vanished, judged.has_vanished),
        "num_partial": increment(state.num_partial, is_partial),
        "rule_streak": by_rule,
    }
    return GuardState(
        **rows_of(GuardState, counts),
        skip_log=logged(
            state.skip_log,
            judged.measured,
            judged.value,
            reason,
            update=state.clip_state.stats.num_updates,
            num_skipped=state.num_skipped,
            num_leaves=judged.num_leaves,
        ),
        clip_state=judged.clip_state,
        rule_states=judged.rule_states,
        wrapped_state=state.wrapped_state,
        bound_state=state.bound_state,
    )
