"""Stochastic variational inference, in the style of NumPyro.

An optimizer of NumPyro is three functions of one state, made from one of Optax.
"""

import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og  # guarded

tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(0.05))  # theirs
tx = og.guard(optax.adam(0.05), clip=10.0)  # guarded


class Optimizer(NamedTuple):
    init: Any
    update: Any
    get_params: Any


def optax_to_numpyro(transformation):
    def init(params):
        return jnp.array(0), (params, transformation.init(params))

    def update(grads, state):
        i, (params, opt_state) = state
        updates, opt_state = transformation.update(grads, opt_state, params)
        return i + 1, (optax.apply_updates(params, updates), opt_state)

    return Optimizer(init, update, lambda state: state[1][0])


class SVIState(NamedTuple):
    optim_state: Any
    rng_key: Any


optimizer = optax_to_numpyro(tx)


def create():
    first = {"auto_loc": jnp.zeros(3), "auto_log_scale": jnp.zeros(3) - 2}
    return SVIState(optimizer.init(first), jax.random.PRNGKey(0))


def negative_elbo(params, key, batch):
    noise = jax.random.normal(key, (3,))
    w = params["auto_loc"] + jnp.exp(params["auto_log_scale"]) * noise
    log_likelihood = -0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)
    return -log_likelihood + 0.01 * jnp.sum(w**2 / 2 - params["auto_log_scale"])


@jax.jit
def step(state, batch):
    rng_key, key = jax.random.split(state.rng_key)
    now = optimizer.get_params(state.optim_state)
    loss, grads = jax.value_and_grad(negative_elbo)(now, key, batch)
    return SVIState(optimizer.update(grads, state.optim_state), rng_key), loss


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) * np.float32(fault)}


def params(state):
    return optimizer.get_params(state.optim_state)


kept = params


def num_bad(state):
    return state.optim_state[1][1].num_skipped


def reads(state):
    return {"step": state.optim_state[0] * 1.0, "key": state.rng_key * 1.0}


def save(state, folder):
    del folder
    return pickle.dumps(jax.device_get(state.optim_state)), state.rng_key


def restore(like, saved):
    del like
    return SVIState(jax.tree.map(jnp.asarray, pickle.loads(saved[0])), saved[1])
