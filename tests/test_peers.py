"""The guard in two lines of other libraries' programs: a bad step has never been.

Of Flax, the loops with a `TrainState` are in `test_flax.py`, of NNX in `test_nnx.py`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from tests.strategies import same_bits

PARAMS = {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}


def grads_of(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), PARAMS)


GOOD = [grads_of(seed) for seed in range(4)]
BAD = jax.tree.map(lambda x: np.where(x == x.flat[1], np.nan, x), GOOD[0])

# What a user has, and the guard around it. The rest of the program stays as it is.
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: og.guard(
        optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(), clip=1.0
    ),
    "inject_hyperparams": lambda: og.guard(
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), clip=1.0
    ),
    "schedule_free": lambda: og.guard(
        optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1), clip=1.0
    ),
    "muon": lambda: og.guard(
        optax.contrib.muon(optax.linear_schedule(0.1, 0.0, 9), ns_steps=2), clip=1.0
    ),
}


class Loop:
    """A user's own loop: `update`, then `apply_updates`, compiled once."""

    def __init__(self, tx: Any):
        self.tx = tx
        self.step = jax.jit(self._step)

    def _step(self, params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def after(self, sequence: list[Any], opt_state: Any = None) -> tuple[Any, Any]:
        params: Any = jax.tree.map(jnp.array, PARAMS)
        opt_state = self.tx.init(params) if opt_state is None else opt_state
        for grads in sequence:
            params, opt_state = self.step(params, opt_state, grads)
        return params, opt_state


@pytest.fixture(scope="module")
def loops() -> dict[str, Loop]:
    """One of each for all tests, so that each is compiled once."""
    return {name: Loop(build()) for name, build in OPTIMIZERS.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_steps_leave_no_trace_in_optaxs_own(name, loops):
    first, second, *rest = GOOD
    expected, clean = loops[name].after([first, second, *rest])
    # Also in the middle of what `MultiSteps` accumulates.
    params, opt_state = loops[name].after([BAD, first, BAD, BAD, second, BAD, *rest])
    assert same_bits(params, expected)
    assert same_bits(og.unwrap_state(opt_state), og.unwrap_state(clean))
    assert og.metrics(opt_state)["num_skipped"] == 4
    # The test would see it: another run comes to other parameters.
    assert not same_bits(loops[name].after([first, *rest])[0], expected)


def test_learning_rate_of_inject_hyperparams_is_set_through_the_guard(loops):
    loop = loops["inject_hyperparams"]
    still = optax.tree.set(loop.tx.init(PARAMS), learning_rate=jnp.float32(0))
    params, opt_state = loop.after([GOOD[0], BAD], still)
    assert same_bits(params, jax.tree.map(jnp.array, PARAMS))
    assert optax.tree.get(opt_state, "learning_rate") == 0


def test_averages_of_schedule_free_are_read_through_the_guard(loops):
    params, opt_state = loops["schedule_free"].after([*GOOD, BAD])
    own = og.find_state(opt_state, optax.contrib.ScheduleFreeState)
    averages = optax.contrib.schedule_free_eval_params(own, params)
    assert not same_bits(averages, params)
    expected = loops["schedule_free"].after(GOOD)[1]
    expected = og.find_state(expected, optax.contrib.ScheduleFreeState)
    assert same_bits(own, expected)


# Trees of parameters of other libraries ----------------------------------------

X = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]], np.float32)
BATCHES = [X, X[::-1].copy(), 2 * X]
BAD_BATCH = np.where(X == 0.7, np.inf, X).astype(np.float32)


def test_bad_batches_leave_no_trace_in_a_model_of_equinox():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    tx = og.guard(optax.adamw(0.1), clip=1.0)

    @eqx.filter_jit
    def step(model: Any, opt_state: Any, x: Any) -> tuple[Any, Any]:
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean(jax.vmap(m)(x)))(
            model
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return eqx.apply_updates(model, updates), opt_state

    def after(batches: list[Any]) -> tuple[Any, Any]:
        # Holes, in place of what is no array, such as activation functions.
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        trained = model
        for x in batches:
            trained, opt_state = step(trained, opt_state, x)
        return trained, opt_state

    expected, clean = after(BATCHES)
    trained, opt_state = after([BAD_BATCH, *BATCHES[:1], BAD_BATCH, *BATCHES[1:]])
    assert eqx.tree_equal(trained, expected)
    assert not eqx.tree_equal(trained, model)
    assert eqx.tree_equal(og.unwrap_state(opt_state), og.unwrap_state(clean))
    skipped = og.skipped_steps(opt_state, eqx.filter(model, eqx.is_inexact_array))
    assert [(r.update, r.leaf) for r in skipped] == [
        (0, "layers/0/weight"),
        (2, "layers/0/weight"),
    ]


def test_bad_batches_leave_no_trace_in_trees_of_haiku():
    # As `haiku.transform_with_state` has them: arrays by name, by path of the module.
    params: Any = {
        "mlp/~/linear_0": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)},
        "mlp/~/linear_1": {"w": jnp.ones((2, 1))},
    }
    state: Any = {"mlp/~/batch_norm": {"average": jnp.zeros(3)}}
    tx = og.guard(optax.adamw(0.1), clip=og.clip_by_leaf_norm(1.0))

    def loss_fn(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        first, second = params.values()
        average = state["mlp/~/batch_norm"]["average"] / 2 + x.mean(0) / 2
        hidden = jnp.tanh((x - average) @ first["w"] + first["b"])
        return jnp.mean((hidden @ second["w"]) ** 2), {
            "mlp/~/batch_norm": {"average": average}
        }

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, x: Any) -> Any:
        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, x)
        params, opt_state = og.apply_gradients(
            tx, params, opt_state, grads=grads, value=loss
        )
        return params, og.keep_if_skipped(opt_state, new, state), opt_state

    def after(batches: list[Any]) -> Any:
        trained = params, state, tx.init(params)
        for x in batches:
            trained = step(*trained, x)
        return trained

    expected = after(BATCHES)
    trained = after([BAD_BATCH, *BATCHES[:1], BAD_BATCH, *BATCHES[1:]])
    assert same_bits(trained[:2], expected[:2])
    assert not same_bits(trained[0], params)
    assert same_bits(og.unwrap_state(trained[2]), og.unwrap_state(expected[2]))
    assert og.skipped_steps(trained[2], params)[0].leaf == "mlp/~/linear_0/w"
