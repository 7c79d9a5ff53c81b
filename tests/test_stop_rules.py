"""Stop rules and their combinators, one by one and against a plain-Python oracle."""

import itertools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optax_guard import stop
from optax_guard._rows import replace_entries
from optax_guard.stop._rule import StopReason
from optax_guard.stop._stopper import early_stopping

NAN, INF = math.nan, math.inf

# The same functions to a type checker that lets wrong arguments through.
loose: Any = stop


def run(rule, values, *, extras=None, **options):
    """Feeds values to a stopper of the rule, not compiled; returns the states."""
    stopper = early_stopping(rule, **options)
    state, states = stopper.init(), []
    with jax.disable_jit():
        for i, value in enumerate(values):
            extra = {} if extras is None else {k: v[i] for k, v in extras.items()}
            state = stopper.update(value, state, **extra)
            states.append(state)
    return states


def stop_of(*args, **kwargs):
    """Returns the evaluation of the stop and its reason, or None."""
    state = run(*args, **kwargs)[-1]
    if not state.should_stop:
        return None
    return int(state.stopped_at), StopReason(int(state.stop_reason))


# Patience ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_patience_stops_a_constant_at_the_nth_evaluation_after_the_first(n):
    assert stop_of(stop.patience(n), [1.0] * 8) == (n, StopReason.PATIENCE)


def test_a_tie_is_no_improvement():
    assert stop_of(stop.patience(2), [2.0, 1.0, 1.0, 1.0, 0.5]) == (
        3,
        StopReason.PATIENCE,
    )


def test_improvement_equal_to_min_delta_does_not_count():
    assert stop_of(stop.patience(1, min_delta=0.5), [2.0, 1.5]) is not None
    assert stop_of(stop.patience(1, min_delta=0.5), [2.0, 1.25]) is None


@pytest.mark.parametrize(
    ("mode", "better", "worse"),
    [("min", -1.5, -1.125), ("max", -0.5, -0.875)],
)
def test_relative_delta_is_right_for_negative_values(mode, better, worse):
    rule = stop.patience(1, rel_delta=0.25)
    assert stop_of(rule, [-1.0, better], mode=mode) is None
    assert stop_of(rule, [-1.0, worse], mode=mode) is not None


def test_small_gains_add_up_only_if_cumulative():
    gains = [4.0, 3.75, 3.5, 3.25, 3.0]
    assert stop_of(stop.patience(3, min_delta=0.5), gains) is None
    last_event = stop.patience(3, min_delta=0.5, cumulative=False)
    assert stop_of(last_event, gains) == (3, StopReason.PATIENCE)
    best_not_last = stop.patience(2, cumulative=False)
    assert stop_of(best_not_last, [3.0, 5.0, 4.0]) == (2, StopReason.PATIENCE)


def test_best_moves_with_gains_too_small_to_count():
    states = run(stop.patience(3, min_delta=1.0), [4.0, 3.5, 3.25])
    assert [bool(s.is_best) for s in states] == [True, True, True]
    assert [bool(s.is_significant) for s in states] == [True, False, False]
    assert float(optax.tree.get(states[-1], "ref_value")) == 4.0
    assert int(optax.tree.get(states[-1], "bad_count")) == 2


def test_patience_in_steps_is_measured_from_the_last_improvement():
    steps = [10, 20, 30, 40, 50, 60]
    values = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    rule = stop.patience(steps=30)
    assert stop_of(rule, values, extras={"step": steps}) == (4, StopReason.PATIENCE)
    from_zero = {"step": [0, 15, 30, 45]}
    assert stop_of(rule, [1.0] * 4, extras=from_zero) == (2, StopReason.PATIENCE)


def test_patience_in_seconds_adds_up_the_seconds_between_updates():
    seconds = [1.0, 1.0, 0.5, 0.5, 1.0]
    rule = stop.patience(seconds=2.0)
    extras = {"seconds": seconds}
    stopped = stop_of(rule, [1.0, 1.0, 1.0, 1.0, 1.0], extras=extras)
    assert stopped == (3, StopReason.PATIENCE)


def test_patience_in_steps_runs_out_without_any_finite_value():
    extras = {"step": [10, 20, 30, 40]}
    stopped = stop_of(
        stop.patience(steps=20), [NAN] * 4, extras=extras, nonfinite="wait"
    )
    assert stopped == (2, StopReason.PATIENCE)


def test_a_baseline_must_be_beaten_within_the_patience():
    rule = stop.patience(3, baseline=1.0)
    assert stop_of(rule, [4.0, 3.0, 2.0, 1.5]) == (2, StopReason.PATIENCE)
    assert stop_of(rule, [4.0, 3.0, 0.5, 1.5, 1.5]) is None
    assert stop_of(rule, [0.0, 0.5, 2.0, 3.0], mode="max") is None
    assert stop_of(stop.patience(2, baseline=4.0), [3.0, 2.0, 3.0]) is None
    # To reach it is not to beat it.
    assert stop_of(rule, [4.0, 3.0, 1.0]) == (2, StopReason.PATIENCE)


