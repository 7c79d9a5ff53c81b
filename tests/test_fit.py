"""`fit`: the host loop. Oracles are plain Python loops in float64."""

import gc
import logging
import signal
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import optax_guard as og
from optax_guard.flax import TrainState, fit
from tests.strategies import unlike_lowest_jax

# loss = mean((w - x)^2) with w of shape (2,): the gradient is w - x.
START = np.array([1.0, -1.0])
RATE = 0.1
CLIP = 0.5


def targets(step):
    """A batch that depends on the step alone, as resumption needs."""
    rng = np.random.default_rng(step)
    return rng.normal(size=2).astype(np.float32)


def loss_fn(params, x):
    return jnp.mean((params["w"] - x) ** 2)


def train_step(state, x):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
    return state.apply_gradients(grads=grads, value=loss), {"loss": loss}


def flax_step(state, x):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def evaluate(state):
    return jnp.sum(state.params["w"] ** 2)


# One for all tests: a step is compiled for each optimizer that it meets.
GUARDED = og.guard(optax.sgd(RATE), clip=CLIP, max_consecutive_skips=3)


def made(tx: optax.GradientTransformation = GUARDED, cls: Any = TrainState, **fields):
    params = {"w": jnp.array(START, jnp.float32)}
    return cls.create(apply_fn=str, params=params, tx=tx, **fields)


def oracle(num_steps, data=targets):
    """Parameters after, loss, norm before and after clipping, of each step; float64."""
    w, found = START.copy(), []
    for step in range(num_steps):
        x = np.float64(data(step))
        grad = w - x
        norm = np.sqrt(np.sum(grad**2))
        factor = min(1.0, CLIP / norm)
        loss = np.mean((w - x) ** 2)
        if np.isfinite(norm):
            w = w - RATE * factor * grad
        found.append((w, loss, norm, factor * norm))
    return found


def scripted(values):
    """An `evaluate` that returns one value after the other, and -1 before step 1."""
    rest = iter(values)
    return lambda state: next(rest) if int(state.step) else -1.0


def moved_by(steps, i):
    """How far a step moved the parameters, in units of their norm before it."""
    before = np.asarray(START, float) if i == 0 else steps[i - 1][0]
    return np.linalg.norm(steps[i][0] - before) / np.linalg.norm(before)


def test_rows_are_those_of_a_plain_loop():
    result = fit(
        made(), train_step, targets, num_steps=7, eval_every=3, evaluate=evaluate
    )
    steps = oracle(7)
    assert [row["step"] for row in result.history] == [3, 6, 7]
    for row, (begin, end) in zip(result.history, [(0, 3), (3, 6), (6, 7)], strict=True):
        _, losses, before, after = zip(*steps[begin:end], strict=True)
        worst = int(np.argmax(before))
        expected = {
            "step": end,
            "train_loss": np.mean(losses),
            "grad_norm": before[worst],
            "clipped_norm": after[worst],
            "clip_threshold": CLIP,
            "grad_norm_mean": np.mean(before),
            "clip_rate": np.mean(np.array(before) > CLIP),
            "nonfinite_rate": 0.0,
            "skip_rate": 0.0,
            "num_skipped": 0,
            "value": np.sum(steps[end - 1][0] ** 2),
            "update_ratio": moved_by(steps, end - 1),
        }
        if begin == 0:
            expected["initial_value"] = np.sum(np.square(START))
        assert row == pytest.approx(expected, rel=1e-5)
        assert {type(x) for x in row.values()} <= {int, float}
    np.testing.assert_allclose(result.state.params["w"], steps[-1][0], rtol=1e-5)
    assert result.state.step == 7
    assert result.stop is result.best_params is None
    assert not result.interrupted


def with_nan(*bad):
    return lambda step: targets(step) * (np.nan if step in bad else 1)


