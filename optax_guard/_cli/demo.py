"""`optax-guard demo`: the same training three times, with and without the guard.

A character-level recurrent network on the text of Python's own documentation. Model,
seed and data are the same; the optimizer is SGD with momentum as it is, behind Optax's
clip, and in a guard with early stopping. Two batches are corrupt, as a broken data
shard makes them: one has inputs a million times too large, one is NaN.

The recipe was searched for, because with most the choice does not matter. Tried, for
200 to 1500 steps each, most on the text with its indents: a plain RNN, an LSTM and a
GRU; SGD with momentum 0.9 at rates of 0.1 to 8, and Adam; no clip, and thresholds of
0.1 to 1.

* Nothing exploded with Adam (RNN and LSTM, 0.003 and 0.01) nor with SGD at low rates
  (RNN at 0.1, LSTM at 1): there a clip changes little or nothing.
* LSTM and GRU at rates of 1.5 and more, unclipped, reach norms of 1e19 and NaN within
  200 steps. Clipped they learn a little better than the RNN, and a step costs more.
* The RNN at 0.2 to 0.5, unclipped, reaches norms of 10 to 1000 and stays finite, at
  losses of 3 to 3000. Clipped to 0.25 to 1 it learns as well as with Adam at 0.003,
  except that at a rate of 0.5 a threshold of 1 is too high.

Chosen: the plain RNN at 0.3, with room on both sides of the threshold of 0.75. The
recipe shows what clipping is for; it does not show that SGD is the best choice.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard._cli.demo_report import LiveTable, conclude, introduce, json_line
from optax_guard._cli.demo_text import load_text, sample
from optax_guard._cli.report import fresh
from optax_guard.flax import TrainState
from optax_guard.loops._fit import fit
from optax_guard.loops._result import FitResult
from optax_guard.plotting._history import plot_history


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All numbers of the demo.

    Attributes:
      num_steps: Steps of a run that nothing ends before.
      eval_every: Steps between evaluations.
      patience: Evaluations without an improvement that end the guarded run.
      min_delta: Least improvement that counts for that, in nats per character.
      corrupt: Step, counted from 0 -> factor on the inputs of its batch.
      learning_rate: Of SGD.
      momentum: Of SGD.
      max_norm: Norm to which gradients are clipped, by Optax and by the guard.
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
        default_factory=lambda: {180: 1e6, 270: math.nan}
    )
    learning_rate: float = 0.3
    momentum: float = 0.9
    max_norm: float = 0.75
    skip_above: float = 1e4
    width: int = 256
    batch_size: int = 32
    window: int = 48
    sample_length: int = 600


FULL = Recipe()
QUICK = Recipe(num_steps=120, eval_every=15, corrupt={20: 1e6, 50: math.nan})


class CharRNN(nn.Module):
    """Predicts the next character from one-hot characters, [batch, time, vocabulary].

    The embedding also goes around the recurrent layer, whose tanh would otherwise
    hide from everything behind it how large the inputs are.
    """

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits of the next character at every position."""
        embedded = nn.Dense(64)(inputs)
        hidden: Any = nn.RNN(nn.SimpleCell(self.width))(embedded)
        return nn.Dense(self.vocabulary)(jnp.concatenate([hidden, embedded], -1))


def run(recipe: Recipe, seed: int, out: Path) -> dict[str, FitResult] | None:
    """Trains three times, writes the files and tells what came of it.

    Args:
      recipe: `FULL`, `QUICK` or one's own.
      seed: Of the initial parameters, the batches and the sample.
      out: Folder for ``history.jsonl``, ``norms.png`` and ``runs.png``. The history has
        a line of strict JSON for every evaluation of every run; a number that is not
        finite is the string "NaN", "Infinity" or "-Infinity".

    Returns:
      The result of each run, the guarded one last; ``None`` if one was interrupted.
    """
    started = time.monotonic()
    text = load_text()
    out.mkdir(parents=True, exist_ok=True)
    model = CharRNN(len(text.characters), recipe.width)
    held_out = text.held_out(128, recipe.window)
    params = jax.jit(model.init)(jax.random.key(seed), held_out[0][:1])
    epoch_of_a_step = recipe.batch_size * recipe.window / len(text.train)

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = text.batch(seed, step, recipe.batch_size, recipe.window)
        return inputs * np.float32(recipe.corrupt.get(step, 1.0)), targets

    def logits_of(params: Any, inputs: Any) -> jax.Array:
        return jnp.asarray(model.apply(params, inputs))

    def loss_of(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        logits = logits_of(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
        state = state.apply_gradients(grads=grads, value=loss)
        # What a skipped batch would have cost is no part of the training loss.
        skipped = og.metrics(state).get("skip_reason", 0) != 0
        return state, jnp.where(skipped, jnp.nan, loss)

    @jax.jit
    def evaluate(state: Any) -> dict[str, jax.Array]:
        val_loss = loss_of(state.params, held_out)
        return {"epoch": state.step * epoch_of_a_step, "val_loss": val_loss}

    # All that differs between the runs. The first two go on until a validation loss is
    # not finite: parameters never come back from there.
    sgd = optax.sgd(recipe.learning_rate, momentum=recipe.momentum)
    clip = optax.clip_by_global_norm(recipe.max_norm)
    too_large = og.skip.norm_above(recipe.skip_above)
    go_on = og.early_stopping(og.stop.budget(steps=recipe.num_steps), key="val_loss")
    patience = og.stop.patience(recipe.patience, min_delta=recipe.min_delta)
    be_patient = og.early_stopping(patience, key="val_loss")
    runs = {
        "unguarded": (optax.chain(og.record_norm(), sgd), go_on),
        "Optax's clip": (optax.chain(og.record_norm(), clip, sgd), go_on),
        "guarded": (og.guard(sgd, clip=recipe.max_norm, skip=too_large), be_patient),
    }

    introduce(recipe, text, seed)
    results: dict[str, FitResult] = {}
    with fresh(out / "history.jsonl").open("w", encoding="utf-8") as file:
        for name, (tx, stopper) in runs.items():

            def write(step: int, row: dict[str, float], name: str = name) -> None:
                del step
                print(json_line({"run": name, **row}), file=file, flush=True)

            with LiveTable(recipe.num_steps, title=name) as table:
                results[name] = fit(
                    TrainState.create(apply_fn=model.apply, params=params, tx=tx),
                    train_step,
                    batches,
                    num_steps=recipe.num_steps,
                    eval_every=recipe.eval_every,
                    evaluate=evaluate,
                    stopper=stopper,
                    loggers=[write],
                    progress=table,
                )
            if results[name].interrupted or results[name].preempted:
                return None

    guarded = results["guarded"]
    plot_history(
        guarded.history,
        skipped_steps=og.skipped_steps(guarded.state),
        stop=guarded.stop,
        loss_label="loss [nats per character]",
        title="The guarded run",
    ).savefig(fresh(out / "norms.png"))
    plot_history(
        {name: result.history for name, result in results.items()},
        loss_label="validation loss [nats per character]",
        title="Same model, seed and data; three optimizers",
        max_loss=10.0,
    ).savefig(fresh(out / "runs.png"))
    restored = guarded.state.replace(params=guarded.best_params)
    written = sample(
        text,
        functools.partial(logits_of, restored.params),
        window=recipe.window,
        length=recipe.sample_length,
        seed=seed,
    )
    conclude(recipe, results, float(evaluate(restored)["val_loss"]), written)
    print(f"\nFiles in {out}: history.jsonl, norms.png, runs.png")
    print(f"Took {time.monotonic() - started:.0f} s.")
    return results
