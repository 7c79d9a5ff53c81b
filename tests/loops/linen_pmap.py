"""Linen with batch norm, an average of the parameters and a loss scale, under `pmap`.

As Flax' ImageNet example trains, on two devices. Its own choice between the states
before and after a step would undo the guard's records, so that line goes.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

import optax_guard as og  # guarded

NUM_DEVICES = 2
sgd = optax.sgd(0.05, momentum=0.9)
tx = optax.chain(optax.clip_by_global_norm(1.0), sgd)  # theirs
tx = og.guard(sgd, clip=1.0)  # guarded


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.tanh(x))[:, 0]


class TrainState(train_state.TrainState):
    batch_stats: Any
    ema: Any
    dynamic_scale: DynamicScale


model = Model()


def create():
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 3)))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        ema=variables["params"],
        dynamic_scale=DynamicScale(scale=jnp.float32(1024.0)),
    )
    return replicated(state.replace(step=np.int32(0)))


def replicated(state):
    return jax.tree.map(lambda x: np.stack([np.asarray(x)] * NUM_DEVICES), state)


def unreplicated(state):
    return jax.tree.map(lambda x: np.asarray(x)[0], state)


@functools.partial(jax.pmap, axis_name="batch", devices=jax.devices()[:NUM_DEVICES])
def step(state, batch):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, new = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean((out - batch["y"]) ** 2), new["batch_stats"]

    grad_fn = state.dynamic_scale.value_and_grad(
        loss_fn, has_aux=True, axis_name="batch"
    )
    dynamic_scale, is_finite, (loss, stats), grads = grad_fn(state.params)
    stats = jax.lax.pmean(stats, "batch")
    new = state.apply_gradients(grads=grads)
    new = optax.tree.where(is_finite, new, state)  # theirs
    ema = optax.incremental_update(new.params, state.ema, 0.1)
    old = state.batch_stats, state.ema  # guarded
    stats, ema = og.keep_if_skipped(new.opt_state, (stats, ema), old)  # guarded
    new = new.replace(batch_stats=stats, ema=ema, dynamic_scale=dynamic_scale)
    return new, {"loss": loss}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(NUM_DEVICES, 8, 3)).astype(np.float32)
    y = x.sum(axis=-1) * np.array([[1.0], [fault]], np.float32)
    x[1] *= fault  # What one device sees.
    return {"x": x, "y": y}


def params(state):
    return state.params


def kept(state):
    return state.params, state.batch_stats, state.ema


def num_bad(state):
    return state.opt_state.num_skipped


def reads(state):
    # The scale falls on a bad step, as it did.
    return {"scale": state.dynamic_scale.scale, "ema": state.ema}


def save(state, folder):
    del folder
    return flax.serialization.to_bytes(unreplicated(state))


def restore(like, saved):
    return replicated(flax.serialization.from_bytes(unreplicated(like), saved))
