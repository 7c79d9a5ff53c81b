"""Rewinds: back to the best checkpoint, on with other batches and a lower rate.

The oracle is a plain loop in float64: loss = mean((w - x)^2), whose gradient is w - x.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.flax import Checkpointer, Rewind, TrainState, fit, load_best
from optax_guard.loops import _checkpoint

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
    return lambda state: values[int(state.step)]


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
    assert explained(result) == "running, best 1 at evaluation 4 (step 10)"


def test_diverged_run_goes_back_and_on(tmp_path):
    asked = []

    def on_rewind(step):
        asked.append(step)
        return 100

    warning = (
        r"At step 6, back to the checkpoint of step 4, rewind 1 of 2, with the "
        r"learning rate times 0.5 and batches of step \+ 100, because of DIVERGED: "
    )
    with pytest.warns(UserWarning, match=warning) as caught:
        result = run(
            tmp_path, Rewind(times=2, on_rewind=on_rewind), values=DIVERGES_ONCE
        )
    # The warning points at the line that calls `fit`.
    assert [each.filename for each in caught] == [__file__]
    check_diverged_once(result)
    assert asked == [6]
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

    rewind = Rewind(on_rewind=lambda step: 100)
    with pytest.raises(OSError, match="disk on fire"):
        run(tmp_path, rewind, values=DIVERGES_ONCE, batches=crashing)
    check_diverged_once(run(tmp_path, rewind, values=DIVERGES_ONCE))


def test_without_rewinds_the_run_ends_as_before(tmp_path):
    result = run(tmp_path, values=DIVERGES_ONCE)
    assert explained(result).startswith("stopped at evaluation 2 (DIVERGED)")
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
    assert explained(result).startswith("stopped at evaluation 1 (TARGET)")


def with_nan(*bad):
    return lambda step: targets(step) * (np.nan if step in bad else 1)


def test_exhausted_guard_goes_back_before_there_is_a_best(tmp_path):
    """And so does a value that is not finite, without a guard's help."""
    values = {2: 0.5, 4: 2.0, 6: 1.0}
    with pytest.warns(
        UserWarning, match=r"(?s)to the checkpoint of step 0.*times 1 and .*first in w"
    ):
        result = run(
            tmp_path,
            Rewind(lr_factor=1.0, on_rewind=lambda step: step),
            values=values,
            batches=with_nan(0, 1),
            num_steps=6,
        )
    # The batches of steps 2 to 5 were those of 4 to 7.
    expected = descend(START, range(4, 8))
    np.testing.assert_allclose(result.state.params["w"], expected, rtol=1e-5)
    # The first evaluation's parameters were not the best, whatever their value.
    assert explained(result) == "running, best 1 at evaluation 2 (step 6)"
    assert column(result, "num_skipped") == [2, 0, 0]


@pytest.mark.filterwarnings("ignore:At step")
def test_diverged_first_value_is_not_the_best(tmp_path):
    result = run(tmp_path, Rewind(), values={2: 99.0, 4: 70.0, 6: 40.0}, num_steps=6)
    assert column(result, "rewinds") == [0, 1, 2]
    # Twice halved, from the start at each.
    expected = descend(START, range(4, 6), RATE / 4)
    np.testing.assert_allclose(result.best_params["w"], expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:At step")
def test_when_rewinds_are_used_up_the_exhausted_guard_raises(tmp_path):
    """Over all resumptions; what is on disk is from before."""
    asked = []
    for _ in range(2):
        with pytest.raises(og.GuardExhaustedError, match=r"(?s)Skipped last:.*NONFIN"):
            run(
                tmp_path,
                Rewind(times=2, on_rewind=lambda step: asked.append(step) or 0),
                values=dict.fromkeys(range(20), 1.0),
                batches=with_nan(*range(2, 20)),
                num_steps=20,
            )
    # Rewound at 4 and 6, raised at 8; nothing was saved since step 2.
    assert asked == [4, 6, 4, 6]


@pytest.mark.filterwarnings("ignore:At step")
def test_when_rewinds_are_used_up_the_stopper_stops_the_run(tmp_path):
    result = run(tmp_path, Rewind(times=1), values={2: 1.0, 4: 99.0, 6: 98.0})
    assert explained(result).startswith("stopped at evaluation 2 (DIVERGED)")
    assert result.state.step == 6
    np.testing.assert_allclose(
        result.best_params["w"], descend(START, range(2)), rtol=1e-5
    )


def test_no_step_is_left_after_the_last_evaluation(tmp_path):
    result = run(tmp_path, Rewind(), values=DIVERGES_ONCE, num_steps=6)
    assert explained(result).startswith("stopped at evaluation 2 (DIVERGED)")


@pytest.mark.filterwarnings("ignore:At step")
def test_rate_that_a_plateau_has_reduced_is_reduced_further(tmp_path):
    """The rule starts afresh, its factor does not."""
    rules = og.stop.plateau(2, factor=0.1, max_reductions=9), og.stop.divergence(50.0)
    # Step 6 reduces, 8 diverges, 10 is a new best, 14 reduces.
    values = {2: 1.0, 4: 1.0, 6: 1.0, 8: 99.0, 10: 0.5, 12: 0.5, 14: 0.5}
    seen = []

    def evaluate(state):
        seen.append(float(optax.tree.get(state.opt_state, "lr_scale")))
        return values[int(state.step)]

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

    monkeypatch.setattr(_checkpoint, "restore", count(_checkpoint.restore))
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
            Rewind(on_rewind=lambda step: 0),
            {"batches": [targets(0)]},
            ValueError,
            "`on_rewind` needs `batches` to be a function",
        ),
        (
            Rewind(on_rewind=cast(Any, lambda step: "far")),
            {},
            TypeError,
            "`on_rewind` must return a whole number of steps, got 'far'",
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
    ],
)
def test_numbers_of_a_rewind_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Rewind(**changes)