@pytest.mark.parametrize("cut", range(1, 6))
def test_first_value_however_large_is_an_improvement(cut):
    values = [3e38, *[2e38] * cut]
    assert stop_of(stop.patience(6, rel_delta=0.9), values) is None
    states = run(stop.patience(6, rel_delta=0.9), values)
    assert states[0].is_significant
    assert not states[1].is_significant


# Limits --------------------------------------------------------------------------


def test_target_includes_equality_unless_strict():
    assert stop_of(stop.target(0.5), [1.0, 0.5]) == (1, StopReason.TARGET)
    assert stop_of(stop.target(0.5, strict=True), [1.0, 0.5]) is None
    assert stop_of(stop.target(0.5), [0.25, 0.5], mode="max") == (1, StopReason.TARGET)


def test_the_value_that_reaches_the_target_is_the_best():
    state = run(stop.target(0.5), [1.0, 0.25])[-1]
    assert float(state.best_value) == 0.25
    assert int(state.best_eval) == 1


def test_divergence_is_strict_and_follows_the_mode():
    assert stop_of(stop.divergence(2.0), [1.0, 2.0]) is None
    assert stop_of(stop.divergence(2.0), [1.0, 2.5]) == (1, StopReason.DIVERGED)
    assert stop_of(stop.divergence(0.5), [1.0, 0.25], mode="max") == (
        1,
        StopReason.DIVERGED,
    )


def test_relative_divergence_is_a_multiple_of_the_best_before():
    three = stop.divergence(ratio=3.0)
    # The first value has nothing before it, and the best falls.
    assert stop_of(three, [9.0, 2.0, 6.0, 6.5]) == (3, StopReason.DIVERGED)
    # Twice its magnitude above a best of -2.
    assert stop_of(three, [-1.0, -2.0, 2.0]) is None
    assert stop_of(three, [-1.0, -2.0, 2.5]) == (2, StopReason.DIVERGED)
    # For an accuracy, half of the best.
    half = stop.divergence(ratio=1.5)
    assert stop_of(half, [0.5, 0.75, 0.375], mode="max") is None
    assert stop_of(half, [0.5, 0.75, 0.25], mode="max") == (2, StopReason.DIVERGED)
    with pytest.raises(ValueError, match="`ratio` must be above 1"):
        stop.divergence(ratio=1.0)
    for wrong in ({}, {"threshold": 1.0, "ratio": 2.0}):
        with pytest.raises(ValueError, match="`threshold` or `ratio`, and not both"):
            stop.divergence(**wrong)


def test_infinity_is_no_divergence_and_no_target_but_nonfinite():
    rule = stop.any_of(stop.divergence(2.0), stop.target(0.0))
    for value in (INF, -INF, NAN):
        assert stop_of(rule, [value]) == (0, StopReason.NONFINITE)
        assert stop_of(rule, [value] * 3, nonfinite="ignore") is None


def test_limits_judge_the_raw_value_under_smoothing():
    values = [1.0, 1.0, 1.0, 9.0]
    rule = stop.divergence(8.0)
    assert stop_of(rule, values, smooth=stop.ema(0.9)) == (3, StopReason.DIVERGED)


def test_budgets_count_evaluations_steps_and_seconds():
    assert stop_of(stop.budget(evaluations=3), [3.0, 2.0, 1.0, 0.0]) == (
        2,
        StopReason.BUDGET,
    )
    steps = {"step": [10, 20, 30]}
    assert stop_of(stop.budget(steps=20), [3.0, 2.0, 1.0], extras=steps) == (
        1,
        StopReason.BUDGET,
    )
    seconds = {"seconds": [1.5, 1.5, 1.5]}
    assert stop_of(stop.budget(seconds=4.0), [3.0, 2.0, 1.0], extras=seconds) == (
        2,
        StopReason.BUDGET,
    )


def test_nonfinite_values_spend_the_budget_even_if_ignored():
    stopped = stop_of(stop.budget(evaluations=3), [NAN] * 3, nonfinite="ignore")
    assert stopped == (2, StopReason.BUDGET)


def test_seconds_that_are_nan_or_negative_are_no_time():
    state = run(
        stop.patience(5), [1.0, 1.0, 1.0], extras={"seconds": [1.0, NAN, -2.0]}
    )[-1]
    assert float(state.train_seconds) == 1.0


