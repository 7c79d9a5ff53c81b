"""Stop rules that compare with some evaluations ago."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_not_negative, static_count
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import increment
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_float,
    as_int,
    train_values,
    verdict_for,
)


class LagState(NamedTuple):
    """State of `lag`.

    Attributes:
      past_values: Last valid values, the newest at the end, float32, shape (k,), with
        the sign that makes smaller better; +inf where there is none yet.
      rise_count: Evaluations in a row that were worse, int32, shape (); 0 at first.
    """

    past_values: jax.Array
    rise_count: jax.Array


@answers_wrong_calls
def lag(k: int, *, s: ArrayLike = 1, min_rise: ArrayLike = 0.0) -> StopRule:
    """Stops when the value is worse than ``k`` evaluations ago: L(t) > L(t - k).

    The textbook rule. It compares two noisy values, so ask for several in a row, for
    a least rise, or smooth.

    Args:
      k: Evaluations to look back; a concrete whole number of at least 1.
      s: Evaluations in a row at which it must hold; at least 1, may be traced.
      min_rise: Rise that must be exceeded, in units of the value; not negative.

    Returns:
      A rule whose state is a `LagState`.

    Raises:
      ValueError: If a concrete number is out of range.
      TypeError: If ``k`` is traced or no number.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.lag(2))
      >>> state = stopper.init()
      >>> for loss in [1.0, 0.8, 0.9, 0.85]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 3)
    """
    k = static_count("k", k)
    check_count("s", s)
    check_not_negative("min_rise", min_rise)

    def init() -> LagState:
        return LagState(jnp.full((k,), jnp.inf, jnp.float32), jnp.asarray(0, jnp.int32))

    def update(observation: Observation, state: LagState) -> tuple[Verdict, LagState]:
        x, valid = observation.value, observation.valid
        # A place not yet filled is +inf, which nothing exceeds.
        rose = x > state.past_values[0] + as_float(min_rise)
        rises = jnp.where(rose, increment(state.rise_count), 0)
        new_state = LagState(
            jnp.where(valid, jnp.append(state.past_values[1:], x), state.past_values),
            jnp.where(valid, rises, state.rise_count),
        )
        fired = valid & (new_state.rise_count >= as_int(s))
        return verdict_for(fired, StopReason.LAG), new_state

    return StopRule(init, update)


class OverfittingState(NamedTuple):
    """State of `overfitting`.

    Attributes:
      past_values: Last valid values, the newest at the end, float32, shape (k,), with
        the sign that makes smaller better; +inf where there is none yet.
      past_train: Training values of the same evaluations, float32, shape (k,), with
        the same sign; +inf where there is none yet.
      rise_count: Evaluations in a row at which the gap grew from both sides, int32,
        shape (); 0 at first.
    """

    past_values: jax.Array
    past_train: jax.Array
    rise_count: jax.Array


@answers_wrong_calls
def overfitting(k: int, *, s: ArrayLike = 1, min_rise: ArrayLike = 0.0) -> StopRule:
    """Stops when training improves while validation gets worse.

    As `lag`, but holds only where the training value is also better than ``k``
    evaluations ago: then the generalization gap grows from both sides, and it is not
    the optimizer that fails. `update` needs ``train_value=``; of several, their mean
    counts. An evaluation where either value is not finite is not judged.

    Args:
      k: Evaluations to look back; a concrete whole number of at least 1.
      s: Evaluations in a row at which it must hold; at least 1, may be traced.
      min_rise: Rise of the value that must be exceeded; not negative.

    Returns:
      A rule whose state is an `OverfittingState`.

    Raises:
      ValueError: If a concrete number is out of range.
      TypeError: If ``k`` is traced or no number.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.overfitting(1))
      >>> state = stopper.init()
      >>> for loss, trained in [(1.0, 0.9), (1.1, 0.7)]:
      ...     state = stopper.update(loss, state, train_value=trained)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 1)
    """
    k = static_count("k", k)
    check_count("s", s)
    check_not_negative("min_rise", min_rise)

    def init() -> OverfittingState:
        return OverfittingState(
            jnp.full((k,), jnp.inf, jnp.float32),
            jnp.full((k,), jnp.inf, jnp.float32),
            jnp.asarray(0, jnp.int32),
        )

    def update(
        observation: Observation, state: OverfittingState
    ) -> tuple[Verdict, OverfittingState]:
        x = observation.value
        trained = observation.sign * jnp.mean(train_values(observation))
        valid = observation.valid & jnp.isfinite(trained)
        rose = x > state.past_values[0] + as_float(min_rise)
        rose &= trained < state.past_train[0]
        rises = jnp.where(rose, increment(state.rise_count), 0)
        new_state = OverfittingState(
            jnp.where(valid, jnp.append(state.past_values[1:], x), state.past_values),
            jnp.where(
                valid, jnp.append(state.past_train[1:], trained), state.past_train
            ),
            jnp.where(valid, rises, state.rise_count),
        )
        fired = valid & (new_state.rise_count >= as_int(s))
        return verdict_for(fired, StopReason.OVERFITTING), new_state

    return StopRule(init, update, frozenset({"train_value"}))
