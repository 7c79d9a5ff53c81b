"""Patience: how long a run may go on without an improvement."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_not_nan, check_not_negative
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import increment
from optax_guard.stop._clocks import check_limits, clock_needs
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_float,
    as_int,
    verdict_for,
)


class PatienceState(NamedTuple):
    """State of `patience`.

    Attributes:
      ref_value: Value that must be improved on, float32, shape (), with the sign that
        makes smaller better; +inf before the first valid value.
      ref_mark: Steps (int32) or seconds (float32) at the last improvement that
        counts, shape (); -1 before the first evaluation. Unused for evaluations.
      bad_count: Evaluations since the last improvement that counts, int32, shape ();
        0 at first.
    """

    ref_value: jax.Array
    ref_mark: jax.Array
    bad_count: jax.Array


@answers_wrong_calls
def patience(
    n: ArrayLike | None = None,
    *,
    min_delta: ArrayLike = 0.0,
    rel_delta: ArrayLike = 0.0,
    steps: ArrayLike | None = None,
    seconds: ArrayLike | None = None,
    cumulative: bool = True,
    baseline: ArrayLike | None = None,
) -> StopRule:
    """Stops when the value has not improved for a while.

    With y the value to minimize, an improvement counts if
    ``y < ref - (min_delta + rel_delta * abs(ref))``; the first finite value always
    does. Fires at the n-th evaluation in a row without one, as Keras and Lightning
    do; Flax's own class stops one evaluation later.

    Args:
      n: Evaluations without an improvement that counts; at least 1, may be traced.
        Give exactly one of ``n``, ``steps`` and ``seconds``.
      min_delta: Least improvement that counts, in units of the value.
      rel_delta: Least improvement that counts, as a share of ``abs(ref)``.
      steps: Patience in training steps; `update` then needs ``step=``.
      seconds: Patience in seconds of training; `update` then needs ``seconds=``.
      cumulative: Whether improvements too small to count add up until they do (the
        reference stays). If False, the reference follows every improvement.
      baseline: Value that must also be beaten for an improvement to count, in the
        user's sign.

    Returns:
      A rule whose state is a `PatienceState`.

    Raises:
      ValueError: If a concrete number is out of range, or not exactly one of ``n``,
        ``steps`` and ``seconds`` is given.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.patience(2))
      >>> state = stopper.init()
      >>> for loss in [3.0, 2.0, 2.0, 2.5]:
      ...     state = stopper.update(loss, state)
      >>> bool(state.should_stop), int(state.best_eval)
      (True, 1)
    """
    limits = {"n": n, "steps": steps, "seconds": seconds}
    given = [name for name, limit in limits.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(
            "`patience` takes exactly one of `n` (evaluations), `steps` and `seconds`, "
            f"got {given or 'none'}. Combine several with `any_of`."
        )
    check_limits("n", n, steps, seconds)
    check_not_negative("min_delta", min_delta)
    check_not_negative("rel_delta", rel_delta)
    check_flag("cumulative", cumulative)
    if baseline is not None:
        check_not_nan("baseline", baseline)
    config = _Config(n, min_delta, rel_delta, steps, seconds, cumulative, baseline)

    def init() -> PatienceState:
        mark_dtype = jnp.int32 if seconds is None else jnp.float32
        return PatienceState(
            ref_value=jnp.asarray(jnp.inf, jnp.float32),
            ref_mark=jnp.asarray(-1, mark_dtype),
            bad_count=jnp.asarray(0, jnp.int32),
        )

    def update(
        observation: Observation, state: PatienceState
    ) -> tuple[Verdict, PatienceState]:
        return _judge_patience(config, observation, state)

    return StopRule(init, update, clock_needs(steps, seconds))


class _Config(NamedTuple):
    """The arguments of `patience`; its numbers may be traced."""

    n: ArrayLike | None
    min_delta: ArrayLike
    rel_delta: ArrayLike
    steps: ArrayLike | None
    seconds: ArrayLike | None
    cumulative: bool
    baseline: ArrayLike | None


def _judge_patience(
    config: _Config, observation: Observation, state: PatienceState
) -> tuple[Verdict, PatienceState]:
    x, ref = observation.value, state.ref_value
    is_first = jnp.isinf(ref)
    known = jnp.where(is_first, 0.0, ref)
    margin = as_float(config.min_delta) + as_float(config.rel_delta) * jnp.abs(known)
    improved = observation.valid & (is_first | (x < known - margin))
    moved = improved if config.cumulative else observation.valid & (x < ref)
    significant = improved
    if config.baseline is not None:
        significant &= x < observation.sign * as_float(config.baseline)
    bad_count = jnp.where(
        significant,
        0,
        jnp.where(observation.counts, increment(state.bad_count), state.bad_count),
    )
    mark = state.ref_mark
    if config.n is None:
        mark, stalled = _time_stall(config, observation, significant, mark)
    else:
        stalled = bad_count >= as_int(config.n)
    fired = observation.counts & ~significant & stalled
    new_state = PatienceState(jnp.where(moved, x, ref), mark, bad_count)
    return verdict_for(fired, StopReason.PATIENCE, significant), new_state


def _time_stall(
    config: _Config, observation: Observation, significant: jax.Array, mark: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moves the mark to an improvement, and says whether the wait since is over."""
    by_steps = config.seconds is None
    clock = observation.step if by_steps else observation.seconds
    limit = config.steps if by_steps else config.seconds
    assert clock is not None  # `needs` has been checked.
    assert limit is not None
    # The wait before the first improvement is measured from the first evaluation that
    # counts.
    starts = significant | (observation.counts & (mark < 0))
    mark = jnp.where(starts, clock, mark)
    return mark, clock - mark >= jnp.asarray(limit, mark.dtype)