def test_seconds_add_up_however_short_and_many_they_are():
    # A float32 at 2**15 does not move by 1.5 milliseconds.
    stopper = early_stopping(stop.budget(seconds=2**15 + 150.0))
    passed = float(np.float32(1.5e-3))

    @jax.jit
    def scan(state: Any) -> Any:
        def update(state: Any, _: Any) -> Any:
            return stopper.update(1.0, state, seconds=passed), None

        return jax.lax.scan(update, state, length=120_000)[0]

    start = replace_entries(stopper.init(), train_seconds=float(2**15))
    state = scan(start)
    # Its nearest float32 is judged, of which there are 256 a second.
    assert int(state.stopped_at) == pytest.approx(
        150 / passed, abs=2 + 1 / 512 / passed
    )
    assert state.stop_reason == StopReason.BUDGET
    assert float(state.train_seconds) == pytest.approx(2**15 + 150, rel=1e-7)

    halfway = stopper.update(1.0, stopper.reset(start), seconds=passed)
    again = stopper.update(1.0, stopper.reset(halfway), seconds=passed)
    total = float(again.train_seconds) + float(again.train_seconds_rest)
    assert total == pytest.approx(2**15 + 2 * passed, abs=1e-9)


def test_value_that_float32_cannot_hold_is_judged_as_its_neighbour():
    losses = [2e8, 2e8 - 5, 2e8 - 6]
    assert stop_of(stop.patience(2), losses) == (2, StopReason.PATIENCE)
    assert stop_of(stop.patience(2), [loss - 2e8 for loss in losses]) is None


def test_endless_time_spends_a_budget_and_leaves_numbers():
    rule = stop.budget(seconds=1e20)
    assert stop_of(rule, [1.0, 1.0], extras={"seconds": [1.0, INF]}) == (
        1,
        StopReason.BUDGET,
    )
    state = run(stop.patience(9), [1.0] * 3, extras={"seconds": [INF] * 3})[-1]
    assert np.isfinite([state.train_seconds, state.train_seconds_rest]).all()


# Windows -------------------------------------------------------------------------


def test_generalization_loss_is_in_percent_of_the_best():
    rule = stop.generalization_loss(12.5)
    assert stop_of(rule, [8.0, 9.0]) is None
    assert stop_of(rule, [8.0, 9.25]) == (1, StopReason.GENERALIZATION_LOSS)
    assert stop_of(rule, [-8.0, -6.75]) is not None
    assert stop_of(rule, [-8.0, -7.0]) is None


def test_generalization_loss_at_a_best_of_zero():
    rule = stop.generalization_loss(5.0)
    assert stop_of(rule, [0.0, 0.0, -0.0]) is None
    assert stop_of(rule, [0.0, 1e-30]) is not None


def test_progress_quotient_fires_at_a_rise_when_training_stands_still():
    rule = stop.progress_quotient(1.0, 2)
    standstill = {"train_value": [1.0, 1.0, 1.0]}
    assert stop_of(rule, [2.0, 2.0, 2.5], extras=standstill) == (
        2,
        StopReason.PROGRESS_QUOTIENT,
    )
    progress = {"train_value": [4.0, 2.0, 1.0]}
    assert stop_of(rule, [2.0, 2.0, 2.5], extras=progress) is None


def test_progress_quotient_waits_for_k_finite_training_values():
    rule = stop.progress_quotient(1.0, 3)
    extras = {"train_value": [1.0, NAN, 1.0, 1.0]}
    assert stop_of(rule, [2.0, 2.5, 2.5, 2.5], extras=extras) == (
        3,
        StopReason.PROGRESS_QUOTIENT,
    )


def test_progress_quotient_takes_several_training_values_at_once():
    extras = {"train_value": [[9.0, 9.0, 1.0], [1.0, 1.0]]}
    rule = stop.progress_quotient(1.0, 2)
    assert stop_of(rule, [2.0, 2.5], extras=extras) == (1, StopReason.PROGRESS_QUOTIENT)


SERIES = [9.0, 7.0, 6.0, 5.0, 5.5, 4.0, 4.2, 3.9, 4.1, 4.3, 4.4, 4.6]


@pytest.mark.parametrize(
    ("k", "strips", "sliding"), [(1, 4, 4), (2, 9, 9), (3, 8, 8), (5, None, 10)]
)
def test_strips_and_lag_differ_in_when_they_look(k, strips, sliding):
    def index(rule):
        stopped = stop_of(rule, SERIES)
        return stopped and stopped[0]

    assert index(stop.successive_rises(1, k)) == strips
    assert index(stop.lag(k)) == sliding


def test_lag_needs_a_rise_in_a_row_and_of_a_least_size():
    values = [1.0, 2.0, 1.5, 2.0, 2.5]
    assert stop_of(stop.lag(1, s=2), values) == (4, StopReason.LAG)
    assert stop_of(stop.lag(1, min_rise=1.0), values) is None
    assert stop_of(stop.lag(1, min_rise=0.75), values) == (1, StopReason.LAG)


def test_successive_rises_stay_true_between_strips():
    rule = stop.not_before(stop.successive_rises(1, 2), 5)
    assert stop_of(rule, [1.0, 1.0, 1.0, 2.0, 0.0, 0.0]) == (
        4,
        StopReason.SUCCESSIVE_RISES,
    )


