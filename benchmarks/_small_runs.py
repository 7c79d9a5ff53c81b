"""Two small tasks, on which a run can learn too much: digits, and a short text."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._digits import load_digits
from optax_guard._cli.demo_text import load_text

CONTEXT, EMBEDDING, HIDDEN = 6, 12, 64
NUM_DIGITS = 10


class Data(NamedTuple):
    """Examples: inputs [examples, ...] and classes, int32[examples]."""

    inputs: Any
    targets: Any


class Task(NamedTuple):
    """A model, its data and how it is trained.

    Attributes:
      init: Parameters of a key.
      logits: Logits [examples, classes] of parameters, inputs, and a factor of what the
        first layer sees.
      split: The parts ``train``, ``val`` and ``test`` of a seed.
      learning_rate: That of Adam.
      batch_size: Examples, drawn anew for each step.
      eval_every: Steps between evaluations.
    """

    init: Callable[[jax.Array], Any]
    logits: Callable[[Any, Any, Any], jax.Array]
    split: Callable[[int], dict[str, Data]]
    learning_rate: float
    batch_size: int
    eval_every: int


def init_layers(key: jax.Array, sizes: list[int], scale: float = 1.0) -> Any:
    """Layers of a perceptron; a scale of 1 is that of He et al., for ReLU."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(k, (n, m)) * scale * math.sqrt(2 / n),
            "bias": jnp.zeros(m),
        }
        for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]


def apply_layers(layers: Any, x: jax.Array, activation: Any = jax.nn.relu) -> jax.Array:
    for layer in layers[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def loss_of(task: Task, params: Any, data: Data, factor: Any = 1.0) -> jax.Array:
    logits = task.logits(params, data.inputs, factor)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.targets)
    return losses.mean()


def wrong_share(task: Task, params: Any, data: Data) -> jax.Array:
    guesses = task.logits(params, data.inputs, 1.0).argmax(-1)
    return jnp.mean(guesses != data.targets)


def batch_of(data: Data, key: jax.Array, step: Any, size: int) -> Data:
    """The batch of a step: always the same one for the same key."""
    rows = jax.random.randint(
        jax.random.fold_in(key, step), (size,), 0, len(data.targets)
    )
    return Data(data.inputs[rows], data.targets[rows])


def digits(num_train: int = 640, label_noise: float = 0.3) -> Task:
    """Images of digits; a share of the labels, but for testing, is drawn at random."""
    found: Any = load_digits()
    images, labels = (found.data / 16).astype(np.float32), found.target.astype(np.int32)

    def split(seed: int) -> dict[str, Data]:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        val, train, test = np.split(order, [320, 320 + num_train])
        noisy = np.where(
            rng.random(len(labels)) < label_noise,
            rng.integers(0, NUM_DIGITS, len(labels)),
            labels,
        ).astype(np.int32)
        return {
            "train": Data(images[train], noisy[train]),
            "val": Data(images[val], noisy[val]),
            "test": Data(images[test], labels[test]),
        }

    def init(key: jax.Array) -> Any:
        return init_layers(key, [images.shape[1], HIDDEN, HIDDEN, NUM_DIGITS])

    def logits(params: Any, inputs: Any, factor: Any) -> jax.Array:
        return apply_layers(params, inputs * factor)

    return Task(init, logits, split, 1e-3, 32, 20)


def characters(num_train: int = 16_000) -> Task:
    """The next character of Python's documentation from the last `CONTEXT` ones.

    Trained on an excerpt; validation and test are windows, drawn without replacement,
    of the last tenth of the text.
    """
    text = load_text()

    def windows(part: np.ndarray, starts: np.ndarray) -> Data:
        found = part[starts[:, None] + np.arange(CONTEXT + 1)]
        return Data(found[:, :-1], found[:, -1])

    def split(seed: int) -> dict[str, Data]:
        rng = np.random.default_rng(seed)
        start = rng.integers(0, len(text.train) - num_train - CONTEXT, endpoint=True)
        held_out = rng.permutation(len(text.validation) - CONTEXT)
        return {
            "train": windows(text.train, start + np.arange(num_train)),
            "val": windows(text.validation, held_out[:500]),
            "test": windows(text.validation, held_out[500:4_500]),
        }

    vocabulary = len(text.characters)

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        embed = jax.random.normal(first, (vocabulary, EMBEDDING))
        sizes = [CONTEXT * EMBEDDING, 2 * HIDDEN, vocabulary]
        return {"embed": embed, "layers": init_layers(second, sizes)}

    def logits(params: Any, inputs: Any, factor: Any) -> jax.Array:
        embedded = params["embed"][inputs] * factor
        return apply_layers(params["layers"], embedded.reshape(len(inputs), -1))

    return Task(init, logits, split, 2e-3, 64, 50)
