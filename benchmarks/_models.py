"""Small models for studies of many runs, which differ in numbers and share a program.

`text_model` makes three that predict the next character of Python's documentation,
`perceptron` one that reads handwritten digits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _text_run
from benchmarks._digits import load_digits
from optax_guard._cli.demo_text import load_text

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Model(NamedTuple):
    """What is trained, on what, and what a loss is to be compared with."""

    init: Callable[[jax.Array], Any]  # From a key to parameters.
    loss_of: Callable[[Any, Any], jax.Array]  # Of parameters and a batch.
    batch: Callable[[Any, jax.Array], Any]  # Of data and places in it.
    num_places: int
    data: Any
    held_out: Any  # A batch of its own.
    trivial: (
        float  # Held-out loss of who knows no more than how frequent each class is.
    )
    layer_axis: Callable[[str], int | None]  # Of a leaf: where stacked layers lie.


def text_model(kind: str, settings: _text_run.Settings) -> Model:
    """A model of characters: `"rnn"`, `"lstm"`, `"[deep ]transformer"`."""
    text = load_text()
    held_out = _text_run.held_out_windows(text.validation, settings)
    size = len(text.characters)
    counts = np.bincount(text.train, minlength=size)
    # Each once more, for those that only the held-out part has.
    surprise = -np.log((counts + 1) / np.sum(counts + 1))
    kinds = {
        "rnn": _rnn,
        "lstm": _lstm,
        "transformer": _transformer,
        "deep transformer": functools.partial(_transformer, depth=12),
    }
    init, loss_of = kinds[kind](settings, size)
    return Model(
        init=init,
        loss_of=loss_of,
        batch=functools.partial(_text_run.windows, settings=settings),
        num_places=len(text.train) - settings.window,
        data=jnp.asarray(text.train),
        held_out=jnp.asarray(held_out),
        trivial=float(surprise[held_out[:, 1:]].mean()),
        layer_axis=lambda path: 0 if path.startswith("blocks") else None,
    )


def perceptron(depth: int, width: int) -> Model:
    """`depth` hidden layers of tanh, those after the first stacked, on 8 x 8 digits."""
    images, labels = load_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    shares = np.bincount(labels[:1280]) / 1280

    def init(key: jax.Array) -> Any:
        params = normal(
            key,
            {"first": (64, width), "last": (width, 10)}
            | {"blocks": (depth - 1, width, width)},
        )
        biases = {
            "first_bias": width,
            "last_bias": 10,
            "blocks_bias": (depth - 1, width),
        }
        return params | {name: jnp.zeros(shape) for name, shape in biases.items()}

    def loss_of(params: Any, batch: Any) -> jax.Array:
        def layer(hidden: jax.Array, weights: Any) -> tuple[jax.Array, None]:
            kernel, bias = weights
            return jnp.tanh(hidden @ kernel + bias), None

        hidden = jnp.tanh(batch[0] @ params["first"] + params["first_bias"])
        stacked = params["blocks"], params["blocks_bias"]
        hidden, _ = jax.lax.scan(layer, hidden, stacked)
        logits = hidden @ params["last"] + params["last_bias"]
        return cross_entropy(logits, batch[1]).mean()

    return Model(
        init=init,
        loss_of=loss_of,
        batch=lambda data, rows: jax.tree.map(lambda x: x[rows], data),
        num_places=1280,
        data=(jnp.asarray(images[:1280]), jnp.asarray(labels[:1280])),
        held_out=(jnp.asarray(images[1280:]), jnp.asarray(labels[1280:])),
        trivial=float(-np.log(shares)[labels[1280:]].mean()),
        layer_axis=lambda path: 0 if path.startswith("blocks") else None,
    )


def normal(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Matrices, or stacks of them, that keep the variance of what they multiply."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / math.sqrt(shape[-2])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _lstm(settings: _text_run.Settings, vocabulary: int) -> Any:
    """The one of the study of bad batches."""
    del vocabulary
    return (
        lambda key: _text_run.init_params(key, settings),
        lambda params, text: _text_run.loss_of(params, text, 1.0, False),
    )


def _rnn(settings: _text_run.Settings, vocabulary: int) -> Any:
    """A layer of tanh with nothing beside it, so that gradients go through time."""
    width, embedding = settings.width, settings.embedding

    def init(key: jax.Array) -> Any:
        params = normal(
            key,
            {"embed": (vocabulary, embedding), "head": (width, vocabulary)}
            | {"enter": (embedding, width), "recur": (width, width)},
        )
        params["embed"] *= math.sqrt(vocabulary)
        return params | {"bias": jnp.zeros(width), "head_bias": jnp.zeros(vocabulary)}

    def loss_of(params: Any, text: jax.Array) -> jax.Array:
        entering = params["embed"][text[:, :-1]] @ params["enter"] + params["bias"]

        def step(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden = jnp.tanh(hidden @ params["recur"] + x)
            return hidden, hidden

        start = jnp.zeros((len(text), width))
        _, hidden = jax.lax.scan(step, start, entering.swapaxes(0, 1))
        logits = hidden.swapaxes(0, 1) @ params["head"] + params["head_bias"]
        return cross_entropy(logits, text[:, 1:]).mean()

    return init, loss_of


def _transformer(settings: _text_run.Settings, vocabulary: int, depth: int = 2) -> Any:
    """Blocks of two heads, normalised before each; norms have no parameters."""
    width, heads = settings.width, 2

    def init(key: jax.Array) -> Any:
        blocks, rest = jax.random.split(key)
        params: dict[str, Any] = normal(
            rest,
            {"embed": (vocabulary, width), "positions": (settings.window, width)}
            | {"head": (width, vocabulary)},
        )
        params["embed"] *= math.sqrt(vocabulary)
        params["positions"] *= math.sqrt(settings.window)
        params["blocks"] = normal(
            blocks,
            {"attend": (depth, width, 3 * width), "leave": (depth, width, width)}
            | {"up": (depth, width, 2 * width), "down": (depth, 2 * width, width)},
        )
        return params

    def block(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        attended = jax.nn.standardize(x) @ weights["attend"]
        by_head = attended.reshape(*x.shape[:-1], 3 * heads, width // heads)
        query, key, value = jnp.split(by_head, 3, axis=-2)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += mixed.reshape(x.shape) @ weights["leave"]
        x += jax.nn.gelu(jax.nn.standardize(x) @ weights["up"]) @ weights["down"]
        return x, None

    def loss_of(params: Any, text: jax.Array) -> jax.Array:
        x = params["embed"][text[:, :-1]] + params["positions"]
        x, _ = jax.lax.scan(block, x, params["blocks"])
        logits = jax.nn.standardize(x) @ params["head"]
        return cross_entropy(logits, text[:, 1:]).mean()

    return init, loss_of
