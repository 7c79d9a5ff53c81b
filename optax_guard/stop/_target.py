"""Rules on how good or how bad the value is: target and divergence."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_above, check_flag, check_not_nan
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._prechelt import GeneralizationLossState
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
def divergence(
    threshold: ArrayLike | None = None, *, ratio: ArrayLike | None = None
) -> StopRule:
    """Stops when the value is worse than a threshold, or by far worse than the best.

    The rule judges the raw value: smoothing would hide a run that has blown up. With
    ``ratio`` it fires when ``y > y_best + (ratio - 1) * abs(y_best)``, y being the
    value and y_best the best so far, both with the sign that makes smaller better. For
    a positive loss that is ``y > ratio * y_best``.

    Args:
      threshold: Worst value to tolerate, in the user's sign; may be traced.
      ratio: In place of a threshold, how many times the best a loss may be; above 1,
        may be traced. The scale of the loss need not be known then, but a best of 0
        tolerates no rise.

    Returns:
      A rule without state, or with ``ratio`` one whose state is a
      `GeneralizationLossState`, which holds the best value.

    Raises:
      ValueError: If ``threshold`` is concrete and NaN, ``ratio`` concrete and not above
        1, or not exactly one of them is given.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.divergence(10.0))
      >>> state = stopper.init()
      >>> for loss in [2.0, 9.0, 30.0]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)
    """
    if (threshold is None) == (ratio is None):
        raise ValueError(
            "`divergence` needs `threshold` or `ratio`, and not both, got "
            f"{threshold!r} and {ratio!r}."
        )
    if ratio is not None:
        return _divergence_from_best(ratio)
    check_not_nan("threshold", threshold)
    limit: Any = threshold

    def update(observation: Observation, state: tuple[()]) -> tuple[Verdict, tuple[()]]:
        worse = observation.raw > observation.sign * as_float(limit)
        return verdict_for(observation.valid & worse, StopReason.DIVERGED), state

    return StopRule(no_state, update)


def _divergence_from_best(ratio: ArrayLike) -> StopRule:
    check_above("ratio", ratio, 1.0, "It is how many times the best a loss may be.")

    def init() -> GeneralizationLossState:
        return GeneralizationLossState(jnp.asarray(jnp.inf, jnp.float32))

    def update(
        observation: Observation, state: GeneralizationLossState
    ) -> tuple[Verdict, GeneralizationLossState]:
        y, best = observation.raw, state.opt_value
        # Before the first value the limit is infinite.
        worse = y > best + (as_float(ratio) - 1.0) * jnp.abs(best)
        best = jnp.where(observation.valid & (y < best), y, best)
        fired = observation.valid & worse
        return verdict_for(fired, StopReason.DIVERGED), GeneralizationLossState(best)

    return StopRule(init, update)
