"""The sweep over thresholds and learning rates, against plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.analysis import Sweep, sweep_max_norm
from optax_guard.flax import TrainState

START, STEPS, EVERY = 4.0, 12, 3
MAX_NORMS, RATES = [0.5, 2.0, math.inf], [0.1, 0.4, 1.5]


def train_step(state, batch):
    del batch
    loss, grads = jax.value_and_grad(lambda p: p**2)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss


def build(member):
    tx = og.guard(optax.sgd(member["learning_rate"]), clip=member["max_norm"])
    return {
        "state": TrainState.create(
            apply_fn=lambda x: x, params=jnp.array(START), tx=tx
        ),
        "train_step": train_step,
        "batches": lambda step: None,
        "evaluate": lambda state: state.params**2,
    }


def python_loop(max_norm, rate):
    """Evaluations, and the share of steps clipped."""
    x, values, num_clipped = START, [], 0
    for step in range(1, STEPS + 1):
        grad = 2 * x
        num_clipped += abs(grad) > max_norm
        x -= rate * math.copysign(min(abs(grad), max_norm), grad)
        if step % EVERY == 0:
            values.append(x * x)
    return values, num_clipped / STEPS


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return sweep_max_norm(
        build, MAX_NORMS, RATES, num_steps=STEPS, eval_every=EVERY, tolerance=0.5
    )


def test_every_pair_is_the_run_that_python_makes(sweep):
    pairs = [(norm, rate) for norm in MAX_NORMS for rate in RATES]
    assert [trial[:2] for trial in sweep.trials] == pairs
    for trial in sweep.trials:
        values, clip_rate = python_loop(*trial[:2])
        assert trial.best_value == pytest.approx(min(values), rel=1e-4, abs=1e-9)
        assert trial.is_stable == (values[-1] <= values[0])
        assert trial.clip_rate == pytest.approx(clip_rate)
        assert trial.skip_rate == 0
        assert trial.num_evals == STEPS // EVERY
        assert trial.reason == og.StopReason.RUNNING
    assert {trial.is_stable for trial in sweep.trials} == {True, False}


def test_recommended_is_the_widest_within_tolerance(sweep):
    stable = [trial for trial in sweep.trials if trial.is_stable]
    best = min(trial.best_value for trial in stable)
    near = [trial for trial in stable if trial.best_value <= 1.5 * best]
    widths = {n: sum(t.max_norm == n for t in near) for n in MAX_NORMS}
    assert sweep.recommended is not None
    assert widths[sweep.recommended.max_norm] == max(widths.values())
    assert sweep.recommended in near
    heading, *lines = str(sweep).splitlines()
    assert heading.split() == ["max_norm", "rate", "0.1", "rate", "0.4", "rate", "1.5"]
    assert sum(line.count("*") for line in lines[:3]) == 1
    unstable = sum(not trial.is_stable for trial in sweep.trials)
    assert sum(line.count("!") for line in lines[:3]) == unstable


def test_width_counts_before_the_lowest_value():
    """Under 1.0 three rates come near the best, which is under 2.0 alone."""

    def scripted(member):
        at = jnp.argmin(jnp.abs(jnp.array([0.1, 0.2, 0.3]) - member["learning_rate"]))
        table = jnp.array([[1.01, 1.01, 1.01], [1.0, 5.0, 5.0]])
        value = table[(member["max_norm"] > 1.5).astype(int), at]
        return build(member) | {"evaluate": lambda state: value}

    rates = [0.1, 0.2, 0.3]
    norms = [1.0, 2.0]
    found = sweep_max_norm(
        scripted, norms, rates, num_steps=2, eval_every=1
    ).recommended
    assert found is not None
    assert found.max_norm == 1.0
    strict = sweep_max_norm(
        scripted, norms, rates, num_steps=2, eval_every=1, tolerance=1e-3
    ).recommended
    assert strict is not None
    assert (strict.max_norm, strict.learning_rate) == (2.0, 0.1)


def test_runs_stop_at_their_own_time():
    def stopping(member):
        stopper = og.early_stopping(og.stop.target(1.0))
        return build(member) | {"stopper": stopper}

    sweep = sweep_max_norm(stopping, [9.0], [0.1, 0.4], num_steps=12, eval_every=3)
    slow, fast = sweep.trials
    assert (slow.num_evals, fast.num_evals) == (3, 1)
    assert slow.reason == fast.reason == og.StopReason.TARGET


def test_run_that_diverged_at_its_first_evaluation_is_not_stable():
    def stopping(member):
        stopper = og.early_stopping(og.stop.divergence(10.0))
        return build(member) | {"stopper": stopper}

    sweep = sweep_max_norm(stopping, [math.inf], [0.1, 1.5], num_steps=3, eval_every=3)
    calm, wild = sweep.trials
    assert (calm.is_stable, calm.reason) == (True, og.StopReason.RUNNING)
    assert (wild.is_stable, wild.reason) == (False, og.StopReason.DIVERGED)
    assert (wild.num_evals, wild.best_value) == (1, START**2 * 4**3)


def test_nothing_stable_is_said():
    def broken(member):
        return build(member) | {"evaluate": lambda state: state.params * jnp.nan}

    sweep = sweep_max_norm(broken, [1.0], [0.1], num_steps=2, eval_every=1)
    assert sweep.recommended is None
    assert math.isnan(sweep.trials[0].best_value)
    assert "No run was stable" in str(sweep)


@pytest.mark.parametrize(
    ("max_norms", "rates", "message"),
    [
        ([], [0.1], "`max_norms` must be different numbers"),
        ([1.0, 1.0], [0.1], "`max_norms` must be different numbers"),
        ([1.0], [0.0], r"`learning_rates\[0\]` must be"),
        ([-1.0], [0.1], r"`max_norms\[0\]` must be"),
    ],
)
def test_what_is_refused(max_norms, rates, message):
    with pytest.raises(ValueError, match=message):
        sweep_max_norm(build, max_norms, rates, num_steps=2, eval_every=1)


def test_without_evaluation_there_is_nothing_to_compare():
    def blind(member):
        return {k: v for k, v in build(member).items() if k != "evaluate"}

    with pytest.raises(ValueError, match="`build` must give `evaluate`"):
        sweep_max_norm(blind, [1.0], [0.1], num_steps=2, eval_every=1)


def test_figure_has_a_number_in_every_cell(sweep):
    plotting = pytest.importorskip("optax_guard.plotting")
    figure = plotting.plot_sweep(sweep)
    best, clipped = figure.axes
    texts = [text.get_text() for text in best.texts]
    assert texts == [f"{trial.best_value:.3g}" for trial in sweep.trials]
    assert len(clipped.texts) == len(sweep.trials)
    assert np.isnan(best.images[0].get_array().filled(np.nan)).sum() == sum(
        not trial.is_stable for trial in sweep.trials
    )