def test_skipped_steps_are_counted_and_enter_no_mean():
    data = with_nan(1, 4)
    rows = fit(made(), train_step, data, num_steps=6, eval_every=3).history
    steps = oracle(6, data)
    for row, kept in zip(rows, [(0, 2), (3, 5)], strict=True):
        assert row["train_loss"] == pytest.approx(np.mean([steps[i][1] for i in kept]))
        assert row["grad_norm"] == pytest.approx(max(steps[i][2] for i in kept))
        assert row["grad_norm_mean"] == pytest.approx(
            np.mean([steps[i][2] for i in kept])
        )
        assert row["skip_rate"] == row["nonfinite_rate"] == pytest.approx(1 / 3)
    assert [row["num_skipped"] for row in rows] == [1, 2]


def test_interval_without_a_finite_step_says_nan():
    [_, row] = fit(
        made(), train_step, with_nan(2, 3), num_steps=4, eval_every=2
    ).history
    assert np.isnan([row[k] for k in ("train_loss", "grad_norm", "clipped_norm")]).all()
    assert row["skip_rate"] == 1


def test_bare_loss_and_flaxs_own_state_without_a_guard():
    tx = optax.sgd(RATE)
    state = made(tx, train_state.TrainState)
    result = fit(state, flax_step, targets, num_steps=3, eval_every=2)
    for step in range(3):
        state, _ = flax_step(state, targets(step))
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-6)
    assert [set(row) for row in result.history] == [
        {"step", "train_loss", "update_ratio"}
    ] * 2


def test_other_metrics_of_the_step_are_means_and_those_of_the_guard_not_repeated():
    def step(state, x):
        state, found = train_step(state, x)
        return state, {**found, "first": x[0] > 0, **og.metrics(state)}

    [row] = fit(made(), step, targets, num_steps=4, eval_every=4).history
    assert row["train_first"] == np.mean([targets(i)[0] > 0 for i in range(4)])
    assert {k for k in row if k.startswith("train_")} == {"train_loss", "train_first"}


