"""What must hold on the device itself: bits, norms, buffers, no waiting for the host.

All of this is skipped where JAX finds only a CPU, for which other files hold it. On an
accelerator run `pytest -m accelerator` with `JAX_PLATFORMS=cuda`, or as it is named
there; it selects the laws, norms and clips as well. With `OPTAX_GUARD_DRY_RUN=1` the
tests of this file run on a CPU, too.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_guard as og
from optax_guard.flax import TrainState
from tests.strategies import same_bits, true_norm

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(
        jax.default_backend() == "cpu" and not os.environ.get("OPTAX_GUARD_DRY_RUN"),
        reason="JAX finds only a CPU: set JAX_PLATFORMS, or OPTAX_GUARD_DRY_RUN=1",
    ),
]

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(
        optax.exponential_decay(1.0, 3, 0.5), momentum=0.9, nesterov=True
    ),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2),
}
SHAPES = {"matrix": (130, 129), "vector": (257,), "scalar": ()}


def tree_of(dtype: Any, scale: float) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(scale * random.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def step_by(way: str, tx: Any) -> Callable[..., Any]:
    def by_update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def by_apply_gradients(params: Any, state: Any, grads: Any) -> Any:
        return og.apply_gradients(tx, params, state, grads=grads)

    return by_update if way == "update" else by_apply_gradients


# Bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["update", "apply_gradients"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_step_changes_no_bit(name, dtype, way):
    tx = og.guard(OPTIMIZERS[name](), clip=1.0)
    step = jax.jit(step_by(way, tx))
    params, grads = tree_of(dtype, 0.1), tree_of(dtype, 0.01)
    taken = step(params, tx.init(params), grads)
    assert not same_bits(taken[0], params)
    new, state = taken
    for bad in (math.nan, math.inf, -math.inf):
        for leaf in SHAPES:
            spoiled = dict(grads)
            spoiled[leaf] = grads[leaf].ravel().at[-1].set(bad).reshape(SHAPES[leaf])
            new, state = step(*taken, spoiled)
            assert same_bits(new, taken[0])
            assert same_bits(state.wrapped_state, taken[1].wrapped_state)
            assert state.num_skipped == taken[1].num_skipped + 1
    # The guard's records are of the last; the next good step is taken.
    after, state = step(new, state, grads)
    assert not same_bits(after, new)
    assert state.skip_streak == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_under_the_threshold_keep_their_bits(dtype):
    tx = og.clip_by_global_norm(1e4)
    grads = tree_of(dtype, 0.01)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert same_bits(updates, grads)


# Norms --------------------------------------------------------------------------


@jax.jit
def norm_of(tree: Any) -> jax.Array:
    tx = og.record_norm()
    return og.metrics(tx.update(tree, tx.init(tree))[1])["grad_norm"]


# The norm of the last of them, of a thousand entries, is just below 3e38.
@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30, 9e36])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_is_right_to_a_millionth(dtype, size):
    values = np.random.default_rng(1).uniform(-1, 1, 1000) * size
    x = jnp.asarray(values.astype(np.float32), dtype)
    tree = {"a": x[:1], "b": x[1:300].reshape(13, 23), "c": x[300:]}
    np.testing.assert_allclose(norm_of(tree), true_norm(tree), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_of_a_large_array_is_right_to_a_millionth(dtype):
    x = jax.random.normal(jax.random.key(0), (3_000_017,), jnp.float32).astype(dtype)
    np.testing.assert_allclose(norm_of([x]), true_norm([x]), rtol=1e-6)


def test_norm_of_many_leaves_of_all_magnitudes_is_right_to_a_millionth():
    random = np.random.default_rng(2)
    dtypes = (jnp.float32, jnp.bfloat16)
    tree = [
        jnp.asarray(size * random.normal(size=7), dtypes[i % 2])
        for i, size in enumerate(np.geomspace(1e-25, 1e37, 200))
    ]
    np.testing.assert_allclose(norm_of(tree), true_norm(tree), rtol=1e-6)
    # Without the large ones the small ones count.
    few = tree[:40]
    np.testing.assert_allclose(norm_of(few), true_norm(few), rtol=1e-6)


# Buffers ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["update", "apply_gradients"])
def test_donated_parameters_and_state_are_reused(way):
    tx = og.guard(optax.adamw(1e-3), clip=1.0)
    step = jax.jit(step_by(way, tx), donate_argnums=(0, 1))
    params = [jnp.full((200, 100), float(i + 1)) for i in range(20)]
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    # Of the scalars some are recomputed, and not read: those are left alone.
    large = [x for x in jax.tree.leaves((params, state)) if x.nbytes > 1000]
    total = sum(x.nbytes for x in large)
    memory: Any = step.lower(params, state, grads).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= total
    with warnings.catch_warnings():
        # Of buffers that could not be donated.
        warnings.simplefilter("error")
        jax.block_until_ready(step(params, state, grads))
    assert all(x.is_deleted() for x in large)


def test_nothing_is_copied_to_or_from_the_host():
    tx = og.guard(optax.adamw(1e-3), clip=og.threshold.zscore(), skip=og.skip.spike())
    stopper = og.early_stopping(og.stop.patience(3))

    @jax.jit
    def step(params: Any, state: Any, stop: Any, grads: Any) -> Any:
        params, state = og.apply_gradients(tx, params, state, grads=grads)
        metrics = og.metrics(state)
        return (
            params,
            state,
            stopper.update(metrics["grad_norm"], stop, params),
            metrics,
        )

    params, grads = tree_of("float32", 0.1), tree_of("float32", 0.01)
    state, stop = tx.init(params), stopper.init(params)
    metrics = step(params, state, stop, grads)[-1]
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            params, state, stop, metrics = step(params, state, stop, grads)
    assert metrics["num_updates"] == 5
    # Outside of jit a step may send constants, but reads nothing.
    with jax.transfer_guard_device_to_host("disallow"):
        stop = stopper.update(metrics["grad_norm"], stop, params)
    assert bool(stop.should_stop)


# Training -----------------------------------------------------------------------

GUARDED = og.guard(optax.adamw(1e-2), clip=1.0)
IMAGES = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
TARGETS = np.sin(IMAGES.sum(axis=1, keepdims=True))
SPOILED = 7


def batches(steps: int) -> Any:
    """The same batch each time, but for a NaN in one of them."""
    bad = IMAGES.copy()
    bad[5, 3] = np.nan
    return [bad if i == SPOILED else IMAGES for i in range(steps)]


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


def test_linen_loop_skips_the_nan_and_learns():
    model = Perceptron()
    variables = model.init(jax.random.key(0), IMAGES)
    state = TrainState.create(apply_fn=model.apply, tx=GUARDED, **variables)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, x: jax.Array) -> tuple[TrainState, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, x) - TARGETS) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    losses = []
    for i, batch in enumerate(batches(60)):
        before = jax.tree.map(np.array, state.params)
        state, loss = step(state, batch)
        losses.append(float(loss))
        assert same_bits(before, jax.tree.map(np.array, state.params)) == (i == SPOILED)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [SPOILED]
    assert og.metrics(state)["num_skipped"] == 1
    assert losses[-1] < 0.5 * losses[0]


def test_nnx_loop_skips_the_nan_and_learns():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(8, 32, rngs=rngs)
            self.last = nnx.Linear(32, 1, rngs=rngs)

        def __call__(self, x: Any) -> jax.Array:
            return self.last(nnx.tanh(self.first(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, GUARDED, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(
            lambda model: jnp.mean((model(x) - TARGETS) ** 2)
        )(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(step(model, optimizer, batch)) for batch in batches(60)]
    assert np.flatnonzero(np.isnan(losses)).tolist() == [SPOILED]
    assert og.metrics(optimizer.opt_state)["num_skipped"] == 1
    assert losses[-1] < 0.5 * losses[0]
