"""The task of the demo: a recurrent network predicts the next character of a text."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard._cli.demo_text import Text
from optax_guard.flax import TrainState

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All numbers of the demo.

    Attributes:
      num_steps: Steps of a run that nothing ends earlier.
      eval_every: Steps between evaluations.
      patience: Evaluations without an improvement that end the guarded run.
      min_delta: Least improvement that counts for patience, in nats per character.
      corrupt: Step, counted from 0 -> factor on the inputs of its batch.
      max_errors: Steps in a row that `optax.apply_if_finite` refuses at most.
      learning_rate: Learning rate of SGD.
      momentum: Momentum of SGD.
      max_norm: Norm to which Optax and the guard clip gradients.
      skip_above: Norm above which the guard skips a step.
      width: Units of the recurrent layer.
      batch_size: Windows of text in a batch.
      window: Characters in a window.
      sample_length: Characters to sample from the best parameters.
    """

    num_steps: int = 1500
    eval_every: int = 50
    patience: int = 5
    min_delta: float = 0.005
    corrupt: Mapping[int, float] = dataclasses.field(
        default_factory=lambda: {
            110: 1e6,
            160: math.nan,
            **dict.fromkeys(range(210, 218), math.nan),
        }
    )
    max_errors: int = 5
    learning_rate: float = 0.3
    momentum: float = 0.9
    max_norm: float = 0.75
    skip_above: float = 1e4
    width: int = 256
    batch_size: int = 32
    window: int = 48
    sample_length: int = 600


class CharRNN(nn.Module):
    """Predicts the next character from one-hot characters, [batch, time, vocabulary].

    The embedding also goes around the recurrent layer: the tanh of that layer would
    otherwise hide how large the inputs are.
    """

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits of the next character at every position."""
        embedded = nn.Dense(64)(inputs)
        hidden: Any = nn.RNN(nn.SimpleCell(self.width))(embedded)
        return nn.Dense(self.vocabulary)(jnp.concatenate([hidden, embedded], -1))


# Compared by identity: `jit` looks its bound methods up, and arrays have no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Data, loss, step and evaluation, which all runs share.

    Attributes:
      recipe: The numbers of the demo.
      text: The text in numbers.
      seed: Seed of the batches.
      model: The network.
      held_out: Inputs and targets of the validation loss.
    """

    recipe: Recipe
    text: Text
    seed: int
    model: CharRNN
    held_out: Batch

    def batch(self, step: int) -> Batch:
        """The batch of a step; the batches of some steps are corrupt."""
        size, window = self.recipe.batch_size, self.recipe.window
        inputs, targets = self.text.batch(self.seed, step, size, window)
        return inputs * np.float32(self.recipe.corrupt.get(step, 1.0)), targets

    def logits(self, params: optax.Params, inputs: jax.typing.ArrayLike) -> jax.Array:
        """Logits [batch, time, vocabulary] of one-hot characters of that shape."""
        variables: Any = params
        return jnp.asarray(self.model.apply(variables, inputs))

    def loss(self, params: optax.Params, batch: Batch) -> jax.Array:
        """Mean cross-entropy, in nats per character."""
        inputs, targets = batch
        logits = self.logits(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def train_step(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, jax.Array]:
        """One step, and its loss; NaN if the guard skipped the step."""
        loss, grads = jax.value_and_grad(self.loss)(state.params, batch)
        state = state.apply_gradients(grads=grads, value=loss)
        # The loss of a skipped batch is no part of the training loss.
        skipped = og.metrics(state).get("skip_reason", 0) != 0
        return state, jnp.where(skipped, jnp.nan, loss)

    def validation_loss(self, params: optax.Params) -> jax.Array:
        """The loss on the held-out windows."""
        return self.loss(params, self.held_out)


def make_task(recipe: Recipe, text: Text, seed: int) -> Task:
    """The task on a text, with the validation windows of the recipe."""
    model = CharRNN(len(text.characters), recipe.width)
    return Task(recipe, text, seed, model, text.held_out(128, recipe.window))
