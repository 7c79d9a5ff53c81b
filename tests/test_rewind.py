"""Rewinds: back to the best checkpoint, on with other batches and a lower rate.

The oracle is a plain loop in float64: loss = mean((w - x)^2), whose gradient is w - x.
"""

import json
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.flax import Checkpointer, Rewind, TrainState, fit, load_best
from optax_guard.loops import _store

START = np.array([1.0, -1.0])
RATE = 0.1
EVAL_EVERY = 2

SCALED = optax.chain(optax.sgd(RATE), og.stop.scale_by_plateau())
GUARDED = og.guard(SCALED, max_consecutive_skips=2)


def targets(step):
    return np.random.default_rng(step).normal(size=2).astype(np.float32)


def made(tx: Any = GUARDED, w: Any = START):
    params = {"w": jnp.asarray(w, jnp.float32)}
    return TrainState.create(apply_fn=str, params=params, tx=tx)


def train_step(state, x):
    loss = jnp.mean((state.params["w"] - x) ** 2)
    return state.apply_gradients(grads={"w": state.params["w"] - x}, value=loss), loss


def descend(w, steps, rate=RATE):
    for step in steps:
        w = w - rate * (w - np.float64(targets(step)))
    return w


def by_step(values):
    """An `evaluate` that depends on the step alone."""
    return lambda state: values.get(int(state.step), 1.0)


PATIENT = og.early_stopping(og.stop.patience(20))
DIVERGENCE = og.early_stopping(
    og.stop.any_of(og.stop.divergence(50.0), og.stop.patience(20))
)


def run(directory, rewind=None, *, values, num_steps=10, state=None, **changes):
    arguments: dict[str, Any] = {"stopper": DIVERGENCE, "batches": targets, **changes}
    return fit(
        made() if state is None else state,
        train_step,
        num_steps=num_steps,
        eval_every=EVAL_EVERY,
        evaluate=by_step(values),
        checkpointer=Checkpointer(directory),
        rewind=rewind,
        **arguments,
    )


# Best at step 4, diverged at 6, then better and better.
DIVERGES_ONCE = {2: 3.0, 4: 2.0, 6: 99.0, 8: 1.5, 10: 1.0}


def explained(result):
    assert result.stop is not None
    return og.explain(result.stop)


def column(result, name):
    return [row[name] for row in result.history]


def check_diverged_once(result):
    """Whether this is the run with a lower rate and batches 100 further."""
    expected = descend(descend(START, range(4)), range(106, 110), RATE / 2)
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(result.best_params["w"], expected, rtol=1e-5)
    assert result.state.step == 10
    assert column(result, "step") == [2, 4, 6, 8, 10]
    assert column(result, "rewinds") == [0, 0, 0, 1, 1]
    assert column(result, "value") == [3.0, 2.0, 99.0, 1.5, 1.0]
    assert explained(result) == "running, best 1 at evaluation 5 (step 10)"
    [(step, best_step, reason)] = result.rewinds
    assert (step, best_step, reason[:8]) == (6, 4, "DIVERGED")


def test_diverged_run_goes_back_and_on(tmp_path):
    warning = (
        r"At step 6, back to the checkpoint of step 4, rewind 1 of 2, with the "
        r"learning rate times 0.5 and batches of step \+ 100, because of DIVERGED: "
    )
    with pytest.warns(UserWarning, match=warning) as caught:
        result = run(tmp_path, Rewind(times=2, leave_out=100), values=DIVERGES_ONCE)
    # The warning points at the line that calls `fit`.
    assert [each.filename for each in caught] == [__file__]
    check_diverged_once(result)
    np.testing.assert_array_equal(
        load_best(tmp_path)["params"]["w"], result.best_params["w"]
    )


@pytest.mark.filterwarnings("ignore:At step 6, back to")
@pytest.mark.parametrize("cut", [7, 9])
def test_run_that_is_cut_after_a_rewind_goes_on_with_its_offset_and_rate(tmp_path, cut):
    """At 7, what is on disk is from before the rewind."""

    def crashing(step):
        if step == 100 + cut:
            raise OSError("disk on fire")
        return targets(step)

    rewind = Rewind(leave_out=100)
    with pytest.raises(OSError, match="disk on fire"):
        run(tmp_path, rewind, values=DIVERGES_ONCE, batches=crashing)
    check_diverged_once(run(tmp_path, rewind, values=DIVERGES_ONCE))