def test_windows_do_not_see_nonfinite_values():
    values = [1.0, NAN, INF, 0.5, -INF, 0.75]
    for rule in (stop.lag(1), stop.successive_rises(1, 1)):
        stopped = stop_of(rule, values, nonfinite="wait")
        assert stopped is not None
        assert stopped[0] == 5


def test_overfitting_needs_training_to_improve():
    rule = stop.overfitting(1, s=2)
    rises = [1.0, 2.0, 3.0]
    better = {"train_value": [3.0, 2.0, 1.0]}
    worse = {"train_value": [3.0, 3.5, 4.0]}
    assert stop_of(rule, rises, extras=better) == (2, StopReason.OVERFITTING)
    assert stop_of(rule, rises, extras=worse) is None


def test_overfitting_does_not_see_nonfinite_training_values():
    unknown = {"train_value": [3.0, NAN, 1.0]}
    stopped = stop_of(stop.overfitting(1), [1.0, 2.0, 3.0], extras=unknown)
    assert stopped == (2, StopReason.OVERFITTING)


def test_overfitting_follows_the_mode():
    accuracies = {"train_value": [0.5, 0.75, 0.875]}
    stopped = stop_of(
        stop.overfitting(1), [0.5, 0.25, 0.125], extras=accuracies, mode="max"
    )
    assert stopped == (1, StopReason.OVERFITTING)


# The guard and the learning rate ---------------------------------------------------


class FakeGuardState(NamedTuple):
    num_skipped: jax.Array
    skip_streak: jax.Array
    guard_exhausted: jax.Array


def guard_state(skipped, streak=0, exhausted=False):
    return FakeGuardState(
        jnp.asarray(skipped, jnp.int32),
        jnp.asarray(streak, jnp.int32),
        jnp.asarray(exhausted),
    )


@pytest.mark.parametrize(
    ("states", "index"),
    [
        ([guard_state(50), guard_state(54), guard_state(58)], None),
        ([guard_state(50), guard_state(54), guard_state(59)], 2),
        ([guard_state(50, streak=5)], 0),
        ([guard_state(1), guard_state(1, exhausted=True)], 1),
        ([(guard_state(0), guard_state(0)), (guard_state(3), guard_state(2))], 1),
    ],
)
def test_skip_storm_counts_skips_since_the_last_evaluation(states, index):
    extras = {"opt_state": states}
    stopped = stop_of(stop.skip_storm(5), [1.0] * len(states), extras=extras)
    assert stopped == (None if index is None else (index, StopReason.SKIP_STORM))


def test_skip_storm_reads_a_real_guard():
    from optax_guard._guarding.guard import guard

    tx = guard(optax.adam(0.1), max_consecutive_skips=2)
    params = {"w": jnp.ones(2)}
    opt_state = tx.init(params)
    stopper = early_stopping(stop.skip_storm(10))
    state = stopper.init()
    for _ in range(2):
        _, opt_state = tx.update({"w": jnp.full(2, jnp.nan)}, opt_state, params)
        state = stopper.update(1.0, state, opt_state=opt_state)
    assert int(state.stop_reason) == StopReason.SKIP_STORM
    assert int(state.stopped_at) == 1


def test_skip_storm_without_a_guard_says_what_to_do():
    opt_state = optax.adam(0.1).init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"holds no guard.*Wrap the optimizer"):
        run(stop.skip_storm(5), [1.0], extras={"opt_state": [opt_state]})


def scales(states):
    return [float(optax.tree.get(s.rule_state, "lr_scale")) for s in states]


def test_plateau_reduces_and_then_stops():
    rule = stop.plateau(2, factor=0.5, max_reductions=2)
    states = run(rule, [1.0] * 8)
    assert scales(states) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert int(states[-1].stopped_at) == 6
    assert int(states[-1].stop_reason) == StopReason.PLATEAU


def test_plateau_cooldown_counts_no_bad_evaluations():
    rule = stop.plateau(2, factor=0.5, max_reductions=1, cooldown=2)
    states = run(rule, [1.0] * 8)
    assert scales(states) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert int(states[-1].stopped_at) == 6


def test_plateau_reduces_twice_unless_told_otherwise():
    assert stop_of(stop.plateau(1), [1.0] * 5) == (3, StopReason.PLATEAU)


def test_plateau_cooldown_is_not_spent_on_what_does_not_count():
    rule = stop.plateau(1, factor=0.5, cooldown=2)
    assert rule.init().rest_count == 0
    states = run(rule, [1.0, 1.0, NAN, NAN, 1.0, 1.0, 1.0], nonfinite="ignore")
    rests = [int(optax.tree.get(state, "rest_count")) for state in states]
    assert rests == [0, 2, 2, 2, 1, 0, 2]


def test_plateau_sees_improvement_of_negative_values():
    rule = stop.plateau(1, rel_delta=0.25, max_reductions=0)
    assert stop_of(rule, [-1.0, -1.5, -2.0]) is None
    assert stop_of(rule, [-1.0, -1.125]) == (1, StopReason.PLATEAU)