def test_how_far_a_clip_by_value_turns_steps_is_told_as_a_mean():
    tx = og.guard(optax.sgd(0.0), clip=og.clip_by_value(0.5))
    [row] = fit(made(tx), train_step, with_nan(1), num_steps=4, eval_every=4).history
    cosines, shares = [], []
    for step in (0, 2, 3):
        grad = START - np.float64(targets(step))
        clipped = np.clip(grad, -0.5, 0.5)
        lengths = np.linalg.norm(grad) * np.linalg.norm(clipped)
        cosines.append(grad @ clipped / lengths)
        shares.append(np.mean(np.abs(grad) > 0.5))
    assert row["update_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert 0 < np.mean(shares) < 1
    assert row["entries_clipped"] == pytest.approx(np.mean(shares))


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
def test_gradient_accumulation_counts_updates_not_steps():
    tx = optax.MultiSteps(GUARDED, every_k_schedule=2).gradient_transformation()
    [row] = fit(made(tx), train_step, targets, num_steps=5, eval_every=5).history
    w, norms = START.copy(), []
    for step in (0, 2):
        grad = w - (np.float64(targets(step)) + targets(step + 1)) / 2
        norms.append(np.sqrt(np.sum(grad**2)))
        w = w - RATE * min(1.0, CLIP / norms[-1]) * grad
    assert row["grad_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert row["grad_norm_mean"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert row["clip_rate"] == np.mean(np.array(norms) > CLIP)


def test_dropped_micro_batches_are_counted_beside_skipped_steps():
    tx = og.accumulate(GUARDED, 2)
    data = with_nan(1, 4, 5)
    result = fit(made(tx), train_step, data, num_steps=8, eval_every=4)
    rows = result.history
    assert [row["num_dropped"] for row in rows] == [1, 3]
    assert [row["num_skipped"] for row in rows] == [0, 1]
    # A share of accumulated steps, of which there are two in each row.
    assert [row["skip_rate"] for row in rows] == [0.0, 0.5]
    w = START.copy()
    for good in ([0], [2, 3], [6, 7]):
        grad = w - np.mean([np.float64(targets(step)) for step in good], axis=0)
        w = w - RATE * min(1.0, CLIP / np.sqrt(np.sum(grad**2))) * grad
    np.testing.assert_allclose(result.state.params["w"], w, rtol=1e-5)


def explained(result):
    assert result.stop is not None
    return og.explain(result.stop)


# Early stopping ------------------------------------------------------------------


def test_stop_comes_one_interval_late_and_best_parameters_do_not():
    values = [3.0, 1.0, 2.0, 2.5, 0.1, 0.1]
    stopper = og.early_stopping(og.stop.patience(2))
    result = fit(
        made(),
        train_step,
        targets,
        num_steps=20,
        eval_every=2,
        evaluate=scripted(values),
        stopper=stopper,
    )
    assert isinstance(result.stop, og.EarlyStoppingState)
    assert result.stop.should_stop
    assert result.stop.stopped_at == 3
    # Evaluation 3 is at step 8; steps 9 and 10 were under way.
    assert result.state.step == 10
    assert [row["value"] for row in result.history] == values[:4]
    assert result.stop.best_step == 4
    np.testing.assert_allclose(result.best_params["w"], oracle(4)[-1][0], rtol=1e-5)


def test_stop_at_the_last_evaluation_is_seen():
    stopper = og.early_stopping(og.stop.target(1.0))
    result = fit(
        made(),
        train_step,
        targets,
        num_steps=4,
        eval_every=2,
        evaluate=scripted([2.0, 0.5]),
        stopper=stopper,
    )
    assert explained(result).startswith("stopped at evaluation 2 (TARGET)")
    assert result.state.step == 4
    assert [row.get("stop_reason") for row in result.history] == [
        None,
        og.StopReason.TARGET,
    ]


def test_run_that_came_to_its_end_says_so_and_keeps_its_baseline():
    result = fit(
        made(),
        train_step,
        targets,
        num_steps=4,
        eval_every=2,
        evaluate=scripted([2.0, 1.5]),
        stopper=og.early_stopping(og.stop.target(1.0)),
        baseline=2.5,
    )
    assert og.explain(result).startswith("took all of its 4 steps, best 1.5")
    assert [row.get("baseline") for row in result.history] == [2.5, None]
    assert [row.get("initial_value") for row in result.history] == [-1.0, None]


def test_rows_come_after_the_next_steps_and_before_the_next_evaluation():
    events = []

    def batches(step):
        events.append(f"step {step}")
        return targets(step)

    def evaluated(state):
        events.append("evaluate")
        return evaluate(state)

    fit(
        made(),
        train_step,
        batches,
        num_steps=6,
        eval_every=2,
        evaluate=evaluated,
        loggers=[lambda step, row: events.append(f"row {step}")],
    )
    assert events == [
        *("evaluate", "step 0", "step 1", "evaluate"),
        *("step 2", "step 3", "row 2", "evaluate"),
        *("step 4", "step 5", "row 4", "evaluate", "row 6"),
    ]


def test_next_steps_are_dispatched_before_the_flag_is_read(monkeypatch):
    """From an evaluation to the end of the next chunk, the host reads no array."""
    kind: Any = type(jnp.zeros(()))
    events = []

    def recorded(method):
        def recording(self, *args, **kwargs):
            events.append("wait")
            return method(self, *args, **kwargs)

        return recording

    state = made()
    # Compiled before, because compilation itself reads constants.
    options: dict[str, Any] = {"num_steps": 6, "eval_every": 2, "evaluate": evaluate}
    options["stopper"] = og.early_stopping(og.stop.patience(9))
    fit(state, train_step, targets, **options)
    for name in (
        "__bool__",
        "__float__",
        "__int__",
        "__array__",
        "item",
        "block_until_ready",
    ):
        monkeypatch.setattr(kind, name, recorded(getattr(kind, name)))
    # Where all of them, and `jax.device_get`, end up.
    monkeypatch.setattr(kind, "_value", property(recorded(kind._value.fget)))

    def batches(step):
        events.append(step)
        return targets(step)

    fit(state, train_step, batches, **options)
    order = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]
    # The first wait reads where the state stands.
    assert order == ["wait", 0, 1, 2, 3, "wait", 4, 5, "wait"]


@unlike_lowest_jax("the dispatch waits to donate a buffer that is being read")
def test_next_steps_are_dispatched_while_the_evaluation_runs():
    """So nothing, in whatever way, has waited for what it found."""
    values, was_ready = [], []

    @jax.jit
    def slow(state):
        matrix = jnp.full((400, 400), jnp.sum(state.params["w"]))
        matrix = jax.lax.fori_loop(0, 300, lambda i, a: (a @ a) * 1e-3, matrix)
        return jnp.minimum(matrix[0, 0], 1.0)

    def batches(step):
        if step >= 2:
            was_ready.append(values[1].is_ready())
        return targets(step)

    def evaluated(state):
        values.append(slow(state))
        return values[-1]

    options: dict[str, Any] = {"stopper": og.early_stopping(og.stop.patience(9))}
    options |= {"num_steps": 4, "eval_every": 2}
    fit(made(), train_step, targets, evaluate=slow, **options)
    fit(made(), train_step, batches, evaluate=evaluated, **options)
    assert was_ready == [False, False]


def test_best_averages_belong_to_the_best_parameters():
    state = made(batch_stats={"mean": jnp.zeros(())})

    def step(state, x):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
        stats = {"mean": state.batch_stats["mean"] + 1}
        state = state.apply_gradients(grads=grads, value=loss, batch_stats=stats)
        return state, loss

    result = fit(
        state,
        step,
        targets,
        num_steps=6,
        eval_every=2,
        evaluate=scripted([2.0, 1.0, 3.0]),
        stopper=og.early_stopping(og.stop.patience(5)),
    )
    assert result.best_batch_stats == {"mean": 4.0}
    assert result.state.batch_stats == {"mean": 6.0}
    np.testing.assert_allclose(result.best_params["w"], oracle(4)[-1][0], rtol=1e-5)


def test_without_a_finite_value_the_best_parameters_are_the_last():
    result = fit(
        made(),
        train_step,
        targets,
        num_steps=2,
        eval_every=2,
        evaluate=lambda state: np.nan,
        stopper=og.early_stopping(og.stop.patience(5)),
    )
    np.testing.assert_array_equal(result.best_params["w"], result.state.params["w"])


class Seen(NamedTuple):
    train_value: jax.Array
    step: jax.Array
    seconds: jax.Array
    num_skipped: jax.Array


def spying_rule():
    """Keeps in its state what the stopper was told last."""

    def update(observation, state):
        [guard] = og.find_states(observation.opt_state, og.GuardState)
        seen = Seen(
            observation.train_value[0],
            observation.step,
            observation.seconds,
            guard.num_skipped,
        )
        return og.stop.Verdict(jnp.asarray(False), jnp.asarray(0, jnp.int32)), seen

    def init():
        return Seen(*(jnp.asarray(0, t) for t in ("f4", "i4", "f4", "i4")))

    needs = frozenset({"train_value", "step", "seconds", "opt_state"})
    return og.stop.StopRule(init, update, needs)


def test_stopper_is_told_all_that_a_rule_may_need(monkeypatch):
    now = [100.0]

    def evaluate_for_three_seconds(state):
        now[0] += 3.0
        return 1.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    result = fit(
        made(),
        train_step,
        with_nan(3),
        num_steps=4,
        eval_every=2,
        evaluate=evaluate_for_three_seconds,
        stopper=og.early_stopping(spying_rule()),
    )
    assert result.stop is not None
    seen = result.stop.rule_state
    assert seen.step == 4
    assert seen.num_skipped == 1
    assert seen.train_value == pytest.approx(oracle(3)[2][1])
    assert seen.seconds == 6.0


def test_plateau_reduces_the_learning_rate():
    tx = optax.chain(optax.sgd(RATE), og.stop.scale_by_plateau())
    stopper = og.early_stopping(og.stop.plateau(1, factor=0.5, max_reductions=1))
    result = fit(
        made(og.guard(tx)),
        train_step,
        lambda step: np.zeros(2, np.float32),
        num_steps=8,
        eval_every=2,
        evaluate=scripted([1.0, 1.0, 1.0, 1.0]),
        stopper=stopper,
    )
    # One evaluation sets the best, the second reduces, the third stops: six steps,
    # the last two of which ran at half the rate; two more were under way.
    assert explained(result).startswith("stopped at evaluation 3 (PLATEAU)")
    expected = START * (1 - RATE) ** 4 * (1 - RATE / 2) ** 4
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)


