"""Regular expressions label the leaves: some are frozen, as big_vision fine-tunes."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og  # guarded

FROZEN, DECAYED = "backbone/.*", ".*/kernel"


def mask_of(params, pattern, *, inverted=False):
    def leaf(path, x):
        del x
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return bool(re.fullmatch(pattern, name)) != inverted

    return jax.tree.map_with_path(leaf, params)


def first_params():
    keys = iter(jax.random.split(jax.random.key(0), 2))
    return {
        "backbone": {"kernel": jax.random.normal(next(keys), (3, 4)) / 2},
        "head": {"kernel": jax.random.normal(next(keys), (4,)), "bias": jnp.zeros(())},
    }


frozen = mask_of(first_params(), FROZEN)
trained = mask_of(first_params(), FROZEN, inverted=True)
schedule = optax.warmup_cosine_decay_schedule(0.01, 0.05, 2, 100)
freeze = optax.masked(optax.set_to_zero(), frozen)
clip = optax.clip_by_global_norm(1.0)
adam = optax.chain(
    optax.masked(optax.scale_by_adam(), trained),
    optax.add_decayed_weights(1e-3, mask_of(first_params(), DECAYED)),
    freeze,
    optax.scale_by_learning_rate(schedule),
)
tx = optax.chain(freeze, clip, adam)  # theirs
tx = og.guard(adam, clip=1.0, mask=trained)  # guarded


def create():
    params = first_params()
    return {"params": params, "opt": tx.init(params)}


@jax.jit
def step(state, batch):
    def loss_fn(params):
        hidden = jnp.tanh(batch["x"] @ params["backbone"]["kernel"])
        out = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        return jnp.mean((out - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt = tx.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt}, {"loss": loss}


def get_count(opt):
    """The step, from the state of the schedule, as big_vision finds it."""

    def is_schedule(x):
        return isinstance(x, optax.ScaleByScheduleState)

    leaves = jax.tree.leaves(opt, is_leaf=is_schedule)
    [count] = {int(x.count) for x in leaves if is_schedule(x)}
    return count


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1) * np.float32(fault)}


def params(state):
    return state["params"]


kept = params


def num_bad(state):
    return state["opt"].num_skipped


def reads(state):
    np.testing.assert_array_equal(
        state["params"]["backbone"]["kernel"], first_params()["backbone"]["kernel"]
    )
    return {"count": float(get_count(state["opt"]))}


def save(state, folder):
    del folder
    return pickle.dumps(jax.device_get(state))


def restore(like, saved):
    del like
    return jax.tree.map(jnp.asarray, pickle.loads(saved))
