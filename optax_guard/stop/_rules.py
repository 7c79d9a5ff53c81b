"""The basic stop rules: patience, target, divergence, budget."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_count,
    check_flag,
    check_not_nan,
    check_not_negative,
    check_positive,
)
from optax_guard._trees import increment
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_float,
    as_int,
    verdict,
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
        x, ref = observation.value, state.ref_value
        is_first = jnp.isinf(ref)
        known = jnp.where(is_first, 0.0, ref)
        margin = as_float(min_delta) + as_float(rel_delta) * jnp.abs(known)
        improved = observation.valid & (is_first | (x < known - margin))
        moved = improved if cumulative else observation.valid & (x < ref)
        significant = improved
        if baseline is not None:
            significant &= x < observation.sign * as_float(baseline)
        bad_count = jnp.where(
            significant,
            0,
            jnp.where(
                observation.counts,
                increment(state.bad_count, True),
                state.bad_count,
            ),
        )
        clock = observation.step if seconds is None else observation.seconds
        mark = state.ref_mark
        if n is None:
            assert clock is not None  # `needs` has been checked
            # The wait before the first improvement is measured from the first
            # evaluation that counts.
            starts = significant | (observation.counts & (mark < 0))
            mark = jnp.where(starts, clock, mark)
            limit = steps if seconds is None else seconds
            stalled = clock - mark >= jnp.asarray(limit, mark.dtype)
        else:
            stalled = bad_count >= as_int(n)
        fired = observation.counts & ~significant & stalled
        new_state = PatienceState(jnp.where(moved, x, ref), mark, bad_count)
        return verdict(fired, StopReason.PATIENCE, significant), new_state

    return StopRule(init, update, clock_needs(steps, seconds))


def _stateless() -> tuple[()]:
    return ()


def target(value: ArrayLike, *, strict: bool = False) -> StopRule:
    """Stops when the value is as good as asked.

    Judged on the raw value, after the best has been updated with it. For a target
    that must be held, wrap the rule in `held_for`.

    Args:
      value: Value to reach, in the user's sign; may be traced.
      strict: Whether the value must be better than the target, not just equal.

    Returns:
      A rule without state.

    Raises:
      ValueError: If it is a Python number and NaN.

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
        return verdict(observation.valid & reached, StopReason.TARGET), state

    return StopRule(_stateless, update)


def divergence(threshold: ArrayLike) -> StopRule:
    """Stops when the value is worse than a threshold.

    Judged on the raw value: a run that has blown up should not be smoothed over.

    Args:
      threshold: Worst value to tolerate, in the user's sign; may be traced.

    Returns:
      A rule without state.

    Raises:
      ValueError: If it is a Python number and NaN.

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
        return verdict(observation.valid & worse, StopReason.DIVERGED), state

    return StopRule(_stateless, update)


def budget(
    *,
    evaluations: ArrayLike | None = None,
    steps: ArrayLike | None = None,
    seconds: ArrayLike | None = None,
) -> StopRule:
    """Stops when a total of evaluations, steps or seconds of training is spent.

    The totals belong to the run: a restart from a checkpoint and
    ``reset(keep_best=True)`` go on counting. Time in which nothing ran is not
    counted, because `update` is told the seconds since the update before. Non-finite
    values spend the budget too.

    Args:
      evaluations: Fires at this evaluation, counted from 1; at least 1.
      steps: Fires when ``step`` is at least this; `update` then needs ``step=``.
      seconds: Fires when this much training time has been used; `update` then needs
        ``seconds=``.

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
        return verdict(
            reached(observation, evaluations, steps, seconds), StopReason.BUDGET
        ), state

    return StopRule(_stateless, update, clock_needs(steps, seconds))


def reached(
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


class SkipStormState(NamedTuple):
    """State of `skip_storm`.

    Attributes:
      seen_skipped: Steps skipped up to the last evaluation, int32, shape (); -1
        before the first.
    """

    seen_skipped: jax.Array


def skip_storm(n: ArrayLike) -> StopRule:
    """Stops when the guard skips many steps instead of training.

    Fires when the guard is exhausted, when its present streak of skipped steps is
    at least ``n``, or when at least ``n`` were skipped since the last evaluation.
    Several guards in one state are added up. `update` needs ``opt_state=``.

    Args:
      n: Skipped steps that are too many; at least 1, may be traced.

    Returns:
      A rule whose state is a `SkipStormState`.

    Raises:
      ValueError: If ``n`` is a Python number below 1, or, at `update`, if
        ``opt_state`` holds no guard.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx, params = og.guard(optax.sgd(0.1)), jnp.ones(1)
      >>> _, opt_state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
      >>> stopper = og.early_stopping(og.stop.skip_storm(1))
      >>> state = stopper.update(0.5, stopper.init(), opt_state=opt_state)
      >>> bool(state.should_stop)
      True
    """
    check_count("n", n)

    def init() -> SkipStormState:
        return SkipStormState(jnp.asarray(-1, jnp.int32))

    def update(
        observation: Observation, state: SkipStormState
    ) -> tuple[Verdict, SkipStormState]:
        skipped = sum(_guard_field(observation.opt_state, "num_skipped"))
        streaks = _guard_field(observation.opt_state, "skip_streak")
        exhausted = _guard_field(observation.opt_state, "guard_exhausted")
        skipped = jnp.asarray(skipped, jnp.int32)
        # After `reset` the old skips are not held against the run again.
        is_first = state.seen_skipped < 0
        fired = ~is_first & (skipped - state.seen_skipped >= as_int(n))
        for streak, spent in zip(streaks, exhausted, strict=True):
            fired |= (streak >= as_int(n)) | spent
        return verdict(fired, StopReason.SKIP_STORM), SkipStormState(skipped)

    return StopRule(init, update, frozenset({"opt_state"}))


def _guard_field(opt_state: Any, field: str) -> list[jax.Array]:
    found = optax.tree.get_all_with_path(opt_state, field)
    if not found:
        raise ValueError(
            f"`opt_state` holds no guard (no field `{field}`), which `skip_storm` "
            "reads. Wrap the optimizer in `guard` and pass the state it returns."
        )
    return [leaf for _, leaf in found]