def test_plateau_without_its_scale_is_refused_before_the_first_step():
    def batches(step):
        raise AssertionError("no step must be taken")

    with pytest.raises(ValueError, match=r"put `stop.scale_by_plateau\(\)` last"):
        fit(
            made(),
            train_step,
            batches,
            num_steps=2,
            eval_every=1,
            evaluate=evaluate,
            stopper=og.early_stopping(og.stop.plateau(1)),
        )


def test_dict_of_values_is_in_the_row_and_its_key_is_judged():
    stopper = og.early_stopping(og.stop.target(0.9), mode="max", key="val_accuracy")
    result = fit(
        made(),
        train_step,
        targets,
        num_steps=2,
        eval_every=1,
        evaluate=lambda state: {"val_loss": 0.1, "val_accuracy": jnp.asarray(0.95)},
        stopper=stopper,
    )
    assert explained(result).startswith("stopped at evaluation 1 (TARGET)")
    assert result.history[0]["val_loss"] == np.float32(0.1)


# The guard -----------------------------------------------------------------------


def test_exhausted_guard_raises_and_names_the_last_skipped_steps():
    rows = []
    with pytest.raises(og.GuardExhaustedError) as caught:
        fit(
            made(),
            train_step,
            with_nan(*range(3, 20)),
            num_steps=20,
            eval_every=3,
            loggers=[lambda step, row: rows.append(step)],
        )
    message = str(caught.value)
    assert "skipped the last 3 step(s) in a row" in message
    assert "update 5: NONFINITE, norm nan, loss nan; NaN in w" in message
    assert rows == [3, 6]


