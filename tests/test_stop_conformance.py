"""Stopping as other systems do: recorded cases of 24 systems, and where we differ.

The cases were made by running those systems, or come from their own tests; `source`
and `derivation` of each say which. Those marked `bug_compat` or `quirk` are behavior
not worth copying: what we do instead is asserted, with the reason.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_guard import stop
from optax_guard.stop._presets import from_flax, from_keras, from_lightning
from optax_guard.stop._rule import StopReason
from optax_guard.stop._stopper import early_stopping

CASES = json.loads((Path(__file__).parent / "data" / "stop_cases.json").read_text())
COPIED = [case for case in CASES if "compat" not in case]
DIFFERENT = [case for case in CASES if "compat" in case]

# Patience as those systems count it, in our evaluations.
OFFSETS = {"composer": 1, "netket": 1, "jinns": 1, "torch_reduce_lr_on_plateau": 1}


def flat(patience, *, delta, relative):
    """T5X's rule: the last values differ from their neighbors by no more than this."""

    def init():
        return jnp.full((patience,), jnp.inf, jnp.float32)

    def update(observation, window):
        window = jnp.append(window[1:], observation.value)
        before, after = window[:-1], window[1:]
        step = before - after
        is_flat = jnp.all(step <= delta + relative * jnp.abs(before))
        fired = jnp.all(jnp.isfinite(window)) & is_flat
        reason = jnp.asarray(int(StopReason.EXTERNAL), jnp.int32)
        return stop.Verdict(fired, reason), window

    return stop.StopRule(init, update)


def pruned(patience, *, delta):
    """Optuna's rule: all of the last values are worse than the best before them."""

    def init():
        return jnp.full((patience + 1,), jnp.inf, jnp.float32), jnp.asarray(
            jnp.inf, jnp.float32
        )

    def update(observation, state):
        window, best_before = state
        best_before = jnp.minimum(best_before, window[0])
        window = jnp.append(window[1:], observation.value)
        fired = best_before + delta < jnp.min(window)
        reason = jnp.asarray(int(StopReason.EXTERNAL), jnp.int32)
        return stop.Verdict(fired, reason), (window, best_before)

    return stop.StopRule(init, update)


def stopper_of(system, config):
    """Maps the arguments of a system to ours."""
    mode = config["mode"]
    if system == "flax":
        return from_flax(config["min_delta"], config["patience"])
    if system == "keras":
        return from_keras(**config)
    if system == "lightning":
        return from_lightning("loss", **config)
    if system == "prechelt_gl":
        rule = stop.generalization_loss(config["alpha"])
    elif system == "prechelt_pq":
        rule = stop.progress_quotient(config["alpha"], config["k"])
    elif system == "prechelt_up":
        rule = stop.successive_rises(config["s"], config["k"])
    elif system == "seed_rule_sliding":
        rule = stop.lag(config["k"], s=config["s"])
    elif system == "t5x":
        rule = flat(config["patience"], delta=config["atol"], relative=config["rtol"])
    elif system == "optuna":
        rule = pruned(config["patience"], delta=config["min_delta"])
    else:
        names = ("patience", "stopping_rounds", "n_iter_no_change", "n")
        patience = next(config[name] for name in names if name in config)
        relative = config.get("threshold_mode") == "rel"
        threshold = config.get("threshold", 0.0)
        delta = config.get("min_delta", config.get("tol", config.get("atol", 0.0)))
        rule = stop.patience(
            max(patience + OFFSETS.get(system, 0), 1),
            min_delta=delta if relative else max(delta, threshold),
            rel_delta=threshold if relative else config.get("rtol", 0.0),
            # Ignite's option; Hugging Face moves its best with any gain.
            cumulative=config.get("cumulative", system != "hf"),
        )
    return early_stopping(rule, mode=mode, nonfinite="wait")


def run(case):
    """Returns the final state, and `is_significant` of every evaluation.

    Not compiled: a hundred stoppers of a few evaluations each would take minutes.
    """
    with jax.disable_jit():
        return _run(case)


def _run(case):
    stopper = stopper_of(case["system"], _config(case))
    train = case["config"].get("train_metrics")
    state = stopper.init(jnp.asarray(-1))
    significant = []
    for i, value in enumerate(case["metrics"]):
        extra = {} if train is None else {"train_value": train[i]}
        state = stopper.update(float(value), state, jnp.asarray(i), **extra)
        significant.append(bool(state.is_significant))
        if state.should_stop:
            break
    return state, significant


def _config(case):
    config = dict(case["config"])
    config.pop("train_metrics", None)
    return config


def stop_index(state):
    return int(state.stopped_at) if state.should_stop else None


def raw_best(case, until):
    sign = 1 if case["config"]["mode"] == "min" else -1
    values = [sign * float(value) for value in case["metrics"][: until + 1]]
    values = [v if math.isfinite(v) else math.inf for v in values]
    return int(np.argmin(values))


# Hugging Face stops at the first evaluation with patience 0; we take no such number.
ZERO_MEANS_AT_ONCE = {"hf-02"}


