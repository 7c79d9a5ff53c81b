"""Rules on how good or how bad the value is: target and divergence."""

from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_not_nan
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_float,
    no_state,
    verdict_for,
)


@answers_wrong_calls
def target(value: ArrayLike, *, strict: bool = False) -> StopRule:
    """Stops when the value is as good as asked.

    The rule judges the raw value, after the best has been updated with it. For a target
    that must be held, wrap the rule in `held_for`.

    Args:
      value: Value to reach, in the user's sign; may be traced.
      strict: Whether the value must be better than the target, not just equal.

    Returns:
      A rule without state.

    Raises:
      ValueError: If it is concrete and NaN.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.target(0.1))
      >>> state = stopper.init()
      >>> for loss in [0.5, 0.2, 0.09, 0.05]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    check_not_nan("value", value)
    check_flag("strict", strict)

    def update(observation: Observation, state: tuple[()]) -> tuple[Verdict, tuple[()]]:
        y, goal = observation.raw, observation.sign * as_float(value)
        reached = (y < goal) if strict else (y <= goal)
        return verdict_for(observation.valid & reached, StopReason.TARGET), state

    return StopRule(no_state, update)


@answers_wrong_calls
def divergence(threshold: ArrayLike) -> StopRule:
    """Stops when the value is worse than a threshold.

    The rule judges the raw value: smoothing would hide a run that has blown up.

    Args:
      threshold: Worst value to tolerate, in the user's sign; may be traced.

    Returns:
      A rule without state.

    Raises:
      ValueError: If it is concrete and NaN.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.divergence(10.0))
      >>> state = stopper.init()
      >>> for loss in [2.0, 9.0, 30.0]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    check_not_nan("threshold", threshold)

    def update(observation: Observation, state: tuple[()]) -> tuple[Verdict, tuple[()]]:
        worse = observation.raw > observation.sign * as_float(threshold)
        return verdict_for(observation.valid & worse, StopReason.DIVERGED), state

    return StopRule(no_state, update)