def test_apply_plateau_scales_the_step_of_the_optimizer():
    tx = optax.chain(optax.sgd(1.0), stop.scale_by_plateau())
    params = {"w": jnp.ones(2), "b": jnp.ones((), jnp.bfloat16)}
    opt_state = tx.init(params)
    state = run(stop.plateau(1, factor=0.25), [1.0, 1.0])[-1]
    opt_state = stop.apply_plateau(opt_state, state)
    updates: Any
    updates, after = tx.update(params, opt_state, params)
    np.testing.assert_array_equal(updates["w"], [-0.25, -0.25])
    assert updates["b"].dtype == jnp.bfloat16
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, opt_state)
    # Both may be donated together.
    jax.jit(lambda a, b: (a, b), donate_argnums=(0, 1))(opt_state, state)


@pytest.mark.parametrize("jit", [False, True])
def test_scales_of_a_plateau_may_all_be_donated(jit):
    tx = optax.partition(
        {
            "a": optax.chain(optax.sgd(1.0), stop.scale_by_plateau()),
            "b": optax.chain(optax.sgd(1.0), stop.scale_by_plateau()),
        },
        {"a": "a", "b": "b"},
    )
    opt_state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    state = run(stop.plateau(1, factor=0.25), [1.0, 1.0])[-1]
    apply = jax.jit(stop.apply_plateau) if jit else stop.apply_plateau
    opt_state = apply(opt_state, state)
    scales = [x for _, x in optax.tree.get_all_with_path(opt_state, "lr_scale")]
    assert [float(x) for x in scales] == [0.25, 0.25]
    # With the state of the stopper, as a train step that donates all it carries.
    jax.jit(lambda *x: jax.tree.map(lambda x: x + 1, x), donate_argnums=(0, 1))(
        opt_state, state.rule_state
    )


def test_apply_plateau_says_what_is_missing():
    state = run(stop.plateau(1), [1.0])[-1]
    with pytest.raises(ValueError, match=r"put `stop.scale_by_plateau\(\)` last"):
        stop.apply_plateau(optax.sgd(1.0).init(jnp.ones(2)), state)
    with pytest.raises(ValueError, match="a rule with one `plateau`, found 0"):
        stop.apply_plateau((), run(stop.patience(1), [1.0])[-1])


# Combinators ----------------------------------------------------------------------


def test_all_of_needs_all_true_at_the_same_evaluation():
    rule = stop.all_of(stop.patience(2), stop.divergence(4.0))
    assert stop_of(rule, [1.0, 5.0, 2.0, 3.0]) is None
    assert stop_of(rule, [1.0, 2.0, 5.0]) == (2, StopReason.DIVERGED)


def test_any_of_names_target_then_divergence_then_rules_then_budget():
    rules = [
        stop.budget(evaluations=1),
        stop.lag(1),
        stop.patience(1),
        stop.divergence(0.5),
        stop.target(9.0),
    ]
    expected = [
        StopReason.TARGET,
        StopReason.DIVERGED,
        StopReason.LAG,
        StopReason.PATIENCE,
        StopReason.BUDGET,
    ]
    held = [stop.not_before(rule, 2) for rule in rules]
    for reason in expected:
        assert stop_of(stop.any_of(*held), [1.0, 2.0]) == (1, reason)
        gone = {
            StopReason.TARGET: 4,
            StopReason.DIVERGED: 3,
            StopReason.LAG: 1,
            StopReason.PATIENCE: 2,
            StopReason.BUDGET: 0,
        }[reason]
        held[gone] = stop.target(-9.0)


def test_not_before_judges_anew_instead_of_remembering():
    rule = stop.not_before(stop.patience(2), 5)
    assert stop_of(rule, [1.0, 1.0, 1.0, 0.5, 0.25]) is None
    assert stop_of(rule, [1.0, 1.0, 1.0, 1.0, 1.0]) == (4, StopReason.PATIENCE)


def test_not_before_knows_steps_and_seconds():
    rule = stop.not_before(stop.divergence(0.0), steps=20)
    assert stop_of(rule, [1.0] * 3, extras={"step": [10, 19, 20]}) == (
        2,
        StopReason.DIVERGED,
    )
    rule = stop.not_before(stop.divergence(0.0), seconds=2.0)
    assert stop_of(rule, [1.0] * 3, extras={"seconds": [1.0, 0.5, 0.5]}) == (
        2,
        StopReason.DIVERGED,
    )


def test_held_for_needs_a_row():
    rule = stop.held_for(stop.target(1.0), 2)
    assert stop_of(rule, [1.0, 2.0, 1.0, 2.0]) is None
    assert stop_of(rule, [1.0, 2.0, 1.0, 0.5]) == (3, StopReason.TARGET)
    assert stop_of(rule, [1.0, NAN, 0.5], nonfinite="ignore") == (2, StopReason.TARGET)