@pytest.mark.filterwarnings("ignore:At step 6, back to")
def test_sigterm_before_a_rewind_ends_the_run_there_and_it_goes_on(tmp_path):
    def ending(step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return targets(step)

    rewind = Rewind(leave_out=100)
    cut = run(tmp_path, rewind, values=DIVERGES_ONCE, batches=ending)
    assert cut.preempted
    assert (cut.state.step, column(cut, "step")) == (6, [2, 4, 6])
    check_diverged_once(run(tmp_path, rewind, values=DIVERGES_ONCE))


def test_without_rewinds_the_run_ends_as_before(tmp_path):
    result = run(tmp_path, values=DIVERGES_ONCE)
    assert explained(result).startswith("stopped at evaluation 3 (DIVERGED)")
    assert "rewinds" not in result.history[0]
    np.testing.assert_allclose(
        result.best_params["w"], descend(START, range(4)), rtol=1e-5
    )


def test_stop_because_training_is_done_is_no_reason_to_go_back(tmp_path):
    result = run(
        tmp_path,
        Rewind(),
        values=DIVERGES_ONCE,
        stopper=og.early_stopping(og.stop.target(2.5)),
    )
    assert explained(result).startswith("stopped at evaluation 2 (TARGET)")


def with_nan(*bad):
    return lambda step: targets(step) * (np.nan if step in bad else 1)


def test_exhausted_guard_goes_back_before_there_is_a_best(tmp_path):
    """And so does a value that is not finite, without a guard's help."""
    values = {2: 0.5, 4: 2.0, 6: 1.0}
    with pytest.warns(
        UserWarning, match=r"(?s)to the checkpoint of step 0.*times 1 and .*NaN in w"
    ):
        result = run(
            tmp_path,
            Rewind(lr_factor=1.0, leave_out=2),
            values=values,
            batches=with_nan(0, 1),
            num_steps=6,
        )
    # The batches of steps 2 to 5 were those of 4 to 7.
    expected = descend(START, range(4, 8))
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)
    # The first evaluation's parameters were not the best, whatever their value.
    assert explained(result) == "running, best 1 at evaluation 3 (step 6)"
    assert column(result, "num_skipped") == [2, 0, 0]


@pytest.mark.filterwarnings("ignore:At step")
def test_diverged_first_value_is_not_the_best(tmp_path):
    result = run(tmp_path, Rewind(), values={2: 99.0, 4: 70.0, 6: 40.0}, num_steps=6)
    assert column(result, "rewinds") == [0, 1, 2]
    # Twice halved, from the start at each.
    expected = descend(START, range(4, 6), RATE / 4)
    np.testing.assert_allclose(result.best_params["w"], expected, rtol=1e-5)


def test_when_rewinds_are_used_up_the_exhausted_guard_raises(tmp_path):
    """Over all resumptions; what is on disk is from before."""
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="At step") as caught,
            pytest.raises(og.GuardExhaustedError, match=r"(?s)Skipped last:.*NONFIN"),
        ):
            run(
                tmp_path,
                Rewind(times=2),
                values=dict.fromkeys(range(20), 1.0),
                batches=with_nan(*range(2, 20)),
                num_steps=20,
            )
        # Rewound at 4 and 6, raised at 8; nothing was saved since step 2.
        assert [str(each.message)[:9] for each in caught] == ["At step 4", "At step 6"]


