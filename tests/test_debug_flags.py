"""JAX's debugging flags find nothing in healthy steps of any public factory."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard import stop
from optax_guard.flax import TrainState, fit
from optax_guard.loops import train_on_device
from tests.test_laws import (
    FORMS,
    SCOPES,
    THRESHOLDS,
    Form,
    grads_of_norm,
    in_the_table,
    named,
    over,
    product,
    tree_of,
)

# What these look at is there when a function is traced.
PROMOTION: list[Callable[[], Any]] = [
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.numpy_dtype_promotion("strict"),
]
OF_TRACES: list[Callable[[], Any]] = [
    *PROMOTION,
    lambda: jax.legacy_prng_key("error"),
    jax.checking_leaks,
    lambda: jax.enable_checks(True),
    lambda: jax.enable_custom_prng(True),
    lambda: jax.debug_key_reuse(True),
]
NANS: list[Callable[[], Any]] = [lambda: jax.debug_nans(True)]
NANS_AND_INFS = [*NANS, lambda: jax.debug_infs(True)]


@contextlib.contextmanager
def flags(contexts: list[Callable[[], Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


# Transformations -------------------------------------------------------------------

# Under its bound, above it, and under it again.
GRADS = [grads_of_norm(norm, seed=i) for i, norm in enumerate((0.5, 20.0, 0.3))]
# The threshold of these is infinite, and is in the state.
WITHOUT_A_THRESHOLD: set[str] = set()
# Every factory, threshold and scope; `make test-all` takes every form.
SHORT = (FORMS.keys() - product().keys()) | {
    *(named("norm", threshold, "alone") for threshold in THRESHOLDS),
    *(named(scope, "a number", "alone") for scope in SCOPES),
    named("leaf", "quantile", "alone"),
}
TYPICAL = {
    name: FORMS[name]
    for name in ("norm by quantile", "value", "guard with rules", "accumulate")
}
ONE = {"guard with rules"}


def after_steps(tx: Any, update: Callable[..., Any]) -> Any:
    params = tree_of("mixed")
    state = tx.init(params)
    for grads in GRADS:
        _, state = update(grads, state, params, value=jnp.float32(0.5))
    return state


def test_no_factory_is_missing():
    assert {FORMS[name].factory for name in SHORT} == in_the_table()


@over(FORMS, SHORT)
def test_step_promotes_neither_ranks_nor_dtypes(form):
    tx, params = form.built(), tree_of("mixed")

    def step(grads: Any) -> Any:
        return tx.update(grads, tx.init(params), params, value=jnp.float32(0.5))

    with flags(PROMOTION):
        jax.eval_shape(step, GRADS[0])


@over(FORMS, SHORT)
def test_steps_outside_of_jit_make_no_nan_and_no_infinity(form):
    tx = form.built()
    is_infinite = form in [FORMS[name] for name in WITHOUT_A_THRESHOLD]
    with flags(NANS if is_infinite else NANS_AND_INFS):
        after_steps(tx, tx.update)


@over(TYPICAL, {"value"})
def test_no_operation_of_a_step_makes_a_nan(form):
    tx = form.built()
    with flags(NANS), jax.disable_jit():
        after_steps(tx, tx.update)


@over(TYPICAL, ONE)
def test_no_flag_finds_a_fault_in_jitted_steps(form: Form):
    tx = form.built()
    with flags(OF_TRACES + NANS_AND_INFS):
        og.metrics(after_steps(tx, jax.jit(tx.update)))


@pytest.mark.parametrize("make", [og.clip_by_global_norm, og.clip_by_value])
def test_sums_over_a_mesh_axis_promote_neither_ranks_nor_dtypes(make):
    tx = og.guard(optax.sgd(0.1), clip=make(1.0, axis_name="data"))
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 2, 2))}

    def step(grads: Any) -> Any:
        return tx.update(grads, tx.init(grads), grads, value=jnp.float32(0.5))

    with flags(PROMOTION):
        jax.eval_shape(jax.vmap(step, axis_name="data"), params)


def test_reading_the_state_trips_no_flag():
    tx = og.guard(optax.sgd(0.1), clip=og.clip_by_leaf_norm(1.0, record_quantiles=True))

    def read(grads: Any) -> Any:
        _, state = tx.update(grads, tx.init(grads), grads)
        return (
            og.metrics(state),
            og.leaf_norms(state),
            og.norm_quantile(state, jnp.array([0.1, 0.9])),
            og.norm_quantile(state, jnp.array([0.1, 0.9]), by_group=True),
            og.norm_quantile(state, 0.5, by_group=True),
        )

    with flags(OF_TRACES):
        jax.eval_shape(read, GRADS[0])
    with flags(NANS_AND_INFS):
        jax.jit(read)(GRADS[0])


# Stoppers --------------------------------------------------------------------------

RULES: dict[str, Callable[[], Any]] = {
    "all_of": lambda: stop.all_of(stop.patience(2), stop.target(1.0)),
    "any_of": lambda: stop.any_of(stop.patience(2), stop.target(1.0)),
    "budget": lambda: stop.budget(evaluations=9, steps=99, seconds=99.0),
    "cooldown": lambda: stop.cooldown(stop.patience(2), 2),
    "divergence": lambda: stop.divergence(9.0),
    "generalization_loss": lambda: stop.generalization_loss(5.0),
    "held_for": lambda: stop.held_for(stop.target(1.0), 2),
    "lag": lambda: stop.lag(2),
    "monitor": lambda: stop.monitor("loss", stop.patience(2)),
    "not_before": lambda: stop.not_before(stop.patience(2), seconds=2.0),
    "overfitting": lambda: stop.overfitting(2),
    "patience": lambda: stop.patience(seconds=9.0),
    "plateau": lambda: stop.plateau(2, max_reductions=2),
    "progress_quotient": lambda: stop.progress_quotient(5.0, 2),
    "skip_storm": lambda: stop.skip_storm(2),
    "successive_rises": lambda: stop.successive_rises(2, 2),
    "target": lambda: stop.target(0.0),
}
SMOOTHERS = {"ema": lambda: stop.ema(0.5), "median": lambda: stop.median(3)}


def test_no_rule_is_missing():
    factories = {
        name
        for name in stop.__all__
        if inspect.isfunction(f := getattr(stop, name))
        if inspect.signature(f).return_annotation is stop.StopRule
    }
    assert factories <= RULES.keys()


def stopped(rules: list[Any], smooth: Any, evaluations: int) -> Any:
    """The state of a stopper after evaluations of which each is better."""
    stopper = og.early_stopping(stop.any_of(*rules), key="loss", smooth=smooth)
    opt_state = og.guard(optax.sgd(0.1)).init(jnp.ones(2))
    state = stopper.init({"w": jnp.ones(2)})
    for i in range(evaluations):
        state = stopper.update(
            {"loss": jnp.float32(3.0 - i / 8)},
            state,
            {"w": jnp.ones(2)},
            step=jnp.int32(i),
            seconds=jnp.float32(0.5),
            train_value=jnp.array([2.0, 1.5]),
            opt_state=opt_state,
        )
    return state


@pytest.mark.parametrize("smooth", ["ema", "median"])
def test_no_flag_finds_a_fault_in_a_stopper(smooth):
    run = functools.partial(
        stopped, [rule() for rule in RULES.values()], SMOOTHERS[smooth]()
    )
    with flags(OF_TRACES):
        jax.eval_shape(functools.partial(run, 1))
    with flags(NANS):
        assert not run(3).should_stop
        with jax.disable_jit():
            assert not run(2).should_stop


# Loops -----------------------------------------------------------------------------


def train_step(state: Any, x: Any) -> Any:
    loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - x) ** 2))(state.params)
    return state.apply_gradients(grads=grads, value=loss), {"loss": loss}


@pytest.mark.parametrize("loop", [fit, train_on_device])
def test_no_flag_finds_a_fault_in_a_run(loop):
    tx = og.guard(optax.sgd(0.1), clip=og.clip_by_value(1.0))
    state = TrainState.create(apply_fn=str, params=jnp.ones(2), tx=tx)
    with flags(PROMOTION + NANS_AND_INFS):
        result = loop(
            state,
            train_step,
            lambda step: jnp.float32(0.5) if loop is train_on_device else np.float32(0),
            num_steps=6,
            eval_every=3,
            evaluate=lambda state: jnp.sum(state.params**2),
        )
    assert [row["step"] for row in result.history] == [3, 6]


def test_run_on_the_device_that_stops_early_holds_no_nan():
    tx = og.guard(optax.sgd(0.1), clip=1.0)
    state = TrainState.create(apply_fn=str, params=jnp.ones(2), tx=tx)
    with flags(NANS):
        result = train_on_device(
            state,
            train_step,
            lambda step: jnp.float32(0),
            num_steps=6,
            eval_every=2,
            evaluate=lambda state: jnp.sum(state.params**2),
            stopper=og.early_stopping(stop.target(1.9)),
        )
    assert [row["step"] for row in result.history] == [2]