def test_cooldown_rests_and_starts_afresh():
    resting = stop.cooldown(stop.divergence(0.0), 2)
    fired = []
    state = resting.init()
    with jax.disable_jit():
        for _ in range(6):
            verdict, state = resting.update(observation(1.0), state)
            fired.append(bool(verdict.fired))
    assert fired == [True, False, False, True, False, False]


def observation(value):
    true = jnp.asarray(True)
    value = jnp.asarray(value, jnp.float32)
    return stop.Observation(
        value, value, true, true, jnp.asarray(1, jnp.int32), 1.0, {}, True, true
    )


def test_cooldown_restarts_patience():
    resting = stop.cooldown(stop.patience(2), 1)
    fired = []
    state = resting.init()
    for _ in range(8):
        verdict, state = resting.update(observation(1.0), state)
        fired.append(bool(verdict.fired))
    # Two to stall, one of rest, then a first value again and two to stall.
    assert fired == [False, False, True, False, False, False, True, False]


def test_monitor_judges_another_key_with_its_own_mode():
    rule = stop.all_of(
        stop.patience(2), stop.monitor("acc", stop.patience(2), mode="max")
    )
    losses = [1.0, 2.0, 2.0, 2.0, 2.0]
    accuracies = [0.5, 0.625, 0.75, 0.75, 0.75]
    values = [
        {"loss": loss, "acc": acc, "unused": "text"}
        for loss, acc in zip(losses, accuracies, strict=True)
    ]
    states = run(rule, values, key="loss")
    assert int(states[-1].stopped_at) == 4
    assert int(states[-1].best_eval) == 0


def test_a_nonfinite_monitored_value_counts_only_under_wait():
    rule = stop.monitor("acc", stop.patience(2), mode="max")
    values = [{"loss": 1.0, "acc": a} for a in (0.5, NAN, NAN, NAN)]
    assert stop_of(rule, values, key="loss", nonfinite="wait") == (
        2,
        StopReason.PATIENCE,
    )
    assert stop_of(rule, values, key="loss", nonfinite="stop") is None


def test_needs_and_keys_pass_through_combinators():
    rule = stop.any_of(
        stop.not_before(stop.patience(seconds=5.0), steps=3),
        stop.held_for(stop.monitor("acc", stop.overfitting(2)), 2),
        stop.cooldown(stop.skip_storm(3), 1),
    )
    assert rule.needs == {"seconds", "step", "train_value", "opt_state"}
    assert rule.keys == {"acc"}
    assert stop.any_of(stop.patience(3), stop.budget(evaluations=3)).needs == set()


# Smoothing ------------------------------------------------------------------------


def smoothed(smoother, values):
    state, out = smoother.init(), []
    for value in values:
        x, state = smoother.update(jnp.asarray(value, jnp.float32), state)
        out.append(float(x))
    return out


def test_ema_is_debiased():
    values = np.random.default_rng(0).normal(size=10)
    weights = 0.75 ** np.arange(10)[::-1]
    expected = [
        np.average(values[: n + 1], weights=weights[-n - 1 :]) for n in range(10)
    ]
    np.testing.assert_allclose(smoothed(stop.ema(0.75), values), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.7, -0.1, 1e-20, 3e37])
def test_smoothing_leaves_a_constant_bit_identical(value):
    for smoother in (stop.ema(0.9), stop.ema(0.0), stop.median(3)):
        assert smoothed(smoother, [value] * 30) == [float(np.float32(value))] * 30


def test_median_of_those_there_are():
    values = [5.0, 1.0, 3.0, 100.0, 2.0]
    assert smoothed(stop.median(3), values) == [5.0, 3.0, 3.0, 3.0, 3.0]
    assert smoothed(stop.median(4), values)[-1] == 2.5


def test_smoothing_does_not_see_nonfinite_values():
    states = run(
        stop.patience(9), [1.0, NAN, INF, 1.0], smooth=stop.ema(0.5), nonfinite="wait"
    )
    assert float(states[-1].smooth_state.smoothed_value) == 1.0