# At step 6 it is 6 % worse than the best, then 5 %, then better, and worse for good.
RISES = {2: 3.0, 4: 2.0, 6: 2.12, 8: 2.1, 10: 1.0, 12: 1.5, 14: 1.5, 16: 1.5}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_value_that_rises_too_far_goes_back_and_leaves_batches_out(tmp_path, mode):
    sign = {"min": 1, "max": -1}[mode]
    values = {step: sign * value for step, value in RISES.items()}
    rewind = Rewind(times=2, lr_factor=1.0, max_rise=0.055, leave_out=10)
    stopper = og.early_stopping(og.stop.patience(20), mode=mode)
    with pytest.warns(UserWarning, match="At step") as caught:
        result = run(tmp_path, rewind, values=values, num_steps=16, stopper=stopper)
    told = [str(each.message) for each in caught]
    assert [text[:9] for text in told] == ["At step 6", "At step 1"]
    assert "of step 4, rewind 1 of 2, " in told[0]
    assert told[0].endswith("because of a value that is 6 % worse than the best")
    assert column(result, "rewinds") == [0, 0, 0, 1, 1, 1, 2, 2]
    # From step 4 on those of 16 to 19, and with the second rewind of 32 on.
    expected = descend(START, [*range(4), *range(16, 20)])
    np.testing.assert_allclose(result.best_params["w"], expected, rtol=1e-5)
    expected = descend(expected, range(32, 36))
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)
    assert [event[:2] for event in result.rewinds] == [(6, 4), (12, 10)]
    # None is left for the rise at 14 and 16, and the run goes on.
    assert result.state.step == 16
    again = run(tmp_path, rewind, values=values, num_steps=16, stopper=stopper)
    assert again.rewinds == result.rewinds


def test_rise_is_a_share_of_the_best_and_of_finite_values():
    """The oracle is (value - best) / |best| by hand, in the user's sign."""
    for mode, values, expected in [
        ("min", [2.0, 3.0, np.nan, 1.0, 1.0, 1.5], [0, 0.5, 0, 0, 0, 0.5]),
        ("min", [np.inf, -2.0, -1.0, -4.0, 4.0], [0, 0, 0.5, 0, 2.0]),
        ("max", [0.5, 0.4, 0.8, 0.2], [0, 0.2, 0, 0.75]),
        ("min", [0.0, 1e3], [0, float(np.finfo(np.float32).max)]),
    ]:
        stopper = og.early_stopping(og.stop.patience(20), mode=mode, nonfinite="ignore")
        state, rises = stopper.init(), []
        for value in values:
            state = stopper.update(value, state)
            rises.append(float(state.value_rise))
        assert rises == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:At step")
def test_when_rewinds_are_used_up_the_stopper_stops_the_run(tmp_path):
    result = run(tmp_path, Rewind(times=1), values={2: 1.0, 4: 99.0, 6: 98.0})
    assert explained(result).startswith("stopped at evaluation 3 (DIVERGED)")
    assert result.state.step == 6
    np.testing.assert_allclose(
        result.best_params["w"], descend(START, range(2)), rtol=1e-5
    )


def test_no_step_is_left_after_the_last_evaluation(tmp_path):
    result = run(tmp_path, Rewind(), values=DIVERGES_ONCE, num_steps=6)
    assert explained(result).startswith("stopped at evaluation 3 (DIVERGED)")


@pytest.mark.filterwarnings("ignore:At step")
def test_rate_that_a_plateau_has_reduced_is_reduced_further(tmp_path):
    """The rule starts afresh, its factor does not."""
    rules = og.stop.plateau(2, factor=0.1, max_reductions=9), og.stop.divergence(50.0)
    # Step 6 reduces, 8 diverges, 10 is a new best, 14 reduces.
    values = {2: 1.0, 4: 1.0, 6: 1.0, 8: 99.0, 10: 0.5, 12: 0.5, 14: 0.5}
    seen = []

    def evaluate(state):
        if int(state.step):  # `fit` also asks before the first step.
            seen.append(float(optax.tree.get(state.opt_state, "lr_scale")))
        return values.get(int(state.step), 1.0)

    result = fit(
        made(),
        train_step,
        targets,
        num_steps=14,
        eval_every=2,
        evaluate=evaluate,
        stopper=og.early_stopping(og.stop.any_of(*rules)),
        checkpointer=Checkpointer(tmp_path),
        rewind=Rewind(),
    )
    seen.append(float(optax.tree.get(result.state.opt_state, "lr_scale")))
    expected = [1.0, 1.0, 1.0, 0.1, 0.05, 0.05, 0.05, 0.005]
    assert seen == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:At step")
