"""Calls with wrong arguments: each fails with an answer that says what to write."""

# The calls are wrong, and type checkers see it: the decorator keeps the signatures.
# pyright: reportCallIssue=false, reportArgumentType=false

import inspect
import re

import pytest

pytest.importorskip("flax")

import jax.numpy as jnp
import optax

import optax_guard as og
from optax_guard import stop
from optax_guard._public import answers_wrong_calls
from optax_guard._wrong_guesses import WRONG_GUESSES
from optax_guard.flax import TrainState
from tests.public import public_names

SGD = optax.sgd(0.1)
STOPPER = og.early_stopping(stop.patience(2))
PARAMS = jnp.ones(2)

CALLS = {
    "guard max_norm": (lambda: og.guard(SGD, max_norm=1.0), "`clip=1.0`"),
    "guard clip_norm": (lambda: og.guard(SGD, clip_norm=2), "`clip=2`"),
    "guard errors": (
        lambda: og.guard(SGD, max_consecutive_errors=5),
        "`max_consecutive_skips=5`",
    ),
    "guard alone": (lambda: og.guard(clip=1.0), "`guard(optax.adam(1e-3), clip=1.0)`"),
    "stopping patience": (
        lambda: og.early_stopping(patience=5),
        "`early_stopping(stop.patience(5))`",
    ),
    "stopping monitor": (
        lambda: og.early_stopping(stop.patience(5), monitor="val_loss"),
        "`key='val_loss'`",
    ),
    "patience patience": (lambda: stop.patience(patience=5), "`stop.patience(5)`"),
    "patience in place": (
        lambda: stop.patience(5, 0.1),
        "`stop.patience(n, min_delta=0.1)`",
    ),
    "patience mode": (
        lambda: stop.patience(5, mode="max"),
        "`early_stopping(stop.patience(...), mode='max')`",
    ),
    "budget": (lambda: stop.budget(10), "`stop.budget(evaluations=10)`"),
    "best": (
        lambda: STOPPER.best(STOPPER.init(PARAMS)),
        "`best` needs the argument `default`. Write `stopper.best(state, params)`",
    ),
    "update": (lambda: STOPPER.update(0.5), "`state = stopper.update(value, state, "),
    "reset": (lambda: STOPPER.reset(), "`state = stopper.reset(state)`"),
    "ema": (lambda: stop.ema(alpha=0.1), "`1 - alpha`: write `stop.ema(1 - 0.1)`"),
    "any_of": (lambda: stop.any_of([stop.patience(1)]), "`stop.any_of(*rules)`"),
    "any_of by name": (lambda: stop.any_of(rules=[]), "`stop.any_of(*rules)`"),
    "all_of": (lambda: stop.all_of(x for x in ()), "`stop.all_of(*rules)`"),
    "clip": (lambda: og.clip_by_global_norm(max_delta=1.0), "`max_norm=1.0`"),
    "clip of gradients": (
        lambda: og.clip_by_global_norm(PARAMS, 1.0),
        "`guard(optimizer, clip=1.0)`",
    ),
    "value clip": (lambda: og.clip_by_value(max_delta=1.0), "`max_value=1.0`"),
    "step": (
        lambda: og.apply_gradients(SGD, PARAMS, SGD.init(PARAMS), PARAMS),
        "`apply_gradients(tx, params, opt_state, grads=grads)`",
    ),
    "step without gradients": (
        lambda: og.apply_gradients(SGD, PARAMS, SGD.init(PARAMS), gradients=PARAMS),
        "`apply_gradients(tx, params, opt_state, grads=grads)`",
    ),
    "flax step": (
        lambda: TrainState.create(apply_fn=None, params=PARAMS, tx=SGD).apply_gradients(
            PARAMS
        ),
        "`state.apply_gradients(grads=grads)`",
    ),
    "flax create": (
        lambda: TrainState.create(params=PARAMS, tx=SGD),
        "`create(apply_fn=model.apply, params=params, tx=tx)`",
    ),
    "value that is long": (
        lambda: og.clip_by_value(max_norm=PARAMS),
        "`max_value=...`",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_says_what_to_write(name):
    call, answer = CALLS[name]
    with pytest.raises(TypeError, match=re.escape(answer)):
        call()


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: og.guard(SGD, clip=og.threshold.zscore), "zscore"),
        (lambda: og.guard(SGD, skip=og.skip.spike), "spike"),
        (lambda: og.early_stopping(stop.patience), "patience"),
        (lambda: og.clip_by_leaf_norm(og.threshold.quantile), "quantile"),
    ],
)
def test_a_function_that_was_not_called_is_told_from_a_schedule(call, hint):
    with pytest.raises(TypeError, match=rf"Call the function: `{hint}\(\.\.\.\)`\.$"):
        call()
    og.guard(SGD, clip=optax.linear_schedule(1.0, 0.5, 10))


def test_parameters_in_the_place_of_the_state_are_told_the_order():
    tx = og.guard(SGD)
    with pytest.raises(TypeError, match=r"order is `update\(grads, state, params\)`"):
        tx.update({"w": PARAMS}, {"w": PARAMS}, tx.init({"w": PARAMS}))


def test_other_names_get_the_nearest_and_the_list():
    text = r"argument 'clipp'.* Did you mean .clip.\? The arguments are `inner`, `clip`"
    with pytest.raises(TypeError, match=text):
        og.guard(SGD, clipp=1.0)
    with pytest.raises(TypeError, match=r"'zzzz'\. The arguments are `decay`\.$"):
        stop.ema(zzzz=1.0)


@answers_wrong_calls
def scaled(number: int, *, scale: int = 1) -> int:
    """Returns a multiple; of a negative number, by a call that does not fit."""
    return max() if number < 0 else number * scale


def test_an_error_from_inside_the_function_is_not_answered_anew():
    with pytest.raises(TypeError, match=r"^max expected at least 1 argument, got 0$"):
        scaled(-1)
    with pytest.raises(
        TypeError, match=r"'number'\. The arguments are `number`, `scale`"
    ):
        scaled()
    assert scaled(2, scale=3) == 6


def test_signatures_are_kept():
    assert list(inspect.signature(scaled).parameters) == ["number", "scale"]
    assert "number * scale" in inspect.getsource(scaled)
    assert optax.inject_hyperparams(og.clip_by_value)(1.0).init(PARAMS) is not None


def test_the_table_names_functions_and_no_argument_that_exists():
    """But those of calls without it, which have no default."""
    public = public_names()
    named = {n.removeprefix("flax.").split(".")[-1]: f for n, f in public.items()}
    methods = {
        "early_stopping.update": STOPPER.update,
        "early_stopping.reset": STOPPER.reset,
        "best": STOPPER.best,
        "average": STOPPER.average,
        "TrainState.apply_gradients": TrainState.apply_gradients,
        "TrainState.create": TrainState.create,
    }
    for name, guesses in WRONG_GUESSES.items():
        function = methods.get(name) or named[name]
        parameters = inspect.signature(function).parameters
        for guess in " ".join(guesses).split():
            known = parameters.get(guess)
            assert known is None or known.default is known.empty, (name, guess)
        # Without the decorator the table is not asked.
        assert hasattr(function, "__wrapped__"), name