@pytest.mark.parametrize("case", COPIED, ids=lambda case: case["id"])
def test_stops_where_the_other_system_does(case):
    if case["id"] in ZERO_MEANS_AT_ONCE:
        with pytest.raises(ValueError, match="`n` must be a whole number"):
            stop.patience(case["config"]["patience"])
        return
    state, significant = run(case)
    expected = case["expected"]
    assert stop_index(state) == expected["stop_index"]
    # The best is the raw best, whatever counts for the other system.
    last = len(case["metrics"]) - 1
    until = last if expected["stop_index"] is None else expected["stop_index"]
    best = raw_best(case, until)
    assert int(state.best_eval) == int(state.best_params) == best
    assert float(state.best_value) == np.float32(case["metrics"][best])
    if "improved" in expected:
        assert significant == expected["improved"]
    if "restored_epoch" in expected and case["config"].get("min_delta") == 0:
        assert int(state.best_params) == expected["restored_epoch"]


REASONS = {
    "PATIENCE_EXHAUSTED": StopReason.PATIENCE,
    "STOPPING_THRESHOLD": StopReason.TARGET,
    "DIVERGENCE_THRESHOLD": StopReason.DIVERGED,
    "NON_FINITE_METRIC": StopReason.NONFINITE,
    "NOT_STOPPED": StopReason.RUNNING,
}


@pytest.mark.parametrize(
    "case",
    [case for case in COPIED if "reason" in case["expected"]],
    ids=lambda case: case["id"],
)
def test_gives_the_reason_that_lightning_gives(case):
    state, _ = run(case)
    assert int(state.stop_reason) == REASONS[case["expected"]["reason"]]


# Our stop, our best, and why: for every case that is not worth copying.
DIFFERENCES = {
    "flax-09": (None, 4, "a first NaN is never the best"),
    "flax-10": (1, -1, "infinity never improves on infinity"),
    "flax-11": (2, 0, "-inf is no value: it counts as bad and is never the best"),
    "keras-11": (0, -1, "a first NaN is never the best, and counts as bad"),
    "keras-15": (1, 1, "a baseline is to be beaten within the patience"),
    "ignite-16": (1, 0, "NaN is no gain, so patience runs out"),
    "ignite-17": (1, 0, "a relative threshold has the right sign below zero"),
    "skorch-02": (3, 0, "a relative threshold has the right sign below zero"),
    "mmengine-02": (3, 0, "a tie is no gain"),
    "catalyst-01": (3, 0, "a tie is no gain"),
    "jinns-02": (None, 5, "an evaluation that improved does not stop the run"),
    "optax_reduce_on_plateau-02": (3, 0, "a relative threshold below zero"),
}


def test_every_case_not_copied_has_its_reason():
    assert {case["id"] for case in DIFFERENT} == set(DIFFERENCES)


@pytest.mark.parametrize("case", DIFFERENT, ids=lambda case: case["id"])
def test_differs_on_purpose(case):
    stops, best, why = DIFFERENCES[case["id"]]
    state, significant = run(case)
    assert stop_index(state) == stops, why
    assert int(state.best_eval) == best, why
    ours = (stops, best, significant)
    expected = case["expected"]
    theirs = (expected["stop_index"], expected["best_index"])
    assert ours != (*theirs, expected.get("improved", significant)), why


def test_flax_itself_stops_where_from_flax_does():
    flax_stopping = pytest.importorskip("flax.training.early_stopping")
    rng = np.random.default_rng(0)
    for patience in (0, 1, 3):
        theirs = flax_stopping.EarlyStopping(min_delta=0.25, patience=patience)
        stopper = from_flax(min_delta=0.25, patience=patience)
        state = stopper.init()
        for value in rng.integers(-8, 8, size=30) / 8:
            theirs = theirs.update(float(value))
            state = stopper.update(value, state)
            assert bool(state.should_stop) == theirs.should_stop
            if theirs.should_stop:
                break
            assert bool(state.is_significant) == theirs.has_improved


@pytest.mark.parametrize(
    ("name", "mode"), [("val_loss", "min"), ("val_accuracy", "max"), ("auc", "max")]
)
def test_keras_mode_auto_goes_by_the_name(name, mode):
    stopper = from_keras(monitor=name, restore_best_weights=True)
    state = stopper.update({name: 2.0, "other": 0.0}, stopper.init())
    state = stopper.update({name: 1.0, "other": 0.0}, state)
    assert bool(state.is_best) == (mode == "min")


def test_keras_start_from_epoch_disregards_first_epochs():
    stopper = from_keras(patience=1, start_from_epoch=2)
    state = stopper.init()
    for value in [0.0, 0.0, 3.0]:
        state = stopper.update(value, state)
    assert not state.should_stop
    assert int(state.best_eval) == 2


def test_presets_refuse_negative_patience():
    for build in (from_flax, from_keras, lambda **kw: from_lightning("loss", **kw)):
        with pytest.raises(
            ValueError, match=r"`patience` must be .*at least 0, got -1"
        ):
            build(patience=-1)


def test_keras_mode_is_checked():
    with pytest.raises(ValueError, match=r"`mode` must be one of 'auto', 'min', 'max'"):
        from_keras(mode="down")


@pytest.mark.parametrize("name", ["ignite-08", "prechelt_up-08", "lightning-04"])
def test_cases_run_the_same_in_one_compiled_scan(name):
    case = next(case for case in COPIED if case["id"] == name)
    stopper = stopper_of(case["system"], _config(case))
    values = jnp.asarray(case["metrics"], jnp.float32)

    def body(state, value):
        return stopper.update(value, state), None

    state, _ = jax.lax.scan(body, stopper.init(), values)
    assert stop_index(state) == case["expected"]["stop_index"]