def test_patience_follows_the_smoothed_value_and_best_the_raw():
    values = [4.0, 3.0, 9.0, 2.5]
    state = run(stop.patience(2), values, smooth=stop.ema(0.5))[-1]
    assert state.should_stop
    assert int(state.best_eval) == 3
    state = run(stop.patience(2), values, smooth=stop.ema(0.5), best_on="smoothed")[-1]
    assert int(state.best_eval) == 1


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: stop.patience(0), ValueError, "`n` must be .* at least 1, got 0"),
        (lambda: stop.patience(2.5), ValueError, "`n` must be a whole number"),
        (lambda: loose.patience("5"), TypeError, "`n` must be a number, got '5'"),
        (lambda: stop.patience(), ValueError, "exactly one of .* got none"),
        (
            lambda: stop.patience(3, steps=5),
            ValueError,
            r"exactly one of .*\['n', 'steps'\].*any_of",
        ),
        (
            lambda: stop.patience(3, min_delta=-1.0),
            ValueError,
            "`min_delta` must not be negative, got -1.0",
        ),
        (
            lambda: stop.patience(3, rel_delta=NAN),
            ValueError,
            "`rel_delta` must not be negative, got nan",
        ),
        (
            lambda: stop.patience(seconds=0),
            ValueError,
            "`seconds` must be positive, got 0",
        ),
        (lambda: stop.budget(), ValueError, "`budget` needs at least one of"),
        (
            lambda: stop.budget(evaluations=0),
            ValueError,
            "`evaluations` must be .* got 0",
        ),
        (
            lambda: stop.generalization_loss(0),
            ValueError,
            "`alpha` must be positive, got 0",
        ),
        (
            lambda: stop.progress_quotient(1.0, 0),
            ValueError,
            "`k` must be .* at least 1, got 0",
        ),
        (
            lambda: jax.eval_shape(lambda k: loose.lag(k).init(), 3),
            TypeError,
            "`k` must be known while tracing",
        ),
        (lambda: stop.lag(3, s=0), ValueError, "`s` must be .* at least 1, got 0"),
        (lambda: loose.median(2.5), ValueError, "`k` must be a whole number"),
        (
            lambda: stop.ema(1.0),
            ValueError,
            r"`decay` must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: stop.plateau(3, factor=1.0),
            ValueError,
            "`factor` must be .*1.0",
        ),
        (lambda: stop.plateau(3, factor=0.0), ValueError, "`factor` must be .*0.0"),
        (
            lambda: stop.plateau(3, max_reductions=-1),
            ValueError,
            "`max_reductions` must be .* at least 0, got -1",
        ),
        (
            lambda: stop.plateau(3, cooldown=-1),
            ValueError,
            "`cooldown` must be .* at least 0, got -1",
        ),
        (lambda: stop.skip_storm(0), ValueError, "`n` must be .* at least 1, got 0"),
        (lambda: stop.any_of(), ValueError, "`any_of` needs at least one rule"),
        (
            lambda: loose.all_of(5),
            TypeError,
            r"`rule` of `all_of` must be .* such as `stop.patience\(5\)`, got 5",
        ),
        (
            lambda: stop.not_before(stop.patience(3)),
            ValueError,
            "`not_before` takes exactly one",
        ),
        (lambda: stop.held_for(stop.patience(3), 0), ValueError, "`n` must be"),
        (
            lambda: stop.cooldown(stop.patience(3), -1),
            ValueError,
            "`n` must be a whole number of at least 0, got -1",
        ),
        (
            lambda: stop.monitor("acc", stop.patience(3), mode="up"),
            ValueError,
            "`mode` must be one of 'min', 'max', got 'up'",
        ),
    ],
    ids=itertools.count(),
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


# The oracle -----------------------------------------------------------------------


class Seen(NamedTuple):
    """An evaluation, as the oracle sees it."""

    x: float
    valid: bool
    counts: bool
    number: int
    sign: int


def oracle(spec) -> Any:
    """Returns a function from `Seen` to (fired, reason), with its memory inside."""
    name, *args = spec
    memory: dict[str, Any] = {"ref": None, "bad": 0, "window": [], "rises": 0}

    def patience(seen):
        n, delta, relative, cumulative = args
        ref = memory["ref"]
        counts_as_gain = False
        if seen.valid:
            margin = 0 if ref is None else delta + relative * abs(ref)
            counts_as_gain = ref is None or seen.x < ref - margin
            if counts_as_gain or (not cumulative and seen.x < ref):
                memory["ref"] = seen.x
        memory["bad"] = 0 if counts_as_gain else memory["bad"] + seen.counts
        fired = seen.counts and not counts_as_gain and memory["bad"] >= n
        return fired, StopReason.PATIENCE

    def target(seen):
        return seen.valid and seen.x <= seen.sign * args[0], StopReason.TARGET

    def divergence(seen):
        return seen.valid and seen.x > seen.sign * args[0], StopReason.DIVERGED

    def budget(seen):
        return seen.number >= args[0], StopReason.BUDGET

    def generalization_loss(seen):
        memory["window"] += [seen.x] * seen.valid
        if not seen.valid:
            return False, StopReason.GENERALIZATION_LOSS
        best = min(memory["window"])
        rise = seen.x - best
        loss = 0 if rise == 0 else INF if best == 0 else 100 * rise / abs(best)
        return loss > args[0], StopReason.GENERALIZATION_LOSS

    def successive_rises(seen):
        s, k = args
        memory["window"] += [seen.x] * seen.valid
        ends = memory["window"][k - 1 :: k]
        rises = 0
        for before, after in itertools.pairwise(ends):
            rises = rises + 1 if after > before else 0
        return seen.valid and rises >= s, StopReason.SUCCESSIVE_RISES

    def lag(seen):
        k, s, least = args
        if seen.valid:
            window = memory["window"] = [*memory["window"], seen.x]
            rose = len(window) > k and seen.x > window[-1 - k] + least
            memory["rises"] = memory["rises"] + 1 if rose else 0
        return seen.valid and memory["rises"] >= s, StopReason.LAG

    def held_for(seen):
        fired, reason = memory["children"][0](seen)
        if fired:
            memory["rises"] += 1
        elif seen.valid:
            memory["rises"] = 0
        return fired and memory["rises"] >= args[1], reason

    def not_before(seen):
        fired, reason = memory["children"][0](seen)
        return fired and seen.number >= args[1], reason

    def combined(seen):
        verdicts = [child(seen) for child in memory["children"]]
        join = any if name == "any_of" else all
        order = {StopReason.TARGET: 0, StopReason.DIVERGED: 1, StopReason.BUDGET: 3}
        reasons = [reason for fired, reason in verdicts if fired]
        reason = min(reasons, key=lambda r: order.get(r, 2), default=None)
        return join(fired for fired, _ in verdicts), reason

    if name in ("any_of", "all_of"):
        memory["children"] = [oracle(child) for child in args]
        return combined
    if name in ("held_for", "not_before"):
        memory["children"] = [oracle(args[0])]
    return locals()[name]


