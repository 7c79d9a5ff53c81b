"""`optax-guard demo`: the same training four times, with and without the guard.

A character-level recurrent network learns the text of Python's own documentation.
Model, seed and data are the same in all runs. The optimizer is SGD with momentum: as it
is, behind Optax's clip, the same in `optax.apply_if_finite`, and in a guard with early
stopping. Some batches are corrupt, as a broken data shard makes them. In one the inputs
are a million times too large, in one they are NaN, and then they are NaN in eight
batches in a row. `apply_if_finite` refuses five of these and applies the sixth. With a
limit of eight it would survive them, and fall at nine. A guard has a limit, too: the
run ends there, and the NaN is not applied.

The recipe had to be searched for: with most recipes the choice of the optimizer does
not matter. These were tried for 200 to 1500 steps each, most of them on the text with
its indents: a plain RNN, an LSTM and a GRU; SGD with momentum 0.9 at rates of 0.1 to 8,
and Adam; no clip, and thresholds of 0.1 to 1.

* Nothing exploded with Adam (RNN and LSTM, 0.003 and 0.01) nor with SGD at low rates
  (RNN at 0.1, LSTM at 1). A clip changes little or nothing there.
* LSTM and GRU at rates of 1.5 and more, unclipped, reach norms of 1e19 and NaN within
  200 steps. Clipped, they learn a little better than the RNN, but a step costs more.
* The RNN at 0.2 to 0.5, unclipped, reaches norms of 10 to 1000 and stays finite, at
  losses of 3 to 3000. Clipped to 0.25 to 1, it learns as well as with Adam at 0.003,
  except that a threshold of 1 is too high at a rate of 0.5.

The demo takes the plain RNN at a rate of 0.3. The threshold of 0.75 leaves room on both
sides. The recipe shows why one clips; it does not show that SGD is the best choice.
"""

import functools
import math
import time
from pathlib import Path
from typing import TextIO

import jax
import optax

import optax_guard as og
from optax_guard._cli.demo_report import (
    LiveTable,
    conclude,
    has_died,
    introduce,
    json_line,
    measured,
    working,
)
from optax_guard._cli.demo_task import Recipe, Task, make_task
from optax_guard._cli.demo_text import load_text, sample
from optax_guard._cli.report import fresh
from optax_guard._cli.words import own_command
from optax_guard.flax import TrainState
from optax_guard.loops._fit import fit
from optax_guard.loops._result import FitResult
from optax_guard.plotting._history import plot_history
from optax_guard.stop._state import EarlyStopping

FULL = Recipe()
QUICK = Recipe(
    num_steps=120,
    eval_every=15,
    corrupt={20: 1e6, 34: math.nan, **dict.fromkeys(range(47, 55), math.nan)},
)

Optimizers = dict[str, tuple[optax.GradientTransformationExtraArgs, EarlyStopping]]


def run(recipe: Recipe, seed: int, out: Path) -> dict[str, FitResult] | None:
    """Trains four times, writes the files and prints the results.

    Args:
      recipe: `FULL`, `QUICK` or one of your own.
      seed: Seed of the initial parameters, the batches and the sample.
      out: Folder for ``history.jsonl``, ``norms.png`` and ``runs.png``. The history has
        a line of strict JSON for every evaluation of every run; a number that is not
        finite is the string "NaN", "Infinity" or "-Infinity".

    Returns:
      The result of each run, the guarded one last; ``None`` if one was interrupted.
    """
    started = time.monotonic()
    text = load_text()
    out.mkdir(parents=True, exist_ok=True)
    task = make_task(recipe, text, seed)
    introduce(recipe, text, seed)
    validation_loss = jax.jit(task.validation_loss)
    with working("Making the parameters"):
        init = jax.jit(task.model.init)
        params = init(jax.random.key(seed), task.held_out[0][:1])
    results: dict[str, FitResult] = {}
    with fresh(out / "history.jsonl").open("w", encoding="utf-8") as file:
        for name, (tx, stopper) in _optimizers(recipe).items():
            table = LiveTable(recipe.num_steps, title=name)
            with table:
                result = fit(
                    TrainState.create(apply_fn=task.model.apply, params=params, tx=tx),
                    task.train_step,
                    task.batch,
                    num_steps=recipe.num_steps,
                    eval_every=recipe.eval_every,
                    evaluate=lambda state: {"val_loss": validation_loss(state.params)},
                    stopper=stopper,
                    loggers=[functools.partial(_write_line, file, name)],
                    progress=table,
                )
                table.end(result)
            if result.interrupted or result.preempted:
                return None
            results[name] = result
    guarded = results["guarded"]
    with working("Drawing the plots, and writing with the restored model"):
        _save_figures(results, out)
        restored_loss = float(validation_loss(guarded.best_params))
        written = _sample_text(task, guarded.best_params)
    conclude(recipe, results, restored_loss, written)
    print(f"\nFiles in {out}: history.jsonl, norms.png, runs.png")
    print(f"Took {time.monotonic() - started:.0f} s. All runs side by side:\n")
    print(f"  {own_command('report', str(out))}")
    return results


def _optimizers(recipe: Recipe) -> Optimizers:
    """The optimizer and the stopper of each run: all that differs between the runs."""
    sgd = optax.sgd(recipe.learning_rate, momentum=recipe.momentum)
    clip = optax.clip_by_global_norm(recipe.max_norm)
    if_finite = optax.apply_if_finite(optax.chain(clip, sgd), recipe.max_errors)
    too_large = og.skip.norm_above(recipe.skip_above)
    # Without a guard a run ends when a validation loss is not finite: parameters never
    # come back from there.
    go_on = og.early_stopping(og.stop.budget(steps=recipe.num_steps), key="val_loss")
    patience = og.stop.patience(recipe.patience, min_delta=recipe.min_delta)
    be_patient = og.early_stopping(patience, key="val_loss")
    return {
        "unguarded": (optax.chain(og.record_norm(), sgd), go_on),
        "Optax's clip": (optax.chain(og.record_norm(), clip, sgd), go_on),
        "apply_if_finite": (optax.chain(og.record_norm(), if_finite), go_on),
        "guarded": (og.guard(sgd, clip=recipe.max_norm, skip=too_large), be_patient),
    }


def _write_line(file: TextIO, name: str, step: int, row: dict[str, float]) -> None:
    """Writes a row of a run, as a logger of `fit`."""
    del step
    print(json_line({"run": name, **measured(row)}), file=file, flush=True)


def _save_figures(results: dict[str, FitResult], out: Path) -> None:
    guarded = results["guarded"]
    skipped = og.skipped_steps(guarded.state)
    died = sum(has_died(result) for result in results.values())
    plot_history(
        guarded.history,
        skipped_steps=skipped,
        stop=guarded.stop,
        loss_label="loss [nats per character]",
        title=f"The guarded run skipped {len(skipped)} steps and went on",
    ).savefig(fresh(out / "norms.png"))
    plot_history(
        {name: result.history for name, result in results.items()},
        loss_label="validation loss [nats per character]",
        title=f"Same model, seed and data: {died} of {len(results)} runs died",
        max_loss=10.0,
    ).savefig(fresh(out / "runs.png"))


def _sample_text(task: Task, params: optax.Params) -> str:
    return sample(
        task.text,
        functools.partial(task.logits, params),
        window=task.recipe.window,
        length=task.recipe.sample_length,
        seed=task.seed,
    )
