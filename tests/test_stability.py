"""The study of stability: its runs are those of plain Python, and it measures right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _goals, stability
from benchmarks._models import Model
from benchmarks.stability import Cells, Settings, measure, run_kind, sgd_or_adam

# Half of `CURVATURE` times the square of a number that starts at its seed plus 1.
CURVATURE = 4.0
PARABOLA = Model(
    init=lambda key: {"p": 1.0 + jax.random.key_data(key)[-1].astype(jnp.float32)},
    loss_of=lambda params, batch: CURVATURE / 2 * params["p"] ** 2 + 0 * batch.sum(),
    batch=lambda data, places: data[places],
    num_places=3,
    data=jnp.zeros(3),
    held_out=jnp.zeros(3),
    trivial=1.0,
    layer_axis=lambda path: None,
)
FLOAT32_MAX = 3.4e38
TINY = Settings(
    seeds=2, steps=40, eval_every=4, watched=30, num_rates=3, max_norms=(0.05,)
)


def python_run(scale, rate, seed, max_norm):
    """SGD with momentum: losses at evaluations, and norms before clipping."""
    p, velocity, losses, norms = scale * (1.0 + seed), 0.0, [], []
    for step in range(1, TINY.steps + 1):
        grad = CURVATURE * p
        norms.append(abs(grad))
        velocity = 0.9 * velocity + math.copysign(min(abs(grad), max_norm), grad)
        p -= rate * velocity
        if step % TINY.eval_every == 0:
            loss = CURVATURE / 2 * p * p
            losses.append(loss if loss < FLOAT32_MAX else math.inf)
    return losses, norms[: TINY.watched]


@pytest.fixture(scope="module")
def runs() -> dict[str, Cells]:
    inputs = stability.make_inputs(PARABOLA, TINY)
    return run_kind(PARABOLA, inputs, (1.0, 2.0), "optax", TINY)


def test_every_run_is_the_one_that_python_makes(runs):
    assert list(runs) == ["unclipped", "optax 0.05", "suggested", "suggested at lowest"]
    for name, cells in runs.items():
        assert cells.final.shape == (2, 2, TINY.num_rates, TINY.seeds)
        for (scale, rate, seed), final in np.ndenumerate(cells.final[0]):
            at = 2.0**scale, [0.03, 0.3, 3.0][rate], seed
            max_norm = float(cells.max_norm[0, scale, rate, seed])
            losses, _ = python_run(*at, max_norm)
            # Runs that diverge amplify rounding, too.
            assert final == pytest.approx(np.mean(losses[-3:]), rel=1e-2, abs=1e-6)
            best = cells.best[0, scale, rate, seed]
            assert best == pytest.approx(min(losses), rel=1e-2, abs=1e-6)
            # At the highest rate the guard of the watched run skips steps.
            if name == "suggested" and rate < 2:
                _, watched = python_run(*at, math.inf)
                expected = np.quantile(watched[15:], 0.9, method="inverted_cdf")
                assert max_norm == pytest.approx(expected, rel=0.06)
    assert (runs["unclipped"].max_norm == math.inf).all()
    lowest = runs["suggested"].max_norm[:, :, :1]
    assert (runs["suggested at lowest"].max_norm == lowest).all()


def test_clipping_bounds_what_diverges_and_slows_what_does_not(runs):
    unclipped, clipped = runs["unclipped"].final[0], runs["optax 0.05"].final[0]
    # Momentum of 0.9 is stable below a rate of 3.8 over the curvature.
    assert (unclipped[:, 2] > 1e6).all()
    assert (clipped[:, 2] < 1e3).all()
    assert (clipped[:, 0] > unclipped[:, 0]).all()


@jax.jit
def updates_of_both(is_adam):
    """Two updates of the study's optimizer, and of both of Optax's."""
    grads = jnp.array([[1.0, -3.0, 0.5], [-0.2, 0.6, 0.0]])

    def play(tx):
        def step(state, grad):
            return tx.update(grad, state)[::-1]

        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    peers = optax.sgd(0.1, 0.9), optax.adam(0.1)
    return play(sgd_or_adam(is_adam, 0.1)), *map(play, peers)


def test_adam_and_sgd_are_those_of_optax():
    for is_adam in (False, True):
        ours, *peers = updates_of_both(is_adam)
        np.testing.assert_allclose(ours, peers[is_adam], 1e-6)


def test_widths_bars_and_regrets_are_those_of_the_definitions():
    def cells(final):
        final = np.array(final)[None, None]  # One optimizer, one scale.
        return Cells(final, final, np.full_like(final, math.inf))

    inf = math.inf
    # Five learning rates, of which nothing trains at the last three.
    bad, worse = [[2.9] * 3] * 3, [[inf] * 3] * 3
    found = measure(
        {
            "unclipped": cells([[1.0, 1.2, 1.4], [inf, inf, 1.0], *worse]),
            "optax 1": cells([[1.6, 1.6, 1.6], [0.9, 1.0, 1.1], *bad]),
            "leaf 1": cells([[1.1, 1.1, 1.1], [0.8, 0.8, 0.8], *bad]),
        },
        trivial=3.0,
    )
    (((seen,),),) = [found]
    assert seen["bar"] == pytest.approx((3.0 + 0.8) / 2)
    unclipped = seen["contenders"]["unclipped"]
    assert unclipped["seeds_that_train"] == [3, 1, 0, 0, 0]
    assert unclipped["width"] == pytest.approx((1 + 1 / 3) / 2)
    assert unclipped["final_loss"] == [1.2, inf, inf, inf, inf]
    assert unclipped["regret"][:2] == [0.0, inf]
    assert np.isnan(unclipped["regret"][2:]).all()
    assert unclipped["regret_at_best_rate"] == pytest.approx(0.2)
    leaf = seen["contenders"]["leaf 1"]
    # The sweep is of global clips: others may be better than it.
    assert leaf["regret_at_best_rate"] == pytest.approx(-0.2)


def test_no_threshold_is_suggested_of_norms_that_are_not_finite():
    assert stability.suggestion(np.full(50, np.nan)) == math.inf
    assert stability.suggestion(np.linspace(1.0, 2.0, 50)) == pytest.approx(1.96, 0.05)


def test_slowdown_counts_only_what_trains_well_unclipped():
    nan = math.nan
    plain = {"regret": [0.0, 0.05, 0.06, nan], "final_loss": [1.0, 1.05, 1.1, 9.0]}
    own = {"regret": [0.1, 0.0, 0.0, nan], "final_loss": [1.1, 1.03, 0.5, 0.1]}
    settings = [{"contenders": {"unclipped": plain, "own": own}}] * 2
    assert _goals.slowdown(settings, "own") == pytest.approx((0.1 - 0.02) / 2)
    assert _goals.slowdown(settings, "unclipped") == 0.0


def test_seeds_of_a_study_are_those_asked_for():
    settings = TINY._replace(first_seed=3)
    params = stability.make_inputs(PARABOLA, settings)[2]
    assert params["p"].tolist() == [4.0, 5.0]
