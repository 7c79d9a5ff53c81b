"""Models on which no rule of the diagnosis was made: their runs are held out.

A convolutional net, a network that is trained on and writes its losses with 4 decimals,
and a policy that learns from groups of samples, as GRPO does.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._small_runs import (
    NUM_DIGITS,
    Data,
    Task,
    batch_of,
    digits,
    loss_of,
)

CHANNELS = 16
GROUP = 4


def convolution() -> Task:
    """Digits through two convolutions of 3 x 3 and a mean over the pixels."""
    task = digits(1200, label_noise=0.0)

    def init(key: jax.Array) -> Any:
        first, second, last = jax.random.split(key, 3)
        return {
            "first": jax.random.normal(first, (9, CHANNELS)) * math.sqrt(2 / 9),
            "first_bias": jnp.zeros(CHANNELS),
            "second": jax.random.normal(second, (9 * CHANNELS, CHANNELS))
            * math.sqrt(2 / (9 * CHANNELS)),
            "second_bias": jnp.zeros(CHANNELS),
            "last": jax.random.normal(last, (CHANNELS, NUM_DIGITS))
            / math.sqrt(CHANNELS),
            "last_bias": jnp.zeros(NUM_DIGITS),
        }

    def logits(params: Any, inputs: Any, factor: Any) -> jax.Array:
        x = (inputs * factor).reshape(-1, 8, 8, 1)
        for name in ("first", "second"):
            x = jax.nn.relu(_patches(x) @ params[name] + params[f"{name}_bias"])
        return x.mean((1, 2)) @ params["last"] + params["last_bias"]

    return task._replace(init=init, logits=logits)


def _patches(x: jax.Array) -> jax.Array:
    """The 3 x 3 pixels around each but those of the border, in the last axis."""
    size = x.shape[1] - 2
    parts = [x[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1)


def fine_tuning() -> Task:
    """Digits by parameters that have seen a quarter of them before."""
    pretrained = _pretrained()  # Here, because `init` is traced.
    return digits(1200, label_noise=0.0)._replace(
        init=lambda key: jax.tree.map(jnp.asarray, pretrained)
    )


@functools.cache
def _pretrained() -> Any:
    task = digits(300, label_noise=0.0)
    data = jax.tree.map(jnp.asarray, task.split(7)["train"])
    tx = optax.adam(1e-3)

    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry
        batch = batch_of(data, jax.random.key(7), i, 32)
        grads = jax.grad(lambda p: loss_of(task, p, batch))(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run() -> Any:
        params = task.init(jax.random.key(7))
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(250))[0][0]

    return jax.tree.map(np.asarray, run())


class Prompts(NamedTuple):
    """Images, their digits, and noise [images, `GROUP`, 10] that draws the guesses."""

    images: Any
    targets: Any
    noise: Any


class Policy(NamedTuple):
    """A policy, its data, and the two numbers of a step that are of interest."""

    init: Any
    loss: Any
    failures: Any
    data: dict[str, Any]
    draw: Any


def policy() -> Policy:
    """Guesses digits. A right guess is rewarded, and judged against others of a group.

    The loss is 0 by construction. A group of equal rewards has a gradient of exactly 0.
    """
    task = digits(1200, label_noise=0.0)
    parts = task.split(0)

    def draw(data: Data, key: jax.Array, step: Any, size: int) -> Prompts:
        batch = batch_of(data, key, step, size)
        noisy = jax.random.fold_in(jax.random.fold_in(key, step), 1)
        noise = jax.random.gumbel(noisy, (size, GROUP, NUM_DIGITS))
        return Prompts(batch.inputs, batch.targets, noise)

    def loss(params: Any, batch: Prompts, factor: Any, is_shuffled: Any) -> jax.Array:
        targets = jnp.where(is_shuffled, jnp.roll(batch.targets, 1), batch.targets)
        logits = task.logits(params, batch.images, factor)[:, None]
        guesses = jax.lax.stop_gradient(logits + batch.noise).argmax(-1)
        rewards = jnp.where(guesses == targets[:, None], 1.0, 0.0)
        spread = rewards.std(1, keepdims=True) + 1e-4
        advantages = (rewards - rewards.mean(1, keepdims=True)) / spread
        logs = jax.nn.log_softmax(logits)
        logs = jnp.take_along_axis(logs, guesses[..., None], axis=-1)[..., 0]
        return -jnp.mean(advantages * jnp.exp(logs - jax.lax.stop_gradient(logs)))

    def failures(params: Any, data: Data) -> jax.Array:
        chances = jax.nn.softmax(task.logits(params, data.inputs, 1.0))
        right = jnp.take_along_axis(chances, data.targets[:, None], axis=-1)
        return 1 - right.mean()

    return Policy(task.init, loss, failures, parts, draw)
