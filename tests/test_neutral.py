"""The neutral benchmark: its rules are those published, its runs those of Python."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks._digits import load_digits
from benchmarks._layers import by_layer
from benchmarks._update_bound import bound_update
from benchmarks.neutral import _published, _runs, _tasks
from benchmarks.neutral._contenders import CONTENDERS
from benchmarks.neutral._runs import (
    QUICK,
    Size,
    members_of,
    optimizers_of,
    scores_of,
)

DATA = Path(__file__).parent / "data"
DIGESTS = ["8f26b2bd9d135c25", "8ba4f891220f5e4c"]
AUTOCLIP, ADAGC = (
    json.loads((DATA / f"{name}.json").read_text()) for name in ("autoclip", "adagc")
)


def play(tx: Any, gradients: Any, params: Any = None) -> Any:
    """All updates, as arrays with time in front."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    first = jax.tree.map(lambda x: x[0], gradients)
    return jax.lax.scan(step, tx.init(params or first), gradients)[1]


def test_autoclip_clips_to_the_norms_of_the_original():
    length = 400
    player = jax.jit(lambda x, p: play(_published.autoclip(p, length), x))
    for run in AUTOCLIP["runs"]:
        norms = np.array(AUTOCLIP["sequences"][run["sequence"]], np.float32)
        padded = np.ones((length, 1), np.float32)
        padded[: len(norms), 0] = norms
        clipped = player(padded, float(run["percentile"]))[: len(norms), 0]
        np.testing.assert_allclose(clipped, run["clipped_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    "run",
    [pytest.param(r, id=r["sequence"]) for r in ADAGC["runs"] if r["rule"] == "adagc"],
)
def test_adagc_clips_to_the_norms_of_the_original(run):
    config = dict(run["config"])
    config.pop("eps")
    norms = [np.array(x, np.float32)[:, None] for x in run["raw_norm"]]
    clipped = play(_published.adagc(**config), norms)
    for found, expected in zip(clipped, run["clipped_norm"], strict=True):
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)


def test_aggc_keeps_norms_in_its_band():
    norms = np.exp(np.random.default_rng(0).normal(size=100))
    mean, expected = 0.0, []
    for i, norm in enumerate(norms):
        late = min(max((i / 100 - 0.6) / 0.2, 0), 1)
        upper = (0.7 + late * (0.999 - 0.7)) * mean
        scaled = norm
        if mean > 0 and norm > upper:
            scaled = norm * max(upper / norm, 0.9)
        elif norm < 0.98 * mean:
            scaled = norm * min(0.98 * mean / norm, 1.1)
        expected.append(scaled)
        mean = 0.99 * mean + 0.01 * scaled
    found = play(_published.aggc(0.7, 100), np.array(norms, np.float32)[:, None])
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)


def test_spam_clips_entries_by_their_own_past_from_the_twentieth_step():
    gradients = np.ones((23, 2), np.float32)
    gradients[5, 0] = gradients[21, 0] = 100.0
    found = play(_published.spam_clip(60.0), gradients)
    mean = 0.0
    for g in gradients[:21, 0]:
        mean = 0.999 * mean + 0.001 * float(g) ** 2
    expected = gradients.copy()
    expected[21, 0] = math.sqrt(60 * mean)
    # A mean of so few ones is 0.02: each one is the 50-fold of it, and passes at 60.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_larc_bounds_each_leaf_but_never_speeds_it_up():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([3.0, 4.0]), "c": jnp.zeros(1)}
    grads = {"a": jnp.array([0.0, 10.0]), "b": jnp.array([0.1, 0.0]), "c": jnp.ones(1)}
    tx: Any = _published.larc(0.02, 0.5)
    found, _ = tx.update(grads, tx.init(params), params)
    # 0.02 * 5 / 10 is a rate of 0.01; 0.02 * 5 / 0.1 is one of 1, above 0.5.
    np.testing.assert_allclose(found["a"], [0.0, 10 * 0.01 / 0.5], rtol=1e-6)
    np.testing.assert_array_equal(found["b"], grads["b"])
    np.testing.assert_array_equal(found["c"], grads["c"])