def test_exhaustion_at_the_very_end_raises_too():
    with pytest.raises(og.GuardExhaustedError):
        fit(made(), train_step, with_nan(1, 2, 3), num_steps=4, eval_every=4)


def test_stopper_that_stops_at_exhaustion_has_the_word():
    result = fit(
        made(),
        train_step,
        with_nan(*range(2, 20)),
        num_steps=20,
        eval_every=4,
        evaluate=evaluate,
        stopper=og.early_stopping(og.stop.skip_storm(2)),
    )
    assert "(SKIP_STORM)" in explained(result)


# Data, state, resumption ---------------------------------------------------------


def test_state_that_was_given_stays_usable():
    state = made()
    first = fit(state, train_step, targets, num_steps=2, eval_every=2)
    again = fit(state, train_step, targets, num_steps=2, eval_every=2)
    assert first.history == again.history
    np.testing.assert_array_equal(state.params["w"], START)


def test_step_is_traced_once_also_by_the_next_run():
    num_traces = 0

    def counted(state, x):
        nonlocal num_traces
        num_traces += 1
        return train_step(state, x)

    for _ in range(2):
        fit(made(), counted, targets, num_steps=5, eval_every=2, evaluate=evaluate)
    assert num_traces == 1


def test_flaxs_own_state_is_traced_once_too():
    num_traces = 0

    def counted(state, x):
        nonlocal num_traces
        num_traces += 1
        return flax_step(state, x)

    state = made(optax.sgd(RATE), train_state.TrainState)
    fit(state, counted, targets, num_steps=3, eval_every=2)
    assert num_traces == 1


class Trainer:
    """Its step is a bound method: a new object each time it is read."""

    def __init__(self):
        self.num_traces = 0

    def step(self, state, x):
        self.num_traces += 1
        return state.replace(step=state.step + 1, params=state.params - x), 0.0


def test_step_that_is_a_method_is_traced_once_by_two_runs():
    trainer = Trainer()
    state = TrainState.create(apply_fn=str, params=jnp.zeros(()), tx=optax.sgd(1.0))
    for _ in range(2):
        fit(state, trainer.step, lambda step: 1.0, num_steps=2, eval_every=2)
    assert trainer.num_traces == 1


class Held:
    """Stands for data that a function closes over."""

    value = 1.0


