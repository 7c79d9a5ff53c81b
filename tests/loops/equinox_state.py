"""Equinox with a state, injected hyperparameters and the loss, as levanter trains."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og  # guarded


@optax.inject_hyperparams
def optimizer(learning_rate):
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, optax.adamw(learning_rate))


schedule = optax.linear_schedule(0.05, 0.01, 10)
tx = optimizer(schedule)
tx = og.guard(tx)  # guarded


class Model(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="ema")
        self.last = eqx.nn.Linear(4, 1, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jnp.tanh(x))[0], state


def trainable(model):
    return eqx.filter(model, eqx.is_inexact_array)


def create():
    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    return model, state, tx.init(trainable(model))


@eqx.filter_jit
def step(everything, batch):
    model, state, opt_state = everything

    @eqx.filter_value_and_grad(has_aux=True)
    def grad_fn(model):
        forward = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        out, new_state = forward(batch["x"], state)
        return jnp.mean((out - batch["y"]) ** 2), new_state

    (loss, new_state), grads = grad_fn(model)
    updates, opt_state = tx.update(grads, opt_state, trainable(model), loss=loss)
    new_state = og.keep_if_skipped(opt_state, new_state, state)  # guarded
    return (eqx.apply_updates(model, updates), new_state, opt_state), {"loss": loss}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    y = x.sum(axis=1)
    x[0] *= fault
    return {"x": x, "y": y}


def params(everything):
    return trainable(everything[0])


def kept(everything):
    return trainable(everything[0]), eqx.filter(everything[1], eqx.is_inexact_array)


def num_bad(everything):
    return everything[2].num_skipped


def reads(everything):
    hyperparams = everything[2].hyperparams
    return {"learning_rate": hyperparams["learning_rate"]}


def save(everything, folder):
    del folder
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, everything)
    return file.getvalue()


def restore(like, saved):
    return eqx.tree_deserialise_leaves(io.BytesIO(saved), like)
