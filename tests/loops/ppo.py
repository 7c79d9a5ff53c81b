"""PPO in the style of purejaxrl: environment, rollouts and updates in one `scan`.

The whole is vmapped over seeds.
"""

import functools
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import optax_guard as og  # guarded

NUM_SEEDS, NUM_UPDATES, NUM_ENVS, NUM_STEPS = 2, 2, 4, 5
GAMMA, LAMBDA, EPS = 0.9, 0.95, 0.2
adam = optax.adam(0.02, eps=1e-5)
tx = optax.chain(optax.clip_by_global_norm(0.5), adam)  # theirs
tx = og.guard(adam, clip=0.5)  # guarded


class Runner(NamedTuple):
    train_state: TrainState
    position: Any
    key: Any


class Transition(NamedTuple):
    obs: Any
    action: Any
    value: Any
    log_prob: Any
    reward: Any


def network(params, obs):
    hidden = jnp.tanh(obs @ params["hidden"])
    return jax.nn.log_softmax(hidden @ params["actor"]), hidden @ params["critic"]


@jax.jit
@jax.vmap
def start(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"hidden": (2, 8), "actor": (8, 2), "critic": (8,)}
    params = {
        name: 0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    train_state = TrainState.create(apply_fn=network, params=params, tx=tx)
    train_state = train_state.replace(step=jnp.int32(0))  # One type for all steps.
    return Runner(train_state, jnp.zeros(NUM_ENVS), jax.random.key_data(keys[3]))


def create():
    return start(jnp.arange(NUM_SEEDS))


def env_step(position, action, key):
    """A walk on a line: the nearer to 1, the more reward."""
    noise = 0.1 * jax.random.normal(key, position.shape)
    position = jnp.clip(position + 0.4 * action - 0.2 + noise, -2.0, 2.0)
    return position, -((position - 1.0) ** 2)


def observe(position):
    return jnp.stack([position, jnp.ones_like(position)], axis=-1)


def rollout(params, runner, fault):
    def one(carry, key):
        position, obs = carry, observe(carry)
        log_probs, value = network(params, obs)
        act_key, env_key = jax.random.split(key)
        action = jax.random.categorical(act_key, log_probs)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], 1)[:, 0]
        position, reward = env_step(position, action, env_key)
        return position, Transition(obs, action, value, log_prob, reward * fault)

    key, *keys = jax.random.split(jax.random.wrap_key_data(runner.key), NUM_STEPS + 1)
    position, batch = jax.lax.scan(one, runner.position, jnp.stack(keys))
    return runner._replace(position=position, key=jax.random.key_data(key)), batch


def advantages(batch, last_value):
    def one(carry, step):
        advantage, next_value = carry
        delta = step.reward + GAMMA * next_value - step.value
        advantage = delta + GAMMA * LAMBDA * advantage
        return (advantage, step.value), advantage

    first = jnp.zeros_like(last_value), last_value
    return jax.lax.scan(one, first, batch, reverse=True)[1]


def loss_fn(params, batch, advantage, target):
    log_probs, value = network(params, batch.obs)
    log_prob = jnp.take_along_axis(log_probs, batch.action[..., None], -1)[..., 0]
    ratio = jnp.exp(log_prob - batch.log_prob)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    bounded = jnp.clip(ratio, 1 - EPS, 1 + EPS)
    actor = -jnp.minimum(ratio * advantage, bounded * advantage).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    return actor + 0.5 * ((value - target) ** 2).mean() - 0.01 * entropy


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def step(runner, fault):
    def update(runner, _):
        runner, batch = rollout(runner.train_state.params, runner, fault)
        last_value = network(runner.train_state.params, observe(runner.position))[1]
        advantage = advantages(batch, last_value)

        def epoch(train_state, _):
            loss, grads = jax.value_and_grad(loss_fn)(
                train_state.params, batch, advantage, advantage + batch.value
            )
            return train_state.apply_gradients(grads=grads), loss

        train_state, losses = jax.lax.scan(epoch, runner.train_state, length=2)
        return runner._replace(train_state=train_state), losses

    return jax.lax.scan(update, runner, length=NUM_UPDATES)


def batch(i, fault):
    del i
    return np.float32(fault)


def params(runner):
    return runner.train_state.params


kept = params


def num_bad(runner):
    return runner.train_state.opt_state.num_skipped


def reads(runner):
    return {"step": runner.train_state.step * 1.0, "position": runner.position}


def save(runner, folder):
    del folder
    return pickle.dumps(jax.device_get(jax.tree.leaves(runner)))


def restore(like, saved):
    leaves = map(jnp.asarray, pickle.loads(saved))
    return jax.tree.structure(like).unflatten(leaves)
