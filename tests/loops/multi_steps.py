"""Accumulated steps over parameters with logical axes, as MaxText trains."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import spmd
from flax.training.train_state import TrainState

import optax_guard as og  # guarded

RULES = (("embed", None), ("mlp", "model"))
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
adamw = optax.adamw(0.05)
tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), adamw), 2)  # theirs
tx = og.accumulate(og.guard(adamw, clip=1.0), 2)  # guarded


def kernel(*names):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, kernel_init=kernel("embed", "mlp"))(x)
        return nn.Dense(1, use_bias=False, kernel_init=kernel("mlp", None))(nn.tanh(x))


model = Model()


def first():
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return state.replace(step=jnp.int32(0))  # One type for all steps.


specs = nn.get_partition_spec(jax.eval_shape(first))
shardings = spmd.logical_to_mesh_sharding(specs, mesh, RULES)
place = jax.jit(lambda: nn.unbox(first()), out_shardings=shardings)


def create():
    return place()


@jax.jit
def step(state, batch):
    def loss_fn(params):
        out = state.apply_fn({"params": params}, batch["x"])
        return jnp.mean((out[:, 0] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) * np.float32(fault)}


def params(state):
    return state.params


kept = params


def num_bad(state):
    return state.opt_state.num_dropped


def reads(state):
    kernel = optax.tree.get(state.opt_state, "mu")["Dense_0"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    inner = state.opt_state
    return {"mini": inner.mini_step * 1.0, "steps": inner.gradient_step * 1.0}


def save(state, folder):
    del folder
    return flax.serialization.to_bytes(state)


def restore(like, saved):
    restored = flax.serialization.from_bytes(like, saved)
    return jax.device_put(restored, shardings)