def test_every_scale_of_the_learning_rate_is_reduced_and_can_be_donated(tmp_path):
    tx = optax.chain(SCALED, og.stop.scale_by_plateau())
    state = made(og.guard(tx))
    result = run(tmp_path, Rewind(), values=DIVERGES_ONCE, state=state)
    expected = descend(descend(START, range(4)), range(6, 10), RATE / 4)
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:At step")
def test_old_state_has_left_the_device_when_the_best_comes(tmp_path, monkeypatch):
    shape, counts = (1 << 18,), []

    def count(restore):
        def counted(*args):
            counts.append(sum(x.shape == shape for x in jax.live_arrays()))
            return restore(*args)

        return counted

    monkeypatch.setattr(_store, "restore", count(_store.restore))
    run(
        tmp_path,
        Rewind(),
        values=DIVERGES_ONCE,
        state=made(w=np.zeros(shape)),
        batches=lambda step: np.float32(step),
        num_steps=8,
    )
    # What is left is the state that was given. The second is of the best at the end.
    assert counts[0] == 1


@pytest.mark.parametrize(
    ("rewind", "changes", "error", "message"),
    [
        (3, {}, TypeError, "`rewind` must be a `Rewind`, got 3"),
        (Rewind(), {"checkpointer": None}, ValueError, "`rewind` needs `checkpointer`"),
        (Rewind(), {"stopper": None}, ValueError, "`rewind` needs `stopper`: it goes"),
        (
            Rewind(),
            {"state": made(optax.sgd(0.1))},
            ValueError,
            r"`lr_factor` is 0.5, but .*: put `stop.scale_by_plateau\(\)` last",
        ),
        (
            Rewind(leave_out=1),
            {"batches": [targets(0)]},
            ValueError,
            "`leave_out` needs `batches` to be a function",
        ),
    ],
)
def test_bad_input_is_refused(tmp_path, rewind, changes, error, message):
    arguments: dict[str, Any] = {
        "state": made(),
        "batches": targets,
        "evaluate": lambda state: 99.0,
        "stopper": DIVERGENCE,
        "checkpointer": Checkpointer(tmp_path),
        **changes,
    }
    with pytest.raises(error, match=message):
        fit(
            train_step=train_step,
            num_steps=4,
            eval_every=2,
            rewind=rewind,
            **arguments,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": 0}, "`times` must be a whole number of at least 1, got 0"),
        ({"lr_factor": 0.0}, "`lr_factor` must be positive, got 0.0"),
        ({"lr_factor": 1.5}, "`lr_factor` must be at most 1, got 1.5"),
        ({"max_rise": 0.0}, "`max_rise` must be positive, got 0.0"),
        ({"leave_out": -1}, "`leave_out` must be a whole number of at least 0, got -1"),
    ],
)
def test_numbers_of_a_rewind_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Rewind(**changes)


# Batches that are left out from the start -------------------------------------------


@pytest.mark.filterwarnings("ignore:At step 6, back to")
def test_ranges_of_batches_never_come_and_all_that_were_left_out_is_told(tmp_path):
    ranges = [(8, 10), (2, 4), (3, 5), (100, 200)]
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(ranges))
    # Two more after the rewind at step 6, which lie around 8 and 9.
    rewind = Rewind(lr_factor=1.0, leave_out=2, skip_steps=path)
    result = run(tmp_path / "run", rewind, values=DIVERGES_ONCE)
    kept = [n for n in range(30) if not 2 <= n < 5 and not 8 <= n < 10]
    assert kept[:8] == [0, 1, 5, 6, 7, 10, 11, 12]
    expected = descend(START, [*kept[:4], *kept[8:12]])
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)
    assert result.left_out == ((2, 5), (8, 10), (11, 13))
    again = run(tmp_path / "run", rewind, values=DIVERGES_ONCE)
    assert again.left_out == result.left_out


@pytest.mark.parametrize(
    ("skip_steps", "error", "message"),
    [
        ([(3, 3)], ValueError, r"`skip_steps` must hold ranges .*, got \(3, 3\)"),
        ([(3, 4.0)], ValueError, r"`skip_steps` must hold ranges .*, got \(3, 4.0\)"),
        ([3, 4], ValueError, "`skip_steps` must hold ranges .*, got 3"),
        (3, TypeError, "`skip_steps` must be a list of ranges such as .*, got 3"),
        (__file__, ValueError, "`skip_steps` must name a JSON file such as"),
    ],
)
def test_ranges_are_checked(skip_steps, error, message):
    with pytest.raises(error, match=message):
        Rewind(skip_steps=skip_steps)
