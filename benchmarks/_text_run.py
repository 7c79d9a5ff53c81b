"""Half a training run of a character LSTM, with batches that can be corrupt."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard._cli.demo_text import load_text


class Settings(NamedTuple):
    """All numbers of the study; faults begin with the second half."""

    seeds: int = 5
    first_seed: int = 0
    half: int = 300
    eval_every: int = 4
    learning_rate: float = 1e-2
    batch_size: int = 8
    window: int = 32
    width: int = 48
    embedding: int = 24
    held_out: int = 32


class Batches(NamedTuple):
    """What is wrong with each batch: float32, float32, bool and bool, each [steps].

    A batch of another scale for good is no corrupt one.
    """

    loss_factor: np.ndarray
    input_factor: np.ndarray
    is_shuffled: np.ndarray
    is_corrupt: np.ndarray


def healthy(steps: int) -> Batches:
    ones, none = np.ones(steps, np.float32), np.zeros(steps, bool)
    return Batches(ones, ones.copy(), none, none.copy())


@functools.partial(jax.jit, static_argnums=1)
def init_params(key: jax.Array, settings: Settings) -> Any:
    vocabulary = len(load_text().characters)
    width, embedding = settings.width, settings.embedding
    shapes = {
        "embed": (vocabulary, embedding),
        "cell": (embedding + width, 4 * width),
        "head": (embedding + width, vocabulary),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(key, shape) / math.sqrt(shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["embed"] *= math.sqrt(vocabulary)
    # A forget gate that is open at first, as is usual.
    params["cell_bias"] = jnp.zeros(4 * width).at[:width].set(1.0)
    params["head_bias"] = jnp.zeros(vocabulary)
    return params


def loss_of(params: Any, text: jax.Array, input_factor: Any, is_shuffled: Any) -> Any:
    """Cross entropy of the next character in windows of text, [window, time + 1].

    The embedding goes around the recurrent layer, too, whose gates would otherwise hide
    from everything behind them how large the inputs are.
    """
    embedded = params["embed"][text[:, :-1]] * input_factor
    targets = text[:, 1:]
    # As if the labels were those of other windows, and in reverse.
    wrong = jnp.roll(targets[:, ::-1], 1, axis=0)
    targets = jnp.where(is_shuffled, wrong, targets)
    width = params["cell_bias"].shape[0] // 4

    def step(carry: Any, x: jax.Array) -> Any:
        hidden, cell = carry
        gates = jnp.concatenate([x, hidden], -1) @ params["cell"] + params["cell_bias"]
        forget, enter, leave, new = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros((len(text), width))
    _, hidden = jax.lax.scan(step, (zeros, zeros), embedded.swapaxes(0, 1))
    features = jnp.concatenate([hidden.swapaxes(0, 1), embedded], -1)
    logits = features @ params["head"] + params["head_bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def windows(part: Any, starts: Any, settings: Settings) -> Any:
    """What is to be read and predicted from some places on, [window, time + 1]."""
    return part[starts[:, None] + np.arange(settings.window + 1)]


def held_out_windows(validation: np.ndarray, settings: Settings) -> np.ndarray:
    """Windows spread evenly over the validation text."""
    last = len(validation) - settings.window - 1
    starts = np.linspace(0, last, settings.held_out).astype(int)
    return windows(validation, starts, settings)


class Run(NamedTuple):
    """One half of a run.

    Attributes:
      params: Parameters at its end.
      opt_state: State of the optimizer.
      losses: Held-out losses [evaluations].
      corrupt_taken: How many steps on corrupt batches were taken.
      healthy_skipped: How many steps on healthy ones were not.
      num_rewinds: How often the run went back.
    """

    params: Any
    opt_state: Any
    losses: Any
    corrupt_taken: Any
    healthy_skipped: Any
    num_rewinds: Any = 0


def make_step(tx: Any, settings: Settings) -> Callable[..., Any]:
    """A step on the batch of a number: new parameters and state, loss, two counts."""
    train = jnp.asarray(load_text().train)
    tx = optax.with_extra_args_support(tx)

    def train_step(params: Any, opt_state: Any, key: Any, step: Any, bad: Any) -> Any:
        last = len(train) - settings.window
        key_of_step = jax.random.fold_in(key, step)
        starts = jax.random.randint(key_of_step, (settings.batch_size,), 0, last)
        batch = windows(train, starts, settings)

        def loss_fn(params: Any) -> jax.Array:
            loss = loss_of(params, batch, bad.input_factor, bad.is_shuffled)
            return loss * bad.loss_factor

        loss, grads = jax.value_and_grad(loss_fn)(params)
        new, opt_state = og.apply_gradients(
            tx, params, opt_state, grads=grads, value=loss
        )
        # Weight decay alone moves something: only a skipped step changes nothing.
        same = jax.tree.map(lambda a, b: jnp.all(a == b), new, params)
        is_taken = ~jnp.all(jnp.stack(jax.tree.leaves(same)))
        counts = is_taken & bad.is_corrupt, ~is_taken & ~bad.is_corrupt
        return new, opt_state, loss, counts

    return train_step


def make_evaluation(settings: Settings) -> Callable[[Any], jax.Array]:
    """The held-out loss of parameters."""
    held_out = jnp.asarray(held_out_windows(load_text().validation, settings))
    return lambda params: loss_of(params, held_out, 1.0, False)


def make_half(tx: Any, settings: Settings) -> Callable[..., Run]:
    """Half a run as one jitted function of the state, first step, seed and batches."""
    step_of, evaluate = make_step(tx, settings), make_evaluation(settings)

    def train_step(carry: Any, inputs: Any) -> Any:
        params, opt_state, key = carry
        params, opt_state, _, counts = step_of(params, opt_state, key, *inputs)
        return (params, opt_state, key), counts

    def train_and_evaluate(carry: Any, inputs: Any) -> Any:
        carry, counts = jax.lax.scan(train_step, carry, inputs)
        return carry, (evaluate(carry[0]), *map(jnp.sum, counts))

    @jax.jit
    def half(params: Any, opt_state: Any, first: Any, key: Any, bad: Batches) -> Run:
        steps = first + jnp.arange(settings.half)
        inputs = jax.tree.map(
            lambda x: x.reshape(-1, settings.eval_every), (steps, bad)
        )
        carry = (params, opt_state, key)
        carry, (losses, *counts) = jax.lax.scan(train_and_evaluate, carry, inputs)
        return Run(*carry[:2], losses, *map(jnp.sum, counts))

    return half
