"""Linen with Flax' own `TrainState`, as nanodo and Flax' examples train."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import optax_guard as og  # guarded

model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(1)])
schedule = optax.cosine_decay_schedule(0.05, 100)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))  # theirs
tx = og.guard(optax.adamw(schedule), clip=1.0)  # guarded


def create():
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 3)))["params"]
    apply = model.apply
    state = train_state.TrainState.create(apply_fn=apply, params=params, tx=tx)
    return state.replace(step=jnp.int32(0))  # One type for all steps.


@jax.jit
def step(state, batch):
    def loss_fn(params):
        out = state.apply_fn({"params": params}, batch["x"])
        return jnp.mean((out[:, 0] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads)
    log = {"loss": loss, "learning_rate": schedule(state.step)}
    log |= og.metrics(state)  # guarded
    return state, log


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    return {"x": x * np.float32(fault), "y": x.sum(axis=1)}


def params(state):
    return state.params


kept = params


def num_bad(state):
    return state.opt_state.num_skipped


def reads(state):
    return {"step": float(state.step), "moments": optax.tree.get(state, "mu")}


def save(state, folder):
    del folder
    return flax.serialization.to_bytes(state)


def restore(like, saved):
    return flax.serialization.from_bytes(like, saved)
