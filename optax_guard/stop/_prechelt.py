"""Prechelt's stop rules: GL, PQ and UP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_positive, static_count
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


class GeneralizationLossState(NamedTuple):
    """State of `generalization_loss`.

    Attributes:
      opt_value: Best valid value so far, float32, shape (), with the sign that makes
        smaller better; +inf before the first.
    """

    opt_value: jax.Array


def _loss_in_percent(
    observation: Observation, opt_value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns Prechelt's GL with this value, and the best with it."""
    x = observation.value
    opt_value = jnp.where(observation.valid, jnp.minimum(opt_value, x), opt_value)
    rise = jnp.where(observation.valid, x - opt_value, 0.0)
    share = rise / jnp.where(opt_value == 0, 1.0, jnp.abs(opt_value))
    share = jnp.where((opt_value == 0) & (rise > 0), jnp.inf, share)
    return 100.0 * share, opt_value


@answers_wrong_calls
def generalization_loss(alpha: ArrayLike) -> StopRule:
    """Stops when the value is more than ``alpha`` percent above its best.

    Prechelt's GL: fires when ``100 * (E - E_opt) / abs(E_opt) > alpha``, with E the
    value and E_opt the best so far. If E_opt is 0, any rise is infinite.

    Args:
      alpha: Rise to tolerate, in percent; positive, may be traced.

    Returns:
      A rule whose state is a `GeneralizationLossState`.

    Raises:
      ValueError: If ``alpha`` is concrete and not positive.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.generalization_loss(5.0))
      >>> state = stopper.init()
      >>> for loss in [1.0, 1.04, 1.06]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)

    References:
      Prechelt, `Early stopping - but when?
      <https://doi.org/10.1007/3-540-49430-8_3>`_, 1998
    """
    check_positive("alpha", alpha)

    def init() -> GeneralizationLossState:
        return GeneralizationLossState(jnp.asarray(jnp.inf, jnp.float32))

    def update(
        observation: Observation, state: GeneralizationLossState
    ) -> tuple[Verdict, GeneralizationLossState]:
        percent, opt_value = _loss_in_percent(observation, state.opt_value)
        fired = observation.valid & (percent > as_float(alpha))
        return (
            verdict_for(fired, StopReason.GENERALIZATION_LOSS),
            GeneralizationLossState(opt_value),
        )

    return StopRule(init, update)


class ProgressQuotientState(NamedTuple):
    """State of `progress_quotient`.

    Attributes:
      opt_value: Best valid value so far, float32, shape (), with the sign that makes
        smaller better; +inf before the first.
      train_values: Last finite training values, the newest at the end, float32, shape
        (k,), with the same sign; +inf where there is none yet.
    """

    opt_value: jax.Array
    train_values: jax.Array


