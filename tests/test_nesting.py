"""A guard inside of what has state of its own: warned of once, where all is seen."""

import contextlib
import warnings
from typing import Any, NamedTuple

import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard._guarding import nesting
from optax_guard._guarding.nesting import names_outside_of_guard
from optax_guard.flax import TrainState

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(2)}
ONE = {"a": True, "b": False}
OTHER = {"a": False, "b": True}
GUARDED = og.guard(optax.adam(0.1))

OUTSIDE = {
    "average after": (optax.chain(GUARDED, optax.ema(0.9)), ["EmaState"]),
    "momentum before": (
        optax.chain(optax.trace(0.9), og.guard(optax.sgd(0.1))),
        ["TraceState"],
    ),
    "adam and average": (
        optax.chain(optax.scale_by_adam(), optax.ema(0.9), GUARDED),
        ["EmaState", "ScaleByAdamState"],
    ),
    "masked momentum": (
        optax.chain(optax.masked(optax.trace(0.9), ONE), GUARDED),
        ["TraceState"],
    ),
    "in a part of a partition": (
        optax.partition(
            {"x": optax.chain(GUARDED, optax.ema(0.9)), "y": optax.sgd(0.1)},
            {"a": "x", "b": "y"},
        ),
        ["EmaState"],
    ),
    "under hyperparameters": (
        optax.inject_hyperparams(
            lambda rate: optax.chain(og.guard(optax.sgd(rate)), optax.ema(0.9))
        )(0.1),
        ["EmaState"],
    ),
    "inside of MultiSteps": (
        optax.MultiSteps(
            optax.chain(GUARDED, optax.trace(0.9)), 2
        ).gradient_transformation(),
        ["TraceState"],
    ),
}

IN_ORDER = {
    "outermost": GUARDED,
    "no guard": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "around a chain": og.guard(optax.chain(optax.adam(0.1), optax.ema(0.9))),
    "accumulated": og.accumulate(GUARDED, 2),
    "MultiSteps": optax.MultiSteps(GUARDED, 2).gradient_transformation(),
    "masked": optax.masked(GUARDED, ONE),
    "two masks": optax.chain(
        optax.masked(GUARDED, ONE), optax.masked(optax.adam(0.1), OTHER)
    ),
    "partition": optax.partition(
        {"x": GUARDED, "y": optax.adam(0.1)}, {"a": "x", "b": "y"}
    ),
    "hyperparameters": optax.inject_hyperparams(
        lambda rate: og.guard(optax.adam(rate))
    )(optax.constant_schedule(0.1)),
    "stateless clip": optax.chain(optax.clip_by_global_norm(1.0), GUARDED),
    "own clip": optax.chain(og.clip_by_global_norm(og.threshold.zscore()), GUARDED),
    "schedule": optax.chain(GUARDED, optax.scale_by_schedule(lambda count: 1.0)),
    "own plateau": optax.chain(GUARDED, og.stop.scale_by_plateau()),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As if the process had just begun."""
    monkeypatch.setattr(nesting, "_has_warned", False)
    monkeypatch.setattr(nesting, "_checked", set())


@pytest.mark.parametrize("name", OUTSIDE)
def test_state_outside_of_the_guard_is_named(name):
    tx, names = OUTSIDE[name]
    assert names_outside_of_guard(tx.init(PARAMS)) == names


@pytest.mark.parametrize("name", IN_ORDER)
def test_nothing_else_is(name):
    assert names_outside_of_guard(IN_ORDER[name].init(PARAMS)) == []


def test_what_is_named_changes_on_a_skipped_step():
    tx, _ = OUTSIDE["average after"]
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    bad = jax.tree.map(lambda g: g * np.nan, grads)
    _, after = tx.update(bad, state, PARAMS)
    assert og.find_state(after, og.GuardState).num_skipped == 1
    assert not np.array_equal(after[1].ema["a"], state[1].ema["a"])


def step(tx, state):
    return og.apply_gradients(tx, PARAMS, state, grads=PARAMS)


class Held(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def begin_fit(state):
    """Begins a run; what follows the checks of arguments is not of interest."""
    held = Held(np.int32(0), PARAMS, state)
    with contextlib.suppress(ValueError):
        og.loops.fit(
            held, lambda state, batch: (state, 0.0), [], num_steps=1, eval_every=1
        )


WHERE = {
    "apply_gradients": step,
    "jitted": lambda tx, state: jax.jit(lambda s: step(tx, s)).lower(state),
    "metrics": lambda tx, state: og.metrics(state),
    "create": lambda tx, state: TrainState.create(apply_fn=print, params=PARAMS, tx=tx),
    "fit": lambda tx, state: begin_fit(state),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_nested_guard_is_warned_of_where_the_state_is_seen(where):
    tx, _ = OUTSIDE["average after"]
    state = tx.init(PARAMS)
    with pytest.warns(UserWarning, match=r"\(EmaState\).*`guard\(optax.chain") as seen:
        WHERE[where](tx, state)
    assert [w.filename for w in seen] == [__file__]


MULTI = optax.MultiSteps(GUARDED, 2).gradient_transformation()


@pytest.mark.parametrize("where", WHERE)
def test_a_guard_in_multi_steps_is_warned_of_where_the_state_is_seen(where):
    state = MULTI.init(PARAMS)
    with pytest.warns(UserWarning, match=r"keeps a NaN.*`accumulate\(guard") as seen:
        WHERE[where](MULTI, state)
    assert [w.filename for w in seen] == [__file__]


def test_multi_steps_that_lets_no_nan_into_its_sum_is_not_warned_of():
    judging = optax.MultiSteps(GUARDED, 2, should_skip_update_fn=optax.skip_not_finite)
    inside = og.guard(optax.MultiSteps(optax.adam(0.1), 2))
    for tx in (judging, inside, optax.MultiSteps(optax.adam(0.1), 2)):
        assert not nesting.keeps_nan(tx.init(PARAMS))


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
def test_an_alarm_of_a_guard_in_multi_steps_tells_of_its_sum():
    state: Any = MULTI.init(PARAMS)
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    state = state._replace(acc_grads=bad)
    metrics = {"guard_exhausted": True, "skip_streak": 10, "skip_reason": 1}
    with pytest.raises(og.GuardExhaustedError, match=r"accumulator of `optax.Mul"):
        og.raise_if_exhausted(metrics, state)


def test_it_is_warned_of_once():
    tx, _ = OUTSIDE["average after"]
    state = tx.init(PARAMS)
    with pytest.warns(UserWarning, match="The guard is inside"):
        og.metrics(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        og.metrics(state)
        step(tx, state)


def test_a_state_in_order_is_looked_at_once(monkeypatch):
    state = IN_ORDER["schedule"].init(PARAMS)
    og.metrics(state)
    monkeypatch.setattr(nesting, "names_outside_of_guard", None)
    og.metrics(state)
    og.metrics(GUARDED.init({"c": jnp.ones(1)}))


class Carry(NamedTuple):
    """A train state that is a named tuple."""

    step: int
    params: Any
    opt_state: Any


@pytest.mark.parametrize("form", ["train state", "dict", "several", "list"])
def test_states_beside_each_other_are_not_outside(form):
    params = {"w": jnp.ones(3)}
    guarded = og.guard(optax.adam(0.1)).init(params)
    other = optax.adam(0.1).init(params)
    state = {
        "train state": Carry(0, params, guarded),
        "dict": {"params": params, "opt": guarded},
        "several": {"generator": guarded, "discriminator": other},
        "list": [guarded, other],
    }[form]
    og.metrics(state)
    assert not nesting._has_warned