def test_data_that_functions_close_over_is_released_after_the_run():
    def run():
        held = [Held(), Held(), Trainer()]

        def step(state, x):
            return state.replace(step=state.step + 1), held[0].value

        def update(observation, state):
            is_over = observation.value > held[1].value
            return og.stop.Verdict(is_over, jnp.asarray(0, jnp.int32)), state

        state = TrainState.create(apply_fn=str, params=jnp.zeros(()), tx=optax.sgd(1.0))
        for train_step in (step, held[2].step):
            fit(
                state,
                train_step,
                lambda step: 1.0,
                num_steps=2,
                eval_every=1,
                evaluate=lambda state: 0.0,
                stopper=og.early_stopping(og.stop.StopRule(lambda: (), update)),
            )
        return [weakref.ref(each) for each in held]

    found = run()
    gc.collect()
    assert [ref() for ref in found] == [None] * 3


def test_step_on_a_mesh_is_compiled_once(mesh, caplog):
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def small_step(state, x):
        return train_step(state, jnp.sum(x))

    with jax.log_compiles():
        fit(
            made(optax.sgd(RATE)),
            small_step,
            lambda step: jax.device_put(np.zeros(8, np.float32), data),
            num_steps=4,
            eval_every=2,
        )
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation")]
    assert sum("jit(run_step)" in message for message in compiled) == 1


def test_shardings_are_kept(mesh):
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones(8), data)}
    state = TrainState.create(apply_fn=str, params=params, tx=GUARDED)
    batch = jax.device_put(jnp.zeros(8), data)
    result = fit(state, train_step, lambda step: batch, num_steps=2, eval_every=1)
    assert result.state.params["w"].sharding.is_equivalent_to(data, 1)


def test_run_in_two_parts_is_the_run_in_one():
    whole = fit(made(), train_step, targets, num_steps=6, eval_every=2)
    part = fit(made(), train_step, targets, num_steps=4, eval_every=2)
    rest = fit(part.state, train_step, targets, num_steps=6, eval_every=2)
    assert part.history + rest.history == whole.history
    np.testing.assert_array_equal(rest.state.params["w"], whole.state.params["w"])


def test_resumed_run_evaluates_at_the_same_steps():
    part = fit(made(), train_step, targets, num_steps=3, eval_every=2)
    rest = fit(part.state, train_step, targets, num_steps=6, eval_every=2)
    assert [row["step"] for row in rest.history] == [4, 6]


def test_iterable_gives_what_the_function_gives():
    one = fit(made(), train_step, targets, num_steps=4, eval_every=2)
    other = fit(
        made(), train_step, (targets(i) for i in range(9)), num_steps=4, eval_every=2
    )
    assert one.history == other.history


@pytest.mark.parametrize(("num_batches", "expected"), [(3, [2, 3]), (4, [2, 4])])
def test_iterable_that_ends_early_ends_the_run_with_a_warning(num_batches, expected):
    data = [targets(i) for i in range(num_batches)]
    expected_text = rf"ended after step {num_batches} of 10, "
    with pytest.warns(UserWarning, match=expected_text) as caught:
        result = fit(made(), train_step, data, num_steps=10, eval_every=2)
    # The warning points at the line that calls `fit`.
    assert [warning.filename for warning in caught] == [__file__]
    assert [row["step"] for row in result.history] == expected


# Loggers and interruptions -------------------------------------------------------


class Writer:
    def __init__(self):
        self.calls = []

    def write_scalars(self, step, scalars):
        self.calls.append((step, scalars["train/loss"]))


def test_loggers_are_callables_or_have_write_scalars():
    writer, calls = Writer(), []

    def log(step, row):
        calls.append((step, row.pop("train_loss")))

    result = fit(
        made(), train_step, targets, num_steps=4, eval_every=2, loggers=[log, writer]
    )
    # What a logger does to its row is its own affair.
    assert [(r["step"], r["train_loss"]) for r in result.history] == calls
    assert calls == writer.calls


def test_rows_before_a_crash_reach_the_loggers():
    rows = []

    def batches(step):
        if step == 5:
            raise OSError("disk on fire")
        return targets(step)

    with pytest.raises(OSError, match="disk on fire"):
        fit(
            made(),
            train_step,
            batches,
            num_steps=9,
            eval_every=2,
            loggers=[lambda step, row: rows.append(step)],
        )
    assert rows == [2, 4]


