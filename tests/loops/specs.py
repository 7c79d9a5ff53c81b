"""Partition specs of the optimizer state by `map_params`, as axlearn shards it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og  # guarded

mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
SPECS = {"first": P(None, "model"), "bias": P("model"), "last": P("model")}
adamw = optax.adamw(0.02)
tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)  # theirs
tx = og.guard(adamw, clip=1.0)  # guarded


def first():
    keys = iter(jax.random.split(jax.random.key(0), 2))
    params = {
        "first": jax.random.normal(next(keys), (4, 8)) / 2,
        "bias": jnp.zeros(8),
        "last": jax.random.normal(next(keys), (8,)) / 2,
    }
    return {"params": params, "opt_state": tx.init(params)}


like = jax.eval_shape(first)
opt_specs = optax.tree_map_params(
    tx,
    lambda _, spec: spec,
    like["opt_state"],
    SPECS,
    transform_non_params=lambda _: P(),
)
shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), {"params": SPECS, "opt_state": opt_specs}
)
create = jax.jit(first, out_shardings=shardings)


@jax.jit
def step(state, batch):
    def loss_fn(params):
        hidden = jnp.tanh(batch["x"] @ params["first"] + params["bias"])
        return jnp.mean((hidden @ params["last"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {"params": params, "opt_state": opt_state}
    return jax.lax.with_sharding_constraint(state, shardings), {"loss": loss}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32)
    whole = {"x": x, "y": x.sum(axis=1) * np.float32(fault)}
    return jax.device_put(whole, NamedSharding(mesh, P("data")))


def params(state):
    return state["params"]


kept = params


def num_bad(state):
    return state["opt_state"].num_skipped


def reads(state):
    # The moments are split as their parameters are.
    moments = optax.tree.get(state, "mu")
    for name, spec in SPECS.items():
        assert moments[name].sharding.is_equivalent_to(
            NamedSharding(mesh, spec), moments[name].ndim
        )
    return {"count": optax.tree.get(state, "count") * 1.0, "moments": moments}


def save(state, folder):
    del folder
    return pickle.dumps(jax.device_get(state))


def restore(like, saved):
    del like
    return jax.device_put(pickle.loads(saved), shardings)
