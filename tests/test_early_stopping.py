"""The stopper: judgment, latch, best parameters, and where it may run."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard import stop
from optax_guard.stop._explain import explain
from optax_guard.stop._rule import StopReason
from optax_guard.stop._state import EarlyStoppingState
from optax_guard.stop._stopper import early_stopping

NAN, INF = math.nan, math.inf
loose: Any = early_stopping


def feed(stopper, values, state=None, **extras):
    state = stopper.init() if state is None else state
    for value in values:
        state = stopper.update(value, state, **extras)
    return state


def mixed_params(i=0.0):
    return {
        "f32": jnp.full((3,), i, jnp.float32),
        "bf16": jnp.full((2, 2), i, jnp.bfloat16),
        "f16": jnp.full((), i, jnp.float16),
        "int": jnp.asarray([int(i)], jnp.int32),
        "empty": jnp.zeros((0,), jnp.float32),
        "none": None,
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# One stopper of nearly everything, whose states the laws below are about.


@functools.cache
def everything():
    rule = stop.any_of(
        stop.patience(3, min_delta=0.25),
        stop.patience(steps=100, cumulative=False),
        stop.patience(seconds=100.0, baseline=9.0),
        stop.target(-5.0),
        stop.divergence(5.0),
        stop.budget(evaluations=50, steps=1000, seconds=1e4),
        stop.generalization_loss(300.0),
        stop.held_for(stop.lag(2, s=2), 2),
        stop.not_before(stop.successive_rises(2, 2), 3),
        stop.cooldown(stop.all_of(stop.lag(3), stop.overfitting(2)), 2),
        stop.progress_quotient(1e3, 3),
        stop.plateau(2, max_reductions=5, cooldown=1),
    )
    smooth = stop.median(2)
    return early_stopping(rule, nonfinite="wait", smooth=smooth, warmup=1)


FEEDS: dict[str, Any] = {"step": 7, "seconds": 0.5, "train_value": 1.0}


# Judgment -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_first_nonfinite_is_not_best(value):
    stopper = early_stopping(stop.patience(3), nonfinite="wait")
    state = feed(stopper, [value])
    assert not state.is_best
    assert not state.is_significant
    assert int(state.best_eval) == -1
    assert float(state.best_value) == INF
    state = feed(stopper, [2.0], state)
    assert state.is_best
    assert state.is_significant
    assert float(state.best_value) == 2.0


@pytest.mark.parametrize(
    ("nonfinite", "stopped", "bad_count"),
    [("stop", True, 1), ("wait", False, 2), ("ignore", False, 1)],
)
def test_nonfinite_stops_waits_or_is_ignored(nonfinite, stopped, bad_count):
    stopper = early_stopping(stop.patience(4), nonfinite=nonfinite)
    state = feed(stopper, [1.0, 2.0, NAN])
    assert bool(state.should_stop) == stopped
    assert int(state.rule_state.bad_count) == bad_count
    assert int(state.num_evals) == 3


def test_tolerated_nonfinite_values_are_counted_in_a_row():
    stopper = early_stopping(stop.patience(1), max_nonfinite=2)
    state = feed(stopper, [1.0, NAN, INF, 0.5, NAN, NAN])
    assert not state.should_stop
    assert int(state.nonfinite_streak) == 2
    state = feed(stopper, [NAN], state)
    assert int(state.stop_reason) == StopReason.NONFINITE
    assert int(state.stopped_at) == 6


def test_warmup_is_invisible_but_counted_and_nonfinite_in_it_stops():
    stopper = early_stopping(stop.patience(1), warmup=2)
    state = feed(stopper, [0.0, 1.0, 3.0])
    assert int(state.best_eval) == 2
    assert float(state.best_value) == 3.0
    assert not state.should_stop
    state = feed(stopper, [NAN])
    assert int(state.stop_reason) == StopReason.NONFINITE


def test_target_comes_before_patience_and_budget():
    rule = stop.any_of(
        stop.budget(evaluations=2), stop.patience(1, min_delta=9.0), stop.target(1.0)
    )
    state = feed(early_stopping(rule), [2.0, 1.0])
    assert int(state.stop_reason) == StopReason.TARGET


def test_nonfinite_comes_before_every_rule():
    stopper = early_stopping(stop.budget(evaluations=1))
    assert int(feed(stopper, [NAN]).stop_reason) == StopReason.NONFINITE


def test_best_value_has_the_sign_of_the_user():
    stopper = early_stopping(stop.patience(5), mode="max")
    assert float(stopper.init().best_value) == -INF
    assert float(feed(stopper, [-3.0, -2.0, -4.0]).best_value) == -2.0


def test_ties_keep_the_earlier_parameters():
    stopper = early_stopping(stop.patience(5))
    state = stopper.init(jnp.asarray(0.0))
    for i, value in enumerate([2.0, 1.0, 1.0]):
        state = stopper.update(value, state, jnp.asarray(float(i)))
    assert float(state.best_params) == 1.0
    assert int(state.best_eval) == 1


def test_nothing_is_best_before_the_first_value():
    state = early_stopping(stop.patience(5)).init()
    assert not state.is_best
    assert not state.is_significant
    assert (int(state.best_eval), int(state.best_step)) == (-1, -1)


def test_best_step_is_that_of_the_best():
    stopper = early_stopping(stop.patience(5))
    assert int(feed(stopper, [1.0]).best_step) == -1
    state = stopper.init()
    for step, value in [(100, 3.0), (200, 1.0), (300, 2.0)]:
        state = stopper.update(value, state, step=step)
    assert int(state.best_step) == 200
    large = 2**24 + 1  # not a float32
    assert int(stopper.update(0.0, state, step=large).best_step) == large


def test_without_a_patience_every_best_is_significant():
    state = feed(early_stopping(stop.target(0.0)), [2.0, 1.0])
    assert state.is_significant


def test_a_rule_of_ones_own_may_stop_the_run():
    def update(observation, state):
        reason = jnp.asarray(int(StopReason.EXTERNAL), jnp.int32)
        return stop.Verdict(observation.num_evals >= 2, reason), state

    state = feed(early_stopping(stop.StopRule(lambda: (), update)), [1.0, 0.5])
    assert int(state.stop_reason) == StopReason.EXTERNAL


# Latch and reset --------------------------------------------------------------------


def test_a_stopped_run_changes_no_more():
    stopper = early_stopping(stop.target(1.0))
    state = stopper.update(0.5, stopper.init(mixed_params()), mixed_params(1.0))
    assert state.should_stop
    assert state.is_best
    later = stopper.update(0.25, state, mixed_params(2.0))
    later = stopper.update(NAN, later, mixed_params(3.0))
    # The flags speak of the last update, which was disregarded.
    false = jnp.asarray(False)
    same(later, state._replace(is_best=false, is_significant=false))


def test_reset_continues_and_keeps_best_and_totals():
    stopper = early_stopping(stop.patience(1))
    state = stopper.init(jnp.asarray(0.0))
    for value in [2.0, 1.0, 3.0]:
        state = stopper.update(value, state, jnp.asarray(value), seconds=1.0)
    again = stopper.reset(state)
    assert not again.should_stop
    assert int(again.stop_reason) == StopReason.RUNNING
    assert int(again.stopped_at) == -1
    assert int(again.num_evals) == 3
    assert float(again.train_seconds) == 3.0
    assert float(again.best_params) == float(again.best_value) == 1.0
    # Patience starts afresh; the best does not.
    again = stopper.update(2.0, again, jnp.asarray(2.0))
    assert again.is_significant
    assert not again.is_best
    assert not again.should_stop


def test_reset_without_the_best_is_a_new_start():
    stopper = early_stopping(stop.patience(1))
    state = feed(stopper, [2.0, 1.0, 3.0])
    same(stopper.reset(state, keep_best=False), stopper.init())


def test_a_spent_budget_goes_on_with_a_larger_one():
    small = early_stopping(stop.budget(evaluations=2))
    large = early_stopping(stop.budget(evaluations=3))
    state = feed(small, [2.0, 1.0])
    assert feed(small, [0.5], small.reset(state)).should_stop
    state = large.reset(state)
    assert not state.should_stop
    state = feed(large, [0.5], state)
    assert int(state.stopped_at) == 2


# Best parameters --------------------------------------------------------------------


def test_best_is_the_default_until_there_is_a_finite_value():
    stopper = early_stopping(stop.patience(5), nonfinite="wait")
    state = stopper.init(mixed_params(1.0))
    same(stopper.best(state, mixed_params(2.0)), mixed_params(2.0))
    state = stopper.update(NAN, state, mixed_params(3.0))
    same(stopper.best(state, mixed_params(2.0)), mixed_params(2.0))
    state = stopper.update(1.0, state, mixed_params(4.0))
    same(stopper.best(state, mixed_params(2.0)), mixed_params(4.0))


def test_best_survives_donated_parameters():
    stopper = early_stopping(stop.patience(5))
    params = mixed_params(1.0)
    state = stopper.init(params)
    train = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    params = train(params)
    state = stopper.update(1.0, state, params)
    params = train(params)
    params = train(params)
    same(stopper.best(state, params), mixed_params(2.0))


def test_best_of_tied_parameters_holds_two_copies():
    shared = jnp.ones(3)
    stopper = early_stopping(stop.patience(5), average_last=2)
    state = stopper.init({"a": shared, "b": shared})
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert len(pointers) == len(jax.tree.leaves(state))
    assert shared.unsafe_buffer_pointer() not in pointers


def test_parameters_may_hold_random_keys_and_python_numbers():
    stopper = early_stopping(stop.patience(5), average_last=2)
    params = {"key": jax.random.key(0), "rate": 0.5}
    state = stopper.update(1.0, stopper.init(params), params)
    for kept in (stopper.best(state, params), stopper.average(state, params)):
        assert kept["key"] == params["key"]
        assert float(kept["rate"]) == 0.5


# Where it runs ----------------------------------------------------------------------


def test_state_can_be_donated_from_the_first_update():
    stopper = everything()
    update = jax.jit(stopper.update, donate_argnums=1)
    state = stopper.init(mixed_params())
    expected = types(state)
    for value in [3.0, 2.0, 2.5]:
        state = update(value, state, mixed_params(value), **FEEDS)
        assert types(state) == expected
    assert float(state.best_value) == 2.0


def test_a_loop_traces_once():
    traces = []

    def init():
        return ()

    def update(observation, state):
        traces.append(observation.value)
        reason = jnp.asarray(int(StopReason.EXTERNAL), jnp.int32)
        return stop.Verdict(jnp.asarray(False), reason), state

    stopper = early_stopping(stop.StopRule(init, update), key="loss")
    params = {"w": jnp.ones(3)}
    state = stopper.init(params)
    kinds: list[Any] = [1.0, 2, np.float64(3.0), np.float32(4.0)]
    for step, value in enumerate(kinds):
        state = stopper.update(value, state, params, step=step, seconds=step / 3)
        metrics = {"loss": value, f"new{step}": np.ones(step)}
        state = stopper.update(metrics, state, params)
    assert len(traces) == 2  # with and without step and seconds


def test_an_update_calls_nothing_on_the_host():
    stopper = everything()
    state = stopper.init(mixed_params())
    jaxpr = str(
        jax.make_jaxpr(lambda v, s, p: stopper.update(v, s, p, **FEEDS))(
            1.0, state, mixed_params()
        )
    )
    assert "callback" not in jaxpr
    assert "cond" in jaxpr


def test_an_update_waits_for_nothing():
    # Reading a value on the host, which would wait, is refused by this guard.
    stopper = early_stopping(stop.patience(3))
    params = mixed_params()
    state, value = stopper.init(params), jnp.asarray(1.0)
    with jax.transfer_guard_device_to_host("disallow"):
        stopper.update(value, state, params)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("wide", [False, True])
def test_types_never_change(wide, request):
    if wide:
        request.getfixturevalue("x64")
    k = np.int64(2)
    stopper = early_stopping(numpy_rule(), smooth=stop.ema(0.5), average_last=k)
    params = mixed_params()
    state = stopper.init(params)
    expected = kinds(state)
    update = functools.partial(stopper.update, **FEEDS)
    # Traced only: what compiles has the types of the trace.
    for value in [3.0, jnp.asarray(2.0, jnp.bfloat16), np.float64(1.0), 1]:
        assert kinds(jax.eval_shape(update, value, state, params)) == expected
    for reset in (stopper.reset, functools.partial(stopper.reset, keep_best=False)):
        assert types(reset(state)) == types(state)
    assert types(stopper.best(state, params)) == types(params)
    assert types(stopper.average(state, params)) == types(params)
    own = jax.tree.leaves(state._replace(best_params=None, recent_params=()))
    assert {leaf.dtype.itemsize for leaf in own} <= {1, 4}


def numpy_rule():
    """A rule whose numbers have the dtypes of NumPy, which must not spread."""
    return stop.any_of(
        stop.patience(3, min_delta=np.float64(0.25)),
        stop.patience(seconds=5.0),
        stop.patience(steps=np.int64(500)),
        stop.generalization_loss(300.0),
        stop.cooldown(stop.held_for(stop.lag(2), 2), 2),
        stop.successive_rises(5, 2),
        stop.progress_quotient(1e3, 3),
        stop.overfitting(2, s=3),
        stop.plateau(2, max_reductions=5, cooldown=1),
    )


def test_strict_promotion_is_no_obstacle():
    stopper = early_stopping(numpy_rule())
    update = functools.partial(stopper.update, **FEEDS)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(update, 2.0, stopper.init(mixed_params()), mixed_params())


def test_debugging_nans_finds_none_in_the_state():
    rule = stop.any_of(stop.lag(2), stop.generalization_loss(5.0), stop.overfitting(2))
    stopper = early_stopping(rule, smooth=stop.median(3))
    with jax.debug_nans(True):
        state = stopper.update(2.0, stopper.init(), train_value=1.0)
        stopper.update(2.0, state, train_value=1.0)


SERIES = [4.0, NAN, 3.0, 3.5, INF, 2.5, 2.75, 3.0, 2.0, 2.5, 2.5, 2.5, 1.0]


def in_a_loop(stopper, values):
    state = stopper.init(jnp.asarray(-1.0))
    for i, value in enumerate(values):
        state = stopper.update(value, state, jnp.asarray(float(i)), **FEEDS)
    return state


def in_a_scan(stopper, values):
    def body(state, item):
        i, value = item
        return stopper.update(value, state, i, **FEEDS), None

    start = stopper.init(jnp.asarray(-1.0))
    return jax.lax.scan(body, start, (jnp.arange(float(len(values))), values))[0]


def in_a_while_loop(stopper, values):
    """Leaves at the stop: what a loop on the device would do."""

    def go_on(carry):
        i, state = carry
        return (i < len(values)) & ~state.should_stop

    def body(carry):
        i, state = carry
        params = i.astype(jnp.float32)
        return i + 1, stopper.update(values[i], state, params, **FEEDS)

    start = (jnp.asarray(0), stopper.init(jnp.asarray(-1.0)))
    return jax.lax.while_loop(go_on, body, start)[1]


def test_loop_scan_while_loop_and_vmap_agree():
    stopper = everything()
    values = jnp.asarray(SERIES, jnp.float32)
    expected = in_a_loop(stopper, SERIES)
    assert expected.should_stop
    same(jax.jit(functools.partial(in_a_scan, stopper))(values), expected)
    lanes = jnp.stack([values[::-1], values, values * 2])
    batch = jax.jit(jax.vmap(functools.partial(in_a_scan, stopper)))(lanes)
    same(jax.tree.map(lambda leaf: leaf[1], batch), expected)
    left = jax.jit(functools.partial(in_a_while_loop, stopper))(values)
    false = jnp.asarray(False)
    same(left._replace(is_best=false, is_significant=false), expected)


def test_patience_and_deltas_may_be_traced():
    values = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]

    def member(n, delta, threshold):
        rule = stop.any_of(stop.patience(n, min_delta=delta), stop.target(threshold))
        return feed(early_stopping(rule), values)

    state = jax.vmap(member)(
        jnp.asarray([1, 2, 9, 9]),
        jnp.asarray([0.0, 1.5, 0.0, 0.0]),
        jnp.asarray([0.0, 0.0, 0.0, 2.5]),
    )
    assert state.stopped_at.tolist() == [2, 2, -1, 1]
    reasons = [StopReason.PATIENCE, StopReason.PATIENCE, 0, StopReason.TARGET]
    assert state.stop_reason.tolist() == reasons


def test_conditions_may_hold_an_update():
    stopper = early_stopping(stop.patience(2))

    @jax.jit
    def maybe(evaluates, state):
        return jax.lax.cond(
            evaluates, lambda s: stopper.update(1.0, s), lambda s: s, state
        )

    state = maybe(True, stopper.init())
    state = maybe(False, state)
    assert int(state.num_evals) == 1


def test_best_and_average_take_no_memory_in_a_loop():
    """The carry is aliased; the only copy is that of the branch that takes the best."""
    stopper = early_stopping(stop.patience(3), average_last=2)
    size = 1 << 16

    def loop(params, state):
        def body(carry):
            params, state = carry
            params = jax.lax.fori_loop(0, 3, lambda i, p: p * 0.5 + i, params)
            return params, stopper.update(params[0], state, params)

        return jax.lax.while_loop(
            lambda carry: ~carry[1].should_stop, body, (params, state)
        )

    params = jnp.ones(size)
    lowered = jax.jit(loop, donate_argnums=(0, 1)).lower(params, stopper.init(params))
    compiled = lowered.compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < size
    lines = (compiled.as_text() or "").splitlines()
    copies = [line for line in lines if f"f32[{size}]{{0}} copy(" in line]
    assert len(copies) == 1


def test_sharded_parameters_stay_sharded(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    stopper = early_stopping(stop.patience(3), average_last=2)
    state = stopper.init(params)
    state = stopper.update(jnp.sum(params), state, params)
    state = stopper.update(1.0, state, params + 1)
    assert state.best_params.sharding.is_equivalent_to(sharding, 1)
    best = stopper.best(state, params)
    assert best.sharding.is_equivalent_to(sharding, 1)
    same(best, params + 1)
    average = stopper.average(state, params)
    for mean in (average, *state.recent_params.block_means):
        assert mean.sharding.is_equivalent_to(sharding, 1)
    same(average, params + 0.5)


def test_explicitly_sharded_parameters_keep_their_type(explicit_mesh):
    sharding = NamedSharding(explicit_mesh, PartitionSpec("data"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    stopper = early_stopping(stop.patience(3), average_last=2)
    state = stopper.init(params)
    for value in [2.0, 1.0, 3.0]:
        state = stopper.update(value, state, params)
    average = stopper.average(state, params)
    for kept in (state.best_params, *state.recent_params.block_means, average):
        assert jax.typeof(kept) == jax.typeof(params)


# Resume -------------------------------------------------------------------------


def test_a_run_cut_anywhere_and_resumed_is_the_same():
    serialization = pytest.importorskip("flax.serialization")
    stopper = everything()
    update = functools.partial(stopper.update, **FEEDS)
    expected = [stopper.init(jnp.asarray(-1.0))]
    for i, value in enumerate(SERIES):
        expected.append(update(value, expected[-1], jnp.asarray(float(i))))
    for cut in range(len(SERIES) + 1):
        saved = serialization.to_bytes(expected[cut])
        target = stopper.init(jnp.asarray(-1.0))
        state = serialization.from_bytes(target, saved)
        same(state, expected[cut])
        for i, value in list(enumerate(SERIES))[cut:]:
            state = update(value, state, jnp.asarray(float(i)))
        same(state, expected[-1])


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            # XLA takes subnormal numbers for 0.
            st.floats(width=32, allow_subnormal=False),
            st.integers(-3, 3).map(float),
            st.just(NAN),
        ),
        max_size=12,
    ),
    cut=st.integers(0, 12),
)
def test_values_of_any_kind_keep_the_best_and_the_invariants(values, cut):
    serialization = pytest.importorskip("flax.serialization")
    stopper = everything()
    state = stopper.init(jnp.asarray(-1.0))
    best, index = INF, -1
    for i, value in enumerate(values):
        if i == cut:
            data = serialization.to_state_dict(state)
            state = serialization.from_state_dict(stopper.init(jnp.asarray(-1.0)), data)
        stopped = bool(state.should_stop)
        state = stopper.update(value, state, jnp.asarray(float(i)), **FEEDS)
        value = float(np.float32(value))
        if not stopped and i >= 1 and math.isfinite(value) and value < best:
            best, index = value, i
        assert float(state.best_value) == best
        assert int(state.best_eval) == int(state.best_params) == index
        assert bool(state.is_best) == (index == i)
        assert bool(state.should_stop) == (int(state.stop_reason) != 0)
        assert bool(state.should_stop) == (int(state.stopped_at) >= 0)
        for leaf in jax.tree.leaves(state):
            assert not np.isnan(leaf).any()


# Words ----------------------------------------------------------------------------


def test_explain_tells_how_the_run_stands():
    stopper = early_stopping(stop.patience(2), nonfinite="wait")
    assert explain(stopper.init()) == "running, no finite value yet"
    state = feed(stopper, [NAN])
    assert explain(state) == "running, no finite value yet, 1 without a better one"
    assert explain(feed(stopper, [0.5], step=0)).endswith("evaluation 0 (step 0)")
    state = feed(stopper, [0.5, 0.75], step=30)
    assert explain(state) == (
        "running, best 0.5 at evaluation 0 (step 30), 1 without a better one"
    )
    state = feed(stopper, [1.0], state)
    assert explain(state) == (
        "stopped at evaluation 2 (PATIENCE), best 0.5 at evaluation 0 (step 30). "
        + StopReason.PATIENCE.message
    )


def test_explain_refuses_a_population():
    stopper = early_stopping(stop.patience(2))
    state = jax.vmap(stopper.update)(
        jnp.ones(3), jax.vmap(lambda _: stopper.init())(jnp.ones(3))
    )
    with pytest.raises(ValueError, match=r"shape \(3,\)\. Take one member"):
        explain(state)


def test_reasons_keep_their_numbers():
    """They are in checkpoints: add new ones at the end."""
    assert [reason.name for reason in StopReason] == [
        "RUNNING",
        "PATIENCE",
        "TARGET",
        "DIVERGED",
        "NONFINITE",
        "BUDGET",
        "GENERALIZATION_LOSS",
        "PROGRESS_QUOTIENT",
        "SUCCESSIVE_RISES",
        "LAG",
        "OVERFITTING",
        "SKIP_STORM",
        "PLATEAU",
        "EXTERNAL",
    ]
    assert [int(reason) for reason in StopReason] == list(range(14))
    assert all(reason.message.endswith(".") for reason in StopReason)


# Errors ---------------------------------------------------------------------------


def plain():
    return early_stopping(stop.patience(2))


def with_params(params):
    stopper = plain()
    stopper.update(1.0, stopper.init({"w": jnp.ones(3)}), params)


def test_missing_params_are_named():
    with pytest.raises(ValueError, match=r"`params` of `update` are missing: `init`"):
        with_params(None)


def test_params_without_a_place_are_refused():
    stopper = plain()
    with pytest.raises(ValueError, match=r"`params` .* have no place .* `init\(params"):
        stopper.update(1.0, stopper.init(), {"w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": jnp.ones(3)}, "must have the structure given to `init`"),
        ({"w": jnp.ones(4)}, r"at \['w'\] float32\[3\], got float32\[4\]"),
        ({"w": jnp.ones(3, jnp.bfloat16)}, r"float32\[3\], got bfloat16\[3\]"),
    ],
    ids=["structure", "shape", "dtype"],
)
def test_params_unlike_those_of_init_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        with_params(params)
    stopper = plain()
    with pytest.raises(ValueError, match=f"`default` of `best`.*{message}"):
        stopper.best(stopper.init({"w": jnp.ones(3)}), params)


def test_best_without_params_says_what_to_do():
    stopper = plain()
    with pytest.raises(ValueError, match=r"made by `init\(\)`\. Make it by `init\(p"):
        stopper.best(stopper.init(), {"w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "up"}, "`mode` must be one of 'min', 'max', got 'up'"),
        ({"nonfinite": "skip"}, "`nonfinite` must be one of 'stop', .* got 'skip'"),
        ({"best_on": "mean"}, "`best_on` must be one of 'raw', .* got 'mean'"),
        (
            {"max_nonfinite": -1},
            "`max_nonfinite` must be a whole number of at least 0, got -1",
        ),
        ({"warmup": -1}, "`warmup` must be a whole number of at least 0, got -1"),
    ],
    ids=["mode", "nonfinite", "best_on", "max_nonfinite", "warmup"],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        early_stopping(stop.patience(2), **options)


def test_what_is_no_rule_or_smoother_is_refused():
    with pytest.raises(TypeError, match=r"`rule` of `early_stopping` must be .* got 5"):
        loose(5)
    with pytest.raises(TypeError, match=r"`smooth` must be a smoother .* got 0\.9"):
        loose(stop.patience(2), smooth=0.9)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (jnp.ones(2), r"`value` must be a scalar, got shape \(2,\)\. Reduce it"),
        (1j, "`value` must be real, got dtype complex"),
        ({"loss": 1.0}, r"`value` is a dict with keys \['loss'\]: .*key=\.\.\."),
    ],
    ids=["shape", "complex", "dict"],
)
def test_a_wrong_value_is_named(value, message):
    stopper = plain()
    with pytest.raises(ValueError, match=message):
        stopper.update(value, stopper.init())


def test_unknown_and_unmet_keys_are_named():
    rule = stop.monitor("acc", stop.patience(2), mode="max")
    stopper = early_stopping(rule, key="loss")
    with pytest.raises(ValueError, match=r"has no key 'acc'.* it has \['loss'\]"):
        stopper.update({"loss": 1.0}, stopper.init())
    with pytest.raises(ValueError, match=r"must be a dict .*\['acc'\], got float"):
        stopper.update(1.0, stopper.init())


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (stop.patience(seconds=3.0), "seconds"),
        (stop.budget(steps=3), "step"),
        (stop.overfitting(2), "train_value"),
        (stop.any_of(stop.patience(2), stop.skip_storm(2)), "opt_state"),
    ],
    ids=["seconds", "step", "train_value", "opt_state"],
)
def test_missing_extras_are_named(rule, name):
    stopper = early_stopping(rule)
    assert stopper.needs == {name}
    with pytest.raises(ValueError, match=rf"`{name}` is missing: .*{name}=\.\.\."):
        stopper.update(1.0, stopper.init())


def test_a_state_of_something_else_is_refused():
    stopper = plain()
    wrong: Any = {"w": jnp.ones(3)}
    for call in (
        lambda: stopper.update(1.0, wrong),
        lambda: stopper.best(wrong, wrong),
        lambda: stopper.reset(wrong),
    ):
        with pytest.raises(TypeError, match=r"`EarlyStoppingState` .* got dict"):
            call()


def test_a_state_of_another_stopper_is_refused():
    other = early_stopping(stop.lag(2))
    with pytest.raises(ValueError, match=r"`state` belongs to another stopper"):
        plain().update(1.0, other.init())


def test_every_field_of_the_state_is_documented():
    for field in EarlyStoppingState._fields:
        assert f"  {field}: " in (EarlyStoppingState.__doc__ or "")