def expected_run(spec, values, mode, nonfinite):
    """Runs the oracle: (stop, reason, best) of a series."""
    sign = 1 if mode == "min" else -1
    judge, best = oracle(spec), None
    for i, value in enumerate(values):
        x, finite = sign * value, math.isfinite(value)
        if finite and (best is None or x < sign * values[best]):
            best = i
        counts = finite or nonfinite == "wait"
        fired, reason = judge(Seen(x, finite, counts, i + 1, sign))
        if nonfinite == "stop" and not finite:
            return i, StopReason.NONFINITE, best
        if fired:
            return i, reason, best
    return None, StopReason.RUNNING, best


def build(spec):
    name, *args = spec
    if name == "patience":
        n, delta, relative, cumulative = args
        return stop.patience(
            n, min_delta=delta, rel_delta=relative, cumulative=cumulative
        )
    if name == "lag":
        return stop.lag(args[0], s=args[1], min_rise=args[2])
    if name == "budget":
        return stop.budget(evaluations=args[0])
    factory = operator.attrgetter(name)(stop)
    return factory(*[build(arg) if isinstance(arg, tuple) else arg for arg in args])


LENGTH = 12
# Multiples of an eighth: float32 and the oracle agree on every sum and product.
eighths = st.integers(-40, 40).map(lambda i: i / 8)
counts = st.integers(1, 4)
leaves = st.one_of(
    st.tuples(
        st.just("patience"),
        counts,
        st.sampled_from([0.0, 0.25]),
        st.sampled_from([0.0, 0.125]),
        st.booleans(),
    ),
    st.tuples(st.just("target"), eighths),
    st.tuples(st.just("divergence"), eighths),
    st.tuples(st.just("budget"), st.integers(1, LENGTH)),
    st.tuples(st.just("generalization_loss"), st.sampled_from([3.3, 33.3, 133.3])),
    st.tuples(st.just("successive_rises"), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.just("lag"), counts, st.integers(1, 3), st.sampled_from([0.0, 0.5])),
)
rules = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["any_of", "all_of"]), inner, inner),
        st.tuples(st.sampled_from(["held_for", "not_before"]), inner, counts),
    ),
    max_leaves=4,
)
constants = eighths.map(lambda value: [value] * LENGTH)
values = st.one_of(eighths, eighths, eighths, st.sampled_from([NAN, INF, -INF]))
series = st.one_of(constants, st.lists(values, min_size=LENGTH, max_size=LENGTH))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spec=rules,
    # Several series a stopper: compiling it costs more than running it.
    batch=st.lists(series, min_size=16, max_size=16),
    mode=st.sampled_from(["min", "max"]),
    nonfinite=st.sampled_from(["stop", "wait", "ignore"]),
)
def test_any_composition_agrees_with_plain_python(spec, batch, mode, nonfinite):
    stopper = early_stopping(build(spec), mode=mode, nonfinite=nonfinite)

    def lane(values):
        def body(state, item):
            index, value = item
            return stopper.update(value, state, index), None

        start = stopper.init(jnp.asarray(-1))
        return jax.lax.scan(body, start, (jnp.arange(LENGTH), values))[0]

    final = jax.jit(jax.vmap(lane))(jnp.asarray(batch, jnp.float32))
    for i, values in enumerate(batch):
        stops, reason, best = expected_run(spec, values, mode, nonfinite)
        assert bool(final.should_stop[i]) == (stops is not None)
        assert int(final.stopped_at[i]) == (-1 if stops is None else stops)
        assert StopReason(int(final.stop_reason[i])) == reason
        assert int(final.best_eval[i]) == (-1 if best is None else best)
        assert int(final.best_params[i]) == int(final.best_eval[i])
        if best is not None:
            assert float(final.best_value[i]) == values[best]
