"""Six tasks, tiny, of which thousands of runs share a program."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _models, _text_run

HIDDEN = 16
BATCH = 8


class Task(NamedTuple):
    """What is trained.

    Attributes:
      init: From a key to parameters.
      grads: Of data, parameters and int32[BATCH] places in the data: loss, gradients.
      score: Held-out loss of data and parameters.
      data: A tree of arrays.
      num_places: Places are below it.
      trivial: The score of who has learned nothing but how frequent classes are.
      layer_axis: Whether a leaf, by its path, is a stack of layers: 0 or None.
    """

    init: Callable[[jax.Array], Any]
    grads: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    score: Callable[[Any, Any], jax.Array]
    data: Any
    num_places: int
    trivial: float
    layer_axis: Callable[[str], int | None] = lambda path: None


def _supervised(model: _models.Model) -> Task:
    def grads(data: Any, params: Any, places: jax.Array) -> tuple[jax.Array, Any]:
        batch = model.batch(data[0], places)
        return jax.value_and_grad(model.loss_of)(params, batch)

    return Task(
        init=model.init,
        grads=grads,
        score=lambda data, params: model.loss_of(params, data[1]),
        data=(model.data, model.held_out),
        num_places=model.num_places,
        trivial=model.trivial,
        layer_axis=model.layer_axis,
    )


def _text(kind: str) -> Task:
    settings = _text_run.Settings(
        width=HIDDEN, embedding=HIDDEN, window=16, held_out=16
    )
    return _supervised(_models.text_model(kind, settings))


def _convolutional() -> Task:
    """Two layers of 3 x 3, 8 and 16 channels, ReLU, no normalisation.

    Patches and matrices: with parameters of its own for each run a convolution is
    slow on a GPU.
    """
    model = _models.perceptron(2, HIDDEN)  # For its digits.
    sizes = {"first": (9, 8), "second": (9 * 8, 16), "last": (16 * 16, 10)}

    def init(key: jax.Array) -> Any:
        params = _models.normal(key, sizes)
        kernels = {name: math.sqrt(2) * x for name, x in params.items()}
        return kernels | {f"{n}_bias": jnp.zeros(size[1]) for n, size in sizes.items()}

    def patches(x: jax.Array, stride: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [
            x[:, i : i + 8 : stride, j : j + 8 : stride]
            for i in range(3)
            for j in range(3)
        ]
        return jnp.concatenate(parts, axis=-1)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        x = patches(batch[0].reshape(-1, 8, 8, 1), 1)
        x = jax.nn.relu(x @ params["first"] + params["first_bias"])
        x = jax.nn.relu(patches(x, 2) @ params["second"] + params["second_bias"])
        logits = x.reshape(len(x), -1) @ params["last"] + params["last_bias"]
        return _models.cross_entropy(logits, batch[1]).mean()

    # All of them for all runs would not fit.
    held_out = jax.tree.map(lambda x: x[:256], model.held_out)
    return _supervised(model._replace(init=init, loss_of=loss_of, held_out=held_out))


# A pole on a cart ---------------------------------------------------------------------

HORIZON = 100
EPISODES = 32  # Of an evaluation.


def _move(state: jax.Array, force: jax.Array) -> jax.Array:
    """A step of 0.02 s of the cart and pole of Barto, Sutton and Anderson (1983)."""
    _, speed, angle, spin = jnp.moveaxis(state, -1, 0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pushed = (force + 0.05 * spin**2 * sine) / 1.1
    torque = (9.8 * sine - cosine * pushed) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    pull = pushed - 0.05 * torque * cosine / 1.1
    change = jnp.stack([speed, pull, spin, torque], axis=-1)
    return state + 0.02 * change


def _is_up(state: jax.Array) -> jax.Array:
    return (abs(state[..., 0]) < 2.4) & (abs(state[..., 2]) < 12 * math.pi / 180)


def _mean_and_log_std(params: Any, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(states @ params["first"] + params["first_bias"])
    return (hidden @ params["last"])[..., 0], params["log_std"]


def play(params: Any, key: jax.Array, episodes: int) -> tuple[Any, Any, Any, Any]:
    """Episodes: states, actions, whether the pole was up before, and rewards.

    Rewards are 1 where the cart is in the middle and 0 at both ends, and when the pole
    is down.
    """
    first, second = jax.random.split(key)
    start = jax.random.uniform(first, (episodes, 4), minval=-0.15, maxval=0.15)
    draws = jax.random.normal(second, (HORIZON, episodes))

    def step(carry: Any, draw: jax.Array) -> Any:
        state, is_up = carry
        mean, log_std = _mean_and_log_std(params, state)
        action = mean + jnp.exp(log_std) * draw
        new = _move(state, 10 * jnp.clip(action, -1.0, 1.0))
        new = jnp.where(is_up[:, None], new, state)
        is_still_up = is_up & _is_up(new)
        reward = jnp.where(is_still_up, 1 - (new[:, 0] / 2.4) ** 2, 0.0)
        return (new, is_still_up), (state, action, is_up, reward)

    up = jnp.ones(episodes, bool)
    return jax.lax.scan(step, (start, up), draws)[1]


def _policy() -> Task:
    """REINFORCE of a Gaussian with the batch's mean as baseline, for each time.

    Its gradients grow as its deviation falls. Returns are a tenth of sums of rewards.
    """
    sizes = {"first": (4, 32), "last": (32, 1)}

    def init(key: jax.Array) -> Any:
        params = _models.normal(key, sizes)
        return params | {"first_bias": jnp.zeros(32), "log_std": jnp.zeros(())}

    def grads(data: Any, params: Any, places: jax.Array) -> tuple[jax.Array, Any]:
        del data
        key = jax.random.key(places[0])
        states, actions, is_up, rewards = play(params, key, BATCH)
        weights = is_up.astype(jnp.float32)
        to_go = jnp.flip(jnp.cumsum(jnp.flip(rewards, 0), 0), 0) / 10
        baseline = jnp.sum(to_go * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
        advantage = (to_go - baseline[:, None]) * weights

        def surrogate(params: Any) -> jax.Array:
            mean, log_std = _mean_and_log_std(params, states)
            off = (actions - mean) * jnp.exp(-log_std)
            return jnp.sum((off**2 / 2 + log_std) * advantage) / jnp.sum(weights)

        # OLMo's and MaxText's rules watch how bad the episodes were.
        return 1 - rewards.mean(), jax.grad(surrogate)(params)

    def score(data: Any, params: Any) -> jax.Array:
        rewards = play(params, jax.random.key(data), EPISODES)[3]
        leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
        return jnp.where(jnp.stack(leaves).all(), 1 - rewards.mean(), jnp.inf)

    return Task(
        init=init,
        grads=grads,
        score=score,
        data=jnp.asarray(2**30, jnp.int32),
        num_places=2**30,
        trivial=0.78,
    )


TASKS = {
    "RNN": functools.partial(_text, "rnn"),
    "perceptron": lambda: _supervised(_models.perceptron(12, HIDDEN)),
    "convolutional": _convolutional,
    "LSTM": functools.partial(_text, "lstm"),
    "transformer": functools.partial(_text, "transformer"),
    "policy": _policy,
    "deep transformer": functools.partial(_text, "deep transformer"),
}
PARTS = {
    "A": ("RNN", "perceptron", "convolutional"),
    "B": ("LSTM", "transformer", "policy"),
    "C": ("deep transformer",),  # Of the second round only.
}