@pytest.fixture
def python_interrupts():
    """Python's own handler, which a process in the background starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_interrupts")
def test_first_interrupt_returns_what_there_is():
    def batches(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return targets(step)

    before = signal.getsignal(signal.SIGINT)
    result = fit(
        made(),
        train_step,
        batches,
        num_steps=9,
        eval_every=2,
        evaluate=evaluate,
        stopper=og.early_stopping(og.stop.patience(9)),
    )
    assert result.interrupted
    assert [row["step"] for row in result.history] == [2, 4]
    assert result.state.step == 6
    assert np.isfinite(result.best_params["w"]).all()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("python_interrupts")
def test_second_interrupt_raises():
    rows = []

    def batches(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return targets(step)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(
            made(),
            train_step,
            batches,
            num_steps=9,
            eval_every=2,
            loggers=[lambda step, row: rows.append(step)],
        )
    assert rows == [2, 4]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_the_run_when_an_early_stop_would():
    def batches(step):
        if step == 3:
            # Schedulers and `timeout` send it twice.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return targets(step)

    rows = []
    result = fit(
        made(),
        train_step,
        batches,
        num_steps=9,
        eval_every=2,
        loggers=[lambda step, row: rows.append(step)],
    )
    assert result.preempted
    assert not result.interrupted
    assert rows == [row["step"] for row in result.history] == [2, 4]
    assert result.state.step == 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_at_the_end_of_a_run_ends_nothing():
    def batches(step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return targets(step)

    result = fit(made(), train_step, batches, num_steps=4, eval_every=2)
    assert not result.preempted
    assert result.state.step == 4


def test_handler_of_ones_own_is_left_in_force():
    received = []

    def batches(step):
        signal.raise_signal(signal.SIGTERM)
        return targets(step)

    before = signal.signal(signal.SIGTERM, lambda *args: received.append(args[0]))
    try:
        result = fit(made(), train_step, batches, num_steps=4, eval_every=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 4
    assert not result.preempted


def test_fit_runs_outside_of_the_main_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            fit(made(), train_step, targets, num_steps=2, eval_every=2)
        )
    )
    thread.start()
    thread.join()
    assert found[0].state.step == 2


def test_progress_prints_rows_as_they_come(capsys):
    pytest.importorskip("rich")
    fit(
        made(),
        train_step,
        targets,
        num_steps=4,
        eval_every=2,
        evaluate=lambda state: {"val_loss": 0.25},
        progress=True,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-1].strip() == "val loss"
    assert [line.split()[0] for line in lines] == ["step", "2", "4"]


def test_own_display_is_used_and_left_open():
    calls = []
    display: Any = SimpleNamespace(
        advance=lambda n: calls.append(n), row=lambda row: calls.append(row["step"])
    )
    fit(made(), train_step, targets, num_steps=3, eval_every=2, progress=display)
    assert calls == [1, 1, 1, 2, 3]


def test_linen_model_with_batch_norm_and_dropout_trains_through_a_bad_batch():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, is_training):
            x = nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x))
            x = nn.Dropout(0.2, deterministic=not is_training)(x)
            return nn.Dense(1)(x)[:, 0]

    model = Model()
    variables = model.init(jax.random.key(0), jnp.ones((1, 2)), is_training=False)
    tx = og.guard(optax.adam(0.05), clip=1.0)
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    def batches(step):
        x = np.random.default_rng(step).normal(size=(16, 2)).astype(np.float32)
        return x * (np.nan if step == 5 else 1), x.sum(1)

    def step(state, batch):
        x, y = batch

        def loss_fn(params):
            prediction, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                is_training=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(jax.random.key(7), state.step)},
            )
            return jnp.mean((prediction - y) ** 2), updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, value=loss, batch_stats=stats), loss

    @jax.jit
    def validate(state):
        x, y = batches(10**6)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        prediction = state.apply_fn(variables, x, is_training=False)
        return jnp.mean((prediction - y) ** 2)

    result = fit(
        state,
        step,
        batches,
        num_steps=40,
        eval_every=10,
        evaluate=validate,
        stopper=og.early_stopping(og.stop.patience(3)),
    )
    values = [row["value"] for row in result.history]
    assert min(values) < 0.7 * values[0]
    assert result.history[-1]["num_skipped"] == 1
    best = result.state.replace(
        params=result.best_params, batch_stats=result.best_batch_stats
    )
    assert validate(best) == pytest.approx(min(values), rel=1e-5)


# Bad input -----------------------------------------------------------------------


def wide_step(state, x):
    return state.replace(params={"w": jnp.zeros(3)}), 0.0


def half_step(state, x):
    return state.replace(params={"w": jnp.zeros(2, jnp.float16)}), 0.0


STOPPER = og.early_stopping(og.stop.patience(1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"num_steps": 0},
            ValueError,
            "`num_steps` must be a whole number of at",
        ),
        ({"eval_every": 0}, ValueError, "`eval_every` must be a whole number of at"),
        ({"batches": 3}, TypeError, "`batches` must be a function `step -> batch` or"),
        ({"batches": []}, ValueError, "`batches` is empty"),
        ({"state": {}}, TypeError, "`state` must have `step`, as a Flax `TrainState`"),
        ({"evaluate": 1.0}, TypeError, "`evaluate` must be a function of the state"),
        (
            {"evaluate": lambda state: state.params["w"]},
            ValueError,
            r"`evaluate` must return scalars, got an array of shape \(2,\)\. Take",
        ),
        (
            {"evaluate": lambda state: {"acc": "high"}},
            TypeError,
            "must return a number or a dict of numbers, got a `str` for 'acc'",
        ),
        (
            {"evaluate": lambda state: None},
            TypeError,
            "`evaluate` must return a number or a dict of numbers, got a `NoneType`",
        ),
        (
            {"evaluate": lambda state: {"grad_norm": 1.0}},
            ValueError,
            r"`evaluate` must not return \['grad_norm'\]: `fit` itself writes these",
        ),
        ({"stopper": STOPPER}, ValueError, "`stopper` needs `evaluate`"),
        (
            {"stopper": og.stop.patience(1), "evaluate": evaluate},
            TypeError,
            "`stopper` must be made by `early_stopping`",
        ),
        (
            {"stopper": STOPPER, "evaluate": lambda state: {"val_loss": 1.0}},
            ValueError,
            "`value` is a dict with keys .*name the one that defines the best",
        ),
        ({"loggers": print}, TypeError, "`loggers` must be a list of loggers, got"),
        ({"loggers": [3]}, TypeError, r"`loggers` must hold functions `\(step, row\)`"),
        (
            {"loggers": [logging.getLogger()]},
            TypeError,
            "`loggers` must hold functions",
        ),
        (
            {"train_step": lambda state, x: state},
            TypeError,
            r"`train_step` must return `\(state, metrics\)`, got a `TrainState`",
        ),
        (
            {"train_step": lambda state, x: (state, {"acc": 1.0})},
            ValueError,
            "`train_step` must return the loss, alone or in a dict under the key",
        ),
        (
            {"train_step": lambda state, x: (state, {"loss": x})},
            ValueError,
            "`train_step` must return scalars as metrics, got .* for 'loss'",
        ),
        (
            {"train_step": lambda state, x: (state.params, 0.0)},
            TypeError,
            "`train_step` must return a state of the structure it was given",
        ),
        (
            {"train_step": wide_step},
            TypeError,
            r"turned `state.params\['w'\]` from float32\[2\] into float32\[3\]",
        ),
        (
            {"train_step": half_step},
            TypeError,
            r"turned `state.params\['w'\]` from float32\[2\] into float16\[2\]",
        ),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    arguments: dict[str, Any] = {
        "state": made(),
        "train_step": train_step,
        "batches": targets,
        "num_steps": 2,
        "eval_every": 1,
        **changes,
    }
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_steps_that_are_done_already_are_refused():
    state = made().replace(step=jnp.asarray(5, jnp.int32))
    with pytest.raises(ValueError, match=r"above the steps done, 5, got 3: it is the"):
        fit(state, train_step, targets, num_steps=3, eval_every=1)
