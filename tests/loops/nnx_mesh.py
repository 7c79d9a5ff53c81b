"""NNX on a mesh with explicit axes: split state in, split state out, as MaxText has it.

The statistics are changed in place by the forward pass.
"""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og  # guarded
from tests.strategies import in_force

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
adamw = optax.adamw(0.05)
tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)  # theirs
tx = og.guard(adamw, clip=1.0)  # guarded


class Model(nnx.Module):
    def __init__(self):
        first, last = np.split(np.random.default_rng(0).normal(size=16) / 2, [12])
        self.first = nnx.Param(placed(first.reshape(3, 4), None, "model"))
        self.last = nnx.Param(placed(last, "model"))
        self.mean = nnx.BatchStat(placed(np.zeros(4), "model"))

    def __call__(self, x):
        x = jnp.tanh(x @ self.first[...])
        mean = jnp.mean(x, axis=0)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        return jnp.einsum("bi,i->b", x - mean, self.last[...], out_sharding=P("data"))


def placed(x, *axes):
    return jax.device_put(np.float32(x), NamedSharding(mesh, P(*axes)))


def both():
    model = Model()
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def create():
    with in_force(mesh):
        return nnx.state(both())


def step(state, batch):
    with in_force(mesh):
        return jitted(state, batch)


@jax.jit
def jitted(state, batch):
    model, optimizer = nnx.merge(nnx.graphdef(both()), state)
    old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))  # guarded

    def loss_fn(model):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    new = nnx.state(model, nnx.BatchStat)  # guarded
    nnx.update(model, og.keep_if_skipped(optimizer.opt_state, new, old))  # guarded
    return nnx.state((model, optimizer)), {"loss": loss}


def batch(i, fault):
    x = np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32)
    y = x.sum(axis=1) * np.float32(fault)
    x[0] *= fault
    return {"x": placed(x, "data"), "y": placed(y, "data")}


def params(state):
    return nnx.filter_state(state, nnx.Param)


def kept(state):
    return nnx.filter_state(state, nnx.Param), nnx.filter_state(state, nnx.BatchStat)


def num_bad(state):
    return og.metrics(nnx.merge(nnx.graphdef(both()), state)[1])["num_skipped"]


def reads(state):
    _, optimizer = nnx.merge(nnx.graphdef(both()), state)
    return {"step": optimizer.step[...] * 1.0}


def save(state, folder):
    del folder
    return pickle.dumps(jax.device_get(jax.tree.leaves(state)))


def restore(like, saved):
    leaves, structure = jax.tree.flatten(like)
    pairs = zip(pickle.loads(saved), leaves, strict=True)
    return structure.unflatten([jax.device_put(x, old.sharding) for x, old in pairs])