def test_stable_adam_slows_down_where_a_gradient_outgrows_its_moments():
    gradients = np.random.default_rng(0).normal(size=(6, 3))
    gradients[4] *= 30
    m = v = np.zeros(3)
    expected = []
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = v / (1 - 0.99**t)
        rate = 0.1 / max(1.0, math.sqrt(np.mean(g * g / u)) / 0.5)
        expected.append(-rate * m / (1 - 0.9**t) / (np.sqrt(u) + 1e-8))
    tx: Any = _published.stable_adam(0.1, 0.5, 0.99)
    found = play(tx, gradients.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("scope", ["leaf", "tree", "joint", "sum"])
def test_update_is_bounded_relative_to_the_parameters(scope):
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2), "c": jnp.ones(1)}
    updates = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 9.0]), "c": jnp.ones(1)}
    rms = math.sqrt(26 / 5)
    found = play(
        bound_update(scope, 0.1, 0.06),
        jax.tree.map(lambda x: jnp.stack([x] * 4), updates),
        params,
    )
    for i, tau in enumerate([0.1, 0.1 / math.sqrt(2), 0.06, 0.06]):
        ratios = {"a": 1 / 5, "b": 9 / (rms * math.sqrt(2)), "c": 1 / rms}
        of_all = {
            "tree": math.sqrt(83 / 26),
            "joint": math.sqrt(sum(r * r for r in ratios.values())),
            "sum": sum(ratios.values()),
        }
        for name in params:
            factor = tau / of_all.get(scope, ratios[name])
            np.testing.assert_allclose(
                found[name][i], min(1, factor) * updates[name], rtol=1e-5
            )


def test_update_within_the_bound_is_not_touched():
    params, updates = jnp.array([3.0, 4.0]), jnp.array([0.01, -0.02])
    tx: Any = bound_update()
    np.testing.assert_array_equal(
        tx.update(updates, tx.init(params), params)[0], updates
    )


def test_each_layer_of_a_stack_is_a_leaf_of_its_own():
    tx: Any = by_layer(
        optax.adaptive_grad_clip(0.5), lambda path: 0 if path == "blocks" else None
    )
    params = {"blocks": jnp.ones((2, 3, 1)), "last": jnp.ones((3, 1))}
    grads = jax.tree.map(lambda x: 10 * x, params)
    found, _ = tx.update(grads, tx.init(params), params)
    for x in jax.tree.leaves(found):
        np.testing.assert_allclose(x, 0.5, rtol=1e-6)


# Runs -------------------------------------------------------------------------------

# Half of 4 times the square of a number that starts at its seed's place plus 1.
PARABOLA = _tasks.Task(
    init=lambda key: {"p": 1.0 + (jax.random.key_data(key)[-1] % 1000).astype(float)},
    grads=lambda data, params, places: (2 * params["p"] ** 2, {"p": 4 * params["p"]}),
    score=lambda data, params: 2 * params["p"] ** 2,
    data=jnp.zeros(()),
    num_places=3,
    trivial=1.0,
)


def test_every_run_is_the_one_that_python_makes():
    size = Size(tuning_seeds=1, test_seeds=2, rates=3, evaluations=5, steps=(10, 20))
    contender = CONTENDERS["fixed clip"]
    inputs = _runs.inputs_of(PARABOLA, size)
    compiled = _runs.lower(PARABOLA, contender, size, inputs).compile()
    for steps in size.steps:
        scores = scores_of(compiled, contender, size, inputs, steps)
        assert scores.shape == (2, 4, 3, 3)
        rates = np.geomspace(0.003, 3.0, 3)
        for (setting, rate, seed), found in np.ndenumerate(scores[0]):
            p, velocity, losses = 1.0 + [0, 0, 1][seed], 0.0, []
            for step in range(1, steps + 1):
                max_norm = contender.settings[setting][0]
                grad = math.copysign(min(abs(4 * p), max_norm), p)
                velocity = 0.9 * velocity + grad
                p -= rates[rate] * velocity
                if step % (steps // 5) == 0:
                    losses.append(2 * p * p)
            np.testing.assert_allclose(
                found, np.mean(losses[-3:]), rtol=2e-3, atol=1e-6
            )


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_has_the_same_budget(name):
    size, contender = Size(), CONTENDERS[name]
    members = members_of(contender, size)
    optimizers = optimizers_of(contender)
    assert len(members["seed"]) == len(optimizers) * 52 * 16
    configurations = {
        (bool(a), *s, float(r))
        for a, s, r in zip(
            members["is_adam"],
            members["setting"].tolist(),
            members["learning_rate"],
            strict=True,
        )
    }
    assert len(configurations) == len(optimizers) * 52


def test_seeds_of_tuning_and_test_are_apart():
    seeds = _runs.seeds_of(Size())
    assert seeds[:4].tolist() == [0, 1, 2, 3]
    assert seeds[4:].tolist() == list(range(1000, 1012))
    assert len(_runs.seeds_of(QUICK)) == 2


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits()
    # Of `sklearn.datasets.load_digits` 1.9, in bytes.
    seen = [(16 * images).astype(np.uint8), labels.astype(np.uint8)]
    assert [hashlib.sha256(x.tobytes()).hexdigest()[:16] for x in seen] == DIGESTS


def test_trivial_score_of_the_policy_is_that_of_zeros():
    task = _tasks.TASKS["policy"]()
    zeros = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0)))
    rewards = jax.jit(lambda p: _tasks.play(p, jax.random.key(1), 2000)[3])(zeros)
    assert float(1 - rewards.mean()) == pytest.approx(task.trivial, abs=0.01)
