"""Rules on the age of a run: budget, and the wait before a rule may fire."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_positive
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    check_rule,
    no_state,
    verdict_for,
)


@answers_wrong_calls
def budget(
    *,
    evaluations: ArrayLike | None = None,
    steps: ArrayLike | None = None,
    seconds: ArrayLike | None = None,
) -> StopRule:
    """Stops when a total of evaluations, steps or seconds of training is spent.

    The totals belong to the run: a restart from a checkpoint and
    ``reset(keep_best=True)`` go on counting. Time in which nothing ran does
    not count, because `update` is told the seconds since the update before. Non-finite
    values spend the budget too.

    Args:
      evaluations: Fires at this evaluation, counted from 1; at least 1.
      steps: Fires when ``step`` is at least this; `update` then needs ``step=``.
      seconds: Fires when this much training time has been used, right to a part in 10
        million however short the updates are; `update` then needs ``seconds=``.

    Returns:
      A rule without state, true when any of the given limits is reached.

    Raises:
      ValueError: If a concrete limit is out of range, or none is given.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.budget(evaluations=3))
      >>> state = stopper.init()
      >>> for loss in [2.0, 1.0, 0.5]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    if evaluations is None and steps is None and seconds is None:
        raise ValueError(
            "`budget` needs at least one of `evaluations`, `steps` and `seconds`."
        )
    check_limits("evaluations", evaluations, steps, seconds)

    def update(observation: Observation, state: tuple[()]) -> tuple[Verdict, tuple[()]]:
        return verdict_for(
            any_reached(observation, evaluations, steps, seconds), StopReason.BUDGET
        ), state

    return StopRule(no_state, update, clock_needs(steps, seconds))


@answers_wrong_calls
def not_before(
    rule: StopRule,
    evaluations: ArrayLike | None = None,
    *,
    steps: ArrayLike | None = None,
    seconds: ArrayLike | None = None,
) -> StopRule:
    """Holds back a rule's verdict until the run is old enough.

    The rule sees every evaluation, and is judged anew at each: a stall that is over
    when the time comes does not stop the run.

    Args:
      rule: The rule to hold back.
      evaluations: First evaluation, counted from 1, at which it may fire.
      steps: First step at which it may fire; `update` then needs ``step=``.
      seconds: Seconds of training before which it may not fire; `update` then needs
        ``seconds=``. Give exactly one of the three.

    Returns:
      A rule with the state of ``rule``.

    Raises:
      ValueError: If a concrete number is out of range, or not exactly one is given.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.not_before(stop.patience(1), 4))
      >>> state = stopper.init()
      >>> for loss in [0.5, 0.6, 0.7, 0.8]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 3)
    """
    check_rule(rule, "not_before")
    if sum(limit is not None for limit in (evaluations, steps, seconds)) != 1:
        raise ValueError(
            "`not_before` takes exactly one of `evaluations`, `steps` and `seconds`."
        )
    check_limits("evaluations", evaluations, steps, seconds)

    def update(observation: Observation, state: Any) -> tuple[Verdict, Any]:
        verdict, state = rule.update(observation, state)
        fired = verdict.fired & any_reached(observation, evaluations, steps, seconds)
        return verdict._replace(fired=fired), state

    return rule._replace(update=update, needs=rule.needs | clock_needs(steps, seconds))


def any_reached(
    observation: Observation,
    evaluations: ArrayLike | None,
    steps: ArrayLike | None,
    seconds: ArrayLike | None,
) -> jax.Array:
    """Says whether any of the given totals is reached, bool, shape ()."""
    clocks = [
        (observation.num_evals, evaluations),
        (observation.step, steps),
        (observation.seconds, seconds),
    ]
    spent = jnp.asarray(False)
    for clock, limit in clocks:
        if clock is not None and limit is not None:
            spent |= clock >= jnp.asarray(limit, clock.dtype)
    return spent


def check_limits(
    name: str,
    evaluations: ArrayLike | None,
    steps: ArrayLike | None,
    seconds: ArrayLike | None,
) -> None:
    """Refuses concrete limits that are out of range; ``name`` is that of the first."""
    if evaluations is not None:
        check_count(name, evaluations)
    if steps is not None:
        check_count("steps", steps)
    if seconds is not None:
        check_positive("seconds", seconds)


def clock_needs(steps: object, seconds: object) -> frozenset[str]:
    """Names the arguments of `update` that limits in steps and seconds need."""
    wanted = {"step": steps, "seconds": seconds}
    return frozenset(name for name, limit in wanted.items() if limit is not None)