@answers_wrong_calls
def progress_quotient(alpha: ArrayLike, k: int) -> StopRule:
    """Stops when the value rises while training hardly progresses.

    Prechelt's PQ: fires when ``GL / P > alpha``. GL is that of `generalization_loss`;
    ``P = 1000 * (mean - min) / abs(min)`` over the last k training values, so it is
    large while they still move. Judged once there are k; `update` needs
    ``train_value=``: one training value, or all since the last evaluation.

    Args:
      alpha: Quotient to tolerate; positive, may be traced.
      k: Training values in a strip; a concrete whole number of at least 1.

    Returns:
      A rule whose state is a `ProgressQuotientState`.

    Raises:
      ValueError: If ``alpha`` is concrete and not positive, or ``k`` below 1.
      TypeError: If ``k`` is traced or no number.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.progress_quotient(1.0, k=2))
      >>> state = stopper.init()
      >>> for loss, trained in [(1.0, [0.9, 0.8]), (1.2, [0.8, 0.79])]:
      ...     state = stopper.update(loss, state, train_value=trained)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 1)

    References:
      Prechelt, `Early stopping - but when?
      <https://doi.org/10.1007/3-540-49430-8_3>`_, 1998
    """
    check_positive("alpha", alpha)
    k = static_count("k", k)

    def init() -> ProgressQuotientState:
        return ProgressQuotientState(
            jnp.asarray(jnp.inf, jnp.float32), jnp.full((k,), jnp.inf, jnp.float32)
        )

    def update(
        observation: Observation, state: ProgressQuotientState
    ) -> tuple[Verdict, ProgressQuotientState]:
        percent, opt_value = _loss_in_percent(observation, state.opt_value)
        trained = observation.sign * train_values(observation)
        pool = jnp.concatenate([state.train_values, trained])
        # Finite ones last, in their order: the newest k of them are the strip.
        finite = jnp.isfinite(pool)
        strip = pool[jnp.argsort(finite, stable=True)][-k:]
        strip = jnp.where(jnp.isfinite(strip), strip, jnp.inf)
        strip = jnp.where(observation.visible, strip, state.train_values)
        is_full = jnp.all(jnp.isfinite(strip))
        known = jnp.where(is_full, strip, 0.0)
        least = jnp.min(known)
        # As a product, so that a standstill needs no division by zero.
        progress = 1000.0 * jnp.mean(known - least)
        exceeds = percent * jnp.abs(least) > as_float(alpha) * progress
        fired = observation.valid & is_full & (percent > 0) & exceeds
        return (
            verdict_for(fired, StopReason.PROGRESS_QUOTIENT),
            ProgressQuotientState(opt_value, strip),
        )

    return StopRule(init, update, frozenset({"train_value"}))


class SuccessiveRisesState(NamedTuple):
    """State of `successive_rises`.

    Attributes:
      strip_age: Valid evaluations in the present strip, int32, shape (); 0 at first.
      strip_value: Value at the end of the last strip, float32, shape (), with the
        sign that makes smaller better; +inf before the first.
      rise_count: Strips in a row that ended higher, int32, shape (); 0 at first.
    """

    strip_age: jax.Array
    strip_value: jax.Array
    rise_count: jax.Array


@answers_wrong_calls
def successive_rises(s: ArrayLike, k: int = 5) -> StopRule:
    """Stops when the value rose in ``s`` strips of ``k`` evaluations in a row.

    Prechelt's UP: a strip has risen if the value at its end is above the value at the
    end of the strip before. Only the number of rises counts, not their size.

    Args:
      s: Strips in a row; at least 1, may be traced.
      k: Evaluations in a strip; at least 1, may be traced.

    Returns:
      A rule whose state is a `SuccessiveRisesState`. Between ends of strips it stays
      as true as it was.

    Raises:
      ValueError: If ``s`` or ``k`` is concrete and below 1.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.successive_rises(2, k=1))
      >>> state = stopper.init()
      >>> for loss in [1.0, 1.1, 1.2]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.stopped_at)
      (True, 2)

    References:
      Prechelt, `Early stopping - but when?
      <https://doi.org/10.1007/3-540-49430-8_3>`_, 1998
    """
    check_count("s", s)
    check_count("k", k)

    def init() -> SuccessiveRisesState:
        return SuccessiveRisesState(
            jnp.asarray(0, jnp.int32),
            jnp.asarray(jnp.inf, jnp.float32),
            jnp.asarray(0, jnp.int32),
        )

    def update(
        observation: Observation, state: SuccessiveRisesState
    ) -> tuple[Verdict, SuccessiveRisesState]:
        age = state.strip_age + observation.valid.astype(jnp.int32)
        ends = observation.valid & (age >= as_int(k))
        rose = observation.value > state.strip_value
        rises = jnp.where(rose, increment(state.rise_count), 0)
        new_state = SuccessiveRisesState(
            jnp.where(ends, 0, age),
            jnp.where(ends, observation.value, state.strip_value),
            jnp.where(ends, rises, state.rise_count),
        )
        fired = observation.valid & (new_state.rise_count >= as_int(s))
        return verdict_for(fired, StopReason.SUCCESSIVE_RISES), new_state

    return StopRule(init, update)
