"""An optimizer from a configuration, with an average of the parameters in its chain.

As kauldron configures: the loop finds states by their names, not by their places.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_guard as og  # guarded


class EmaParamsState(NamedTuple):
    ema_params: Any


def ema_params(decay):
    def init(params):
        return EmaParamsState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        assert params is not None
        new = optax.apply_updates(params, updates)
        ema = optax.incremental_update(new, state.ema_params, 1 - decay)
        return updates, EmaParamsState(ema)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 0.05
    max_norm: float = 1.0
    ema_decay: float = 0.9

    def optimizer(self):
        parts = {
            "adam": optax.scale_by_adam(),
            "learning_rate": optax.scale_by_learning_rate(self.learning_rate),
            "ema": ema_params(self.ema_decay),
        }
        parts = {"clip": optax.clip_by_global_norm(self.max_norm), **parts}  # theirs
        tx = optax.named_chain(*parts.items())
        tx = og.guard(tx, clip=self.max_norm)  # guarded
        return tx


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


tx = Config().optimizer()


def create():
    params = {"w": jnp.linspace(-1.0, 1.0, 3), "b": jnp.zeros(())}
    return State(jnp.zeros((), jnp.int32), params, tx.init(params))


@jax.jit
def step(state, batch):
    def loss_fn(params):
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    ema = optax.tree.get(opt_state, "ema_params")
    return state, {"loss": loss, "ema_loss": loss_fn(ema)}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) * np.float32(fault)}


def params(state):
    return state.params


def kept(state):
    return state.params, optax.tree.get(state, "ema_params")


def num_bad(state):
    return state.opt_state.num_skipped


def reads(state):
    count = optax.tree.get(state.opt_state, "count")
    return {"ema": optax.tree.get(state.opt_state, "ema_params"), "count": count * 1.0}


def save(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "3", state)
    return folder / "3"


def restore(like, saved):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(saved, like)
