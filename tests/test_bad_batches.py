"""The study of bad batches: its peers are those published, and it measures right."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import _peers
from benchmarks._text_run import Settings
from benchmarks.bad_batches import (
    FAULTS,
    GOALS,
    REWOUND,
    judge,
    measure,
    rewinding,
    run_rewinding,
    show,
    steps_to_recover,
    study,
)

DATA = Path(__file__).parent / "data"
SKIP_STEP, ZCLIP = (
    json.loads((DATA / f"{name}.json").read_text()) for name in ("skip_step", "zclip")
)
RULES = {
    "olmo_core": _peers.olmo,
    "maxtext": _peers.maxtext,
    "levanter": _peers.levanter,
}
# What `zclip.json` calls the settings that the study's ZClip can have.
CAPS = {"default": 1.0, "adaptive": math.inf}


def floats(numbers) -> np.ndarray:
    return np.array([math.nan if x is None else float(x) for x in numbers])


@functools.cache
def skip_player(system, window):
    """Norms, losses and sigma to what was taken, and the updates."""

    def run(norms, losses, sigma):
        tx: Any = RULES[system](optax.sgd(0.1, momentum=0.9), window, sigma)

        def step(state, signals):
            norm, loss = signals
            updates, state = tx.update(norm[None], state, None, value=loss)
            return state, (state.is_taken, updates[0])

        return jax.lax.scan(step, tx.init(jnp.zeros(1)), (norms, losses))[1]

    return jax.jit(run)


@pytest.mark.parametrize(
    "run",
    [pytest.param(r, id=f"{r['system']}-{r['sequence']}") for r in SKIP_STEP["runs"]],
)
def test_skip_rules_are_the_published_ones_with_their_faults(run):
    recorded = SKIP_STEP["sequences"][run["sequence"]]
    losses = floats(recorded["loss"])
    norms = recorded["grad_norm"]
    norms = np.ones_like(losses) if norms is None else floats(norms)
    # One length for all, so that a window is compiled once.
    padded = np.ones((2, 300), np.float32)
    padded[:, : len(losses)] = norms, losses
    is_taken, updates = skip_player(run["system"], run["window"])(*padded, run["sigma"])
    seen = slice(len(losses))
    assert np.flatnonzero(~np.asarray(is_taken)[seen]).tolist() == run["skipped"]
    if run["system"] == "levanter":
        bad = np.flatnonzero(~np.isfinite(updates[seen])).tolist()
        assert bad == run.get("nonfinite_update_steps", [])


@functools.cache
def zclip_player():
    def run(norms, cap):
        tx: Any = _peers.zclip(max_grad_norm=cap)

        def step(state, norm):
            updates, state = tx.update(norm[None], state)
            return state, (updates[0], state.mean, state.var)

        return jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[1]

    return jax.jit(run)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(r, id=f"{r['sequence']}-{r['config']}")
        for r in ZCLIP["runs"]
        if r["config"] in CAPS
    ],
)
def test_zclip_is_the_published_one_with_its_faults(run):
    norms = floats(ZCLIP["sequences"][run["sequence"]])
    padded = np.append(norms, np.ones(400 - len(norms))).astype(np.float32)
    played = jax.device_get(zclip_player()(padded, CAPS[run["config"]]))
    clipped, mean, var = (x[: len(norms)] for x in played)
    known = np.array([x is not None for x in run["mean"]])
    # NaN where the record has NaN.
    np.testing.assert_allclose(clipped, floats(run["clipped_norm"]), 2e-5)
    np.testing.assert_allclose(mean[known], floats(run["mean"])[known], 1e-5)
    np.testing.assert_allclose(var[known], floats(run["var"])[known], 1e-4, atol=1e-12)


def test_olmo_multiplies_a_skipped_step_by_zero_and_maxtext_leaves_it_out():
    (recorded,) = (
        run
        for run in SKIP_STEP["runs"]
        if (run["system"], run["sequence"]) == ("olmo_core", "inf_norm_once")
    )
    norms = floats(SKIP_STEP["sequences"]["inf_norm_once"]["grad_norm"])
    padded = np.ones((2, 300), np.float32)
    padded[0, : len(norms)] = norms
    (bad,) = np.flatnonzero(np.isinf(norms))
    for system, poisoned in {"olmo_core": 300 - bad, "maxtext": 0}.items():
        play = skip_player(system, recorded["window"])
        is_taken, updates = play(*padded, recorded["sigma"])
        assert not is_taken[bad]
        # Momentum, too: no later update is finite.
        assert np.sum(~np.isfinite(updates)) == poisoned


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([1.04, 1.04, 1.04, 1.04], 0),
        ([3.0, 1.0, 1.0, 1.0], 8),
        ([1.0, 1.0, 3.0, 1.0], 16),
        ([3.0, 1.0, 1.0, 1.1], math.inf),
        ([math.nan] * 4, math.inf),
    ],
)
def test_steps_to_recover_are_those_until_it_stays_near(losses, steps):
    assert steps_to_recover(np.array(losses), np.ones(4), every=4) == steps


def test_study_runs_and_sees_what_nan_does_to_an_unguarded_run(capsys):
    tiny = Settings(seeds=1, half=8, batch_size=2, window=6, width=4, embedding=4)
    runs = study(tiny, {"unguarded": optax.adamw(1e-2)})
    seen = measure(runs["unguarded"], tiny)
    assert list(seen) == list(FAULTS)
    assert seen["none"]["peak_excursion"] == [0.0]
    assert seen["none"]["steps_to_recover"] == [0]
    assert (
        seen["NaN"]["peak_excursion"] == seen["NaN"]["steps_to_recover"] == [math.inf]
    )
    assert seen["NaN"]["finite_params"] == [False]
    # Its square is no float32, its size is no matter to Adam.
    assert seen["loss x 1e30"]["finite_params"] == [True]
    assert seen["loss x 1e30"]["finite_moments"] == [False]
    assert seen["8 shuffled"]["corrupt_steps_taken"] == [8]
    show({"unguarded": seen})
    assert "never (never to never)" in capsys.readouterr().out


def test_rewinding_runs_are_those_of_fit_and_goals_are_judged(monkeypatch):
    tiny = Settings(seeds=1, half=8, batch_size=2, window=6, width=4, embedding=4)
    faults = {name: FAULTS[name] for name in ("none", "8 shuffled")}
    monkeypatch.setattr("benchmarks.bad_batches.FAULTS", faults)
    runs = run_rewinding(REWOUND, tiny, seed=0)
    assert {
        name: (len(run.losses), run.corrupt_taken) for name, run in runs.items()
    } == {
        "none": (2, 0),
        "8 shuffled": (2, 8),  # The rule has not seen 16 losses, and no value rises.
    }
    # The same batches by the loop on the device.
    found = study(tiny, {"spike": rewinding(tiny.learning_rate)[REWOUND]})["spike"]
    for name, run in runs.items():
        np.testing.assert_allclose(run.losses, found[name][0].losses, rtol=1e-5)
    seen = {
        "peak_excursion": [0.0, 0.08, 0.5],
        "steps_to_recover": [0, 0, 9],
        "healthy_steps_skipped": [0, 0, 1],
    }
    worse = {**seen, "healthy_steps_skipped": [0, 1, 1]}
    results = {name: {} for name, _ in GOALS}
    for name, fault in GOALS:
        results[name][fault] = worse if fault == "32 shuffled" else seen
    assert {line["fault"]: line["is_met"] for line in judge(results)} == {
        "none": False,
        "8 shuffled": True,
        "32 shuffled": False,
        "100 shuffled": True,
        "loss x 5 for good": True,
    }
