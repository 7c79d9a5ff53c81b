"""Combinators: stop rules made of stop rules.

The rules inside never latch. So `all_of` fires when all of them are true at the same
evaluation.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_kind
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import increment
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_int,
    check_rule,
    sign_of,
)


@answers_wrong_calls
def any_of(*rules: StopRule) -> StopRule:
    """Fires when at least one rule is true.

    If several are, the reason is the first of TARGET, DIVERGED, any other in the
    order of the arguments, BUDGET.

    Args:
      *rules: One rule or more.

    Returns:
      A rule whose state is the tuple of the states of the rules.

    Raises:
      ValueError: If no rule is given.
      TypeError: If an argument is not a rule.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.any_of(stop.target(0.1), stop.patience(2)))
      >>> state = stopper.init()
      >>> for loss in [0.5, 0.6, 0.7, 0.05]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    return _combine("any_of", jnp.any, rules)


@answers_wrong_calls
def all_of(*rules: StopRule) -> StopRule:
    """Fires when all rules are true at the same evaluation.

    Args:
      *rules: One rule or more; the reason is chosen among theirs as in `any_of`.

    Returns:
      A rule whose state is the tuple of the states of the rules.

    Raises:
      ValueError: If no rule is given.
      TypeError: If an argument is not a rule.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.all_of(stop.patience(1), stop.divergence(1.0)))
      >>> state = stopper.init()
      >>> for loss in [0.5, 0.6, 1.5]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    return _combine("all_of", jnp.all, rules)


def _combine(
    name: str, join: Callable[[jax.Array], jax.Array], rules: tuple[StopRule, ...]
) -> StopRule:
    if not rules:
        raise ValueError(f"`{name}` needs at least one rule.")
    only = rules[0] if len(rules) == 1 else None
    # A rule is a tuple as well.
    if isinstance(only, Iterable) and not isinstance(only, StopRule):
        raise TypeError(
            f"`{name}` takes rules one by one, got a {type(only).__name__}. Write "
            f"`stop.{name}(*rules)`."
        )
    for rule in rules:
        check_rule(rule, name)

    def init() -> tuple[Any, ...]:
        return tuple(rule.init() for rule in rules)

    def update(
        observation: Observation, state: tuple[Any, ...]
    ) -> tuple[Verdict, tuple[Any, ...]]:
        pairs = [
            rule.update(observation, child)
            for rule, child in zip(rules, state, strict=True)
        ]
        verdicts = [verdict for verdict, _ in pairs]
        fired = jnp.stack([verdict.fired for verdict in verdicts])
        reasons = jnp.stack([verdict.reason for verdict in verdicts])
        order = jnp.where(fired, _rank_reasons(reasons), _LAST_RANK)
        reason = reasons[jnp.argmin(order)]
        counted = [v.significant for v in verdicts if v.significant is not None]
        significant = jnp.any(jnp.stack(counted)) if counted else None
        return Verdict(join(fired), reason, significant), tuple(s for _, s in pairs)

    return StopRule(
        init,
        update,
        frozenset().union(*(rule.needs for rule in rules)),
        frozenset().union(*(rule.keys for rule in rules)),
    )


_LAST_RANK = 4


def _rank_reasons(reasons: jax.Array) -> jax.Array:
    """Ranks reasons: a target first, then divergence, other rules, and a budget."""
    first = {StopReason.TARGET: 0, StopReason.DIVERGED: 1, StopReason.BUDGET: 3}
    rank = jnp.full_like(reasons, 2)
    for reason, place in first.items():
        rank = jnp.where(reasons == int(reason), place, rank)
    return rank


class HeldForState(NamedTuple):
    """State of `held_for`.

    Attributes:
      child_state: State of the rule.
      held_count: Evaluations in a row at which it was true, int32, shape (); 0 at
        first.
    """

    child_state: Any
    held_count: jax.Array


@answers_wrong_calls
def held_for(rule: StopRule, n: ArrayLike) -> StopRule:
    """Fires when a rule has been true at ``n`` evaluations in a row.

    An evaluation whose value is not valid neither adds to the row nor breaks it,
    unless the rule fires at it.

    Args:
      rule: The rule to hold.
      n: Evaluations in a row; at least 1, may be traced.

    Returns:
      A rule whose state is a `HeldForState`.

    Raises:
      ValueError: If ``n`` is concrete and below 1.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.held_for(stop.target(0.1), 2))
      >>> state = stopper.init()
      >>> for loss in [0.05, 0.2, 0.08, 0.07]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 3)
    """
    check_rule(rule, "held_for")
    check_count("n", n)

    def init() -> HeldForState:
        return HeldForState(rule.init(), jnp.asarray(0, jnp.int32))

    def update(
        observation: Observation, state: HeldForState
    ) -> tuple[Verdict, HeldForState]:
        verdict, child = rule.update(observation, state.child_state)
        broken = jnp.where(observation.valid, 0, state.held_count)
        count = increment(state.held_count)
        count = jnp.where(verdict.fired, count, broken)
        fired = verdict.fired & (count >= as_int(n))
        return verdict._replace(fired=fired), HeldForState(child, count)

    return rule._replace(init=init, update=update)


class CooldownState(NamedTuple):
    """State of `cooldown`.

    Attributes:
      child_state: State of the rule.
      rest_count: Evaluations for which the rule still rests, int32, shape (); 0 at
        first.
    """

    child_state: Any
    rest_count: jax.Array


@answers_wrong_calls
def cooldown(rule: StopRule, n: ArrayLike) -> StopRule:
    """Lets a rule rest for ``n`` evaluations after it fired, then start afresh.

    It serves inside `all_of`, where a rule may fire without ending the run.

    Args:
      rule: The rule that rests.
      n: Evaluations of rest; not negative, may be traced.

    Returns:
      A rule whose state is a `CooldownState`.

    Raises:
      ValueError: If ``n`` is concrete and negative.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stall = stop.cooldown(stop.patience(1), 2)
      >>> stopper = early_stopping(stop.all_of(stall, stop.divergence(1.0)))
      >>> state = stopper.init()
      >>> for loss in [0.5, 0.6, 1.5, 1.6]:  # stalls below 1.0, and then rests
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop)
      False
    """
    check_rule(rule, "cooldown")
    check_count("n", n, least=0)

    def init() -> CooldownState:
        return CooldownState(rule.init(), jnp.asarray(0, jnp.int32))

    def update(
        observation: Observation, state: CooldownState
    ) -> tuple[Verdict, CooldownState]:
        rests = state.rest_count > 0
        verdict, child = rule.update(observation, state.child_state)
        fired = verdict.fired & ~rests
        child = jax.tree.map(
            lambda fresh, new: jnp.where(rests | fired, fresh, new), rule.init(), child
        )
        left = state.rest_count - (rests & observation.counts).astype(jnp.int32)
        left = jnp.where(fired, as_int(n), left)
        return verdict._replace(fired=fired), CooldownState(child, left)

    return rule._replace(init=init, update=update)


@answers_wrong_calls
def monitor(key: str, rule: StopRule, mode: str = "min") -> StopRule:
    """Lets a rule judge another value of a dict.

    `early_stopping` still takes the best from its own ``key``. A non-finite value
    under this key is not judged; it counts as a bad evaluation if ``nonfinite`` is
    "wait".

    Args:
      key: Key of the value in the dict given to `update`.
      rule: The rule that judges it.
      mode: "min" if smaller is better for this value, "max" if larger is.

    Returns:
      A rule with the state of ``rule``.

    Raises:
      ValueError: If ``mode`` is unknown.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> rule = stop.monitor("accuracy", stop.target(0.9), mode="max")
      >>> stopper = early_stopping(rule, key="loss")
      >>> state = stopper.update({"loss": 0.4, "accuracy": 0.95}, stopper.init())
      >>> bool(state.should_stop), float(state.best_value)
      (True, 0.4)
    """
    check_kind("key", key, str, "a string")
    check_rule(rule, "monitor")
    sign = sign_of(mode)

    def update(observation: Observation, state: Any) -> tuple[Verdict, Any]:
        value = sign * observation.metrics[key]
        finite = jnp.isfinite(value)
        judged = observation._replace(
            value=value,
            raw=value,
            valid=finite & observation.visible,
            counts=(finite | observation.bad_counts) & observation.visible,
            sign=sign,
        )
        return rule.update(judged, state)

    return rule._replace(update=update, keys=rule.keys | {key})
