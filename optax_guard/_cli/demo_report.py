"""The texts that the demo prints. Every number in them is read from the results."""

import contextlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import jax
import optax
from rich.console import Console

import optax_guard as og
from optax_guard._cli.demo_task import Recipe
from optax_guard._cli.demo_text import Text
from optax_guard._guarding.leaf_report import as_text
from optax_guard._records.progress import Progress
from optax_guard.loops._result import FitResult

_WIDTH = 80
# Heading -> width in the table that compares the runs.
_COLUMNS = {
    "run": 15,
    "steps": 5,
    "ended by": 9,
    "max norm": 8,
    "NaN/Inf": 7,
    "skipped": 7,
    "best": 7,
    "last": 7,
}


def measured(row: Mapping[str, float]) -> Mapping[str, float]:
    """A row without what was not measured.

    Without a guard the norm is measured before Optax's clip, which keeps no record.
    """
    unknown = {"clipped_norm", "clip_threshold", "clip_rate"}
    is_guarded = "num_skipped" in row
    return row if is_guarded else {k: v for k, v in row.items() if k not in unknown}


class LiveTable(Progress):
    """The live table of a run, and how it ended."""

    def start(self) -> None:
        """Draws the bar, below an empty line."""
        print(flush=True)
        super().start()

    def row(self, row: Mapping[str, float]) -> None:
        """Adds a row."""
        super().row(measured(row))

    def end(self, result: FitResult) -> None:
        """Says in a line below the table how the run ended."""
        if result.history:
            self.say(_ending(result))


def working(words: str) -> contextlib.AbstractContextManager[object]:
    """Shows on a terminal that there is something to wait for."""
    return Console().status(words)


def has_died(result: FitResult) -> bool:
    """Whether a validation loss that was not finite ended the run."""
    return _reason(result) == og.StopReason.NONFINITE


def json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON, in which a number that is not finite is a string."""

    def strict(value: Any) -> Any:
        is_number = isinstance(value, float)
        return json.dumps(value) if is_number and not math.isfinite(value) else value

    return json.dumps({k: strict(v) for k, v in row.items()}, allow_nan=False)


def introduce(recipe: Recipe, text: Text, seed: int) -> None:
    """Prints which network is trained, and on which text."""
    broken = [
        f"{_steps(list(steps))} (inputs x {x:g})"
        for x, steps in groupby(recipe.corrupt, recipe.corrupt.__getitem__)
    ]
    _print(
        f"A recurrent network of {recipe.width} units learns to predict the next "
        f"character of Python's documentation ({len(text.train):,} characters to train "
        f"on, {len(text.validation):,} held out). SGD, learning rate "
        f"{recipe.learning_rate:g}, momentum {recipe.momentum:g}, seed {seed}. Corrupt "
        f"batches at {', '.join(broken)}."
    )
    _print(
        f"Gradients are clipped to a norm of {recipe.max_norm:g}; `apply_if_finite` "
        f"refuses {recipe.max_errors} steps in a row, and the guard skips steps above "
        f"{recipe.skip_above:g}, too. `grad norm` is the largest of the "
        f"{recipe.eval_every} steps of a row, losses are in nats per character."
    )


def conclude(
    recipe: Recipe, results: Mapping[str, FitResult], restored_loss: float, written: str
) -> None:
    """Prints the results of the runs; the guarded one is the last."""
    *_, (name, guarded) = results.items()
    _print(f"The {name} run: {og.explain(guarded)}", before="\n")
    _print(
        "Its best parameters are restored: their validation loss, computed again, is "
        f"{restored_loss:.4f}."
    )
    _print(
        f"It skipped {_num_skipped(recipe, guarded)} steps; corrupt batches came at "
        f"{_steps(list(recipe.corrupt))}.",
        before="\n",
    )
    skipped = og.skipped_steps(guarded.state)
    for (norm, why), steps in groupby(skipped, _why):
        words = f"{_steps([each.update for each in steps])}: norm {norm}, {why}"
        print(textwrap.fill(f"  {words}", _WIDTH, subsequent_indent="    "))
    print()
    print(_line(*_COLUMNS))
    for name, result in results.items():
        stats = jax.device_get(og.find_states(result.state, og.NormStats)[0])
        last = restored_loss if result is guarded else result.history[-1]["val_loss"]
        print(
            _line(
                name,
                f"{result.history[-1]['step']}",
                _ended_by(result),
                f"{stats.norm_max:.2e}",
                f"{stats.num_nonfinite}",
                f"{_num_skipped(recipe, result)}",
                f"{float(cast(og.EarlyStoppingState, result.stop).best_value):.4g}",
                f"{last:.4g}",
            )
        )
    _print(
        "max norm: the largest finite gradient norm; NaN/Inf: steps with gradients "
        "that are not finite; best, last: the best validation loss, and that of the "
        "parameters that the run ends with.",
        before="\n",
    )
    print("\nThe restored model writes:\n")
    for line in written.strip().splitlines():
        for part in textwrap.wrap(line, _WIDTH - 4) or [""]:
            print(f"  | {part}".rstrip())


def _line(*cells: str) -> str:
    first, *others = zip(_COLUMNS.values(), cells, strict=True)
    return f"{first[1]:<{first[0]}}" + "".join(f"  {x:>{width}}" for width, x in others)


def _num_skipped(recipe: Recipe, result: FitResult) -> int:
    count = sum(int(s.num_skipped) for s in og.find_states(result.state, og.GuardState))
    for state in og.find_states(result.state, optax.ApplyIfFiniteState):
        # A NaN that was applied is in the parameters for good, and so in each gradient.
        applied = max(0, int(state.notfinite_count) - recipe.max_errors)
        count += int(state.total_notfinite) - applied
    return count


def _why(skipped: og.SkippedStep) -> tuple[str, str]:
    """The norm of a skipped step, and why it was skipped, in words."""
    leaves = as_text(skipped.leaves)
    why = f"{skipped.reason.name}: {leaves}" if leaves else skipped.reason.name
    return f"{skipped.grad_norm:.3g}", why


def _steps(steps: Sequence[int]) -> str:
    """Steps in words: ``steps 3, 7 to 9``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    words = [f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs]
    return f"step{'s' * (len(steps) > 1)} {', '.join(words)}"


def _reason(result: FitResult) -> og.StopReason:
    return og.StopReason(int(cast(og.EarlyStoppingState, result.stop).stop_reason))


def _ended_by(result: FitResult) -> str:
    reason = _reason(result)
    is_over = reason in (og.StopReason.RUNNING, og.StopReason.BUDGET)
    return "last step" if is_over else reason.name


def _ending(result: FitResult) -> str:
    last = result.history[-1]
    if has_died(result):
        return f"died: at step {last['step']} the validation loss is {last['val_loss']}"
    reason = _ended_by(result)
    if reason == "last step":
        return f"took all of its {last['step']} steps"
    return f"stopped at step {last['step']}: {reason}"


def _print(paragraph: str, before: str = "") -> None:
    print(before + textwrap.fill(paragraph, _WIDTH))
