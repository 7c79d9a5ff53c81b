"""The texts that the demo prints. Every number in them is read from the results."""

import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import jax

import optax_guard as og
from optax_guard._cli.demo_task import Recipe
from optax_guard._cli.demo_text import Text
from optax_guard._guarding.leaf_report import as_text
from optax_guard._records.progress import Progress
from optax_guard.loops._result import FitResult

_WIDTH = 80
# Heading -> width in the table that compares the runs.
_COLUMNS = {
    "run": 12,
    "steps": 5,
    "ended by": 9,
    "max norm": 8,
    "NaN/Inf": 7,
    "skipped": 8,
    "best val": 8,
    "final val": 9,
}


class LiveTable(Progress):
    """The live table, without columns that were not measured."""

    def row(self, row: Mapping[str, float]) -> None:
        """Adds a row."""
        row = {**row, "epoch": round(row["epoch"], 2)}
        if "num_skipped" not in row:
            # Without a guard the norm is measured before Optax's clip, and that clip
            # keeps no record.
            row = {
                k: v for k, v in row.items() if k not in ("clipped_norm", "clip_rate")
            }
        super().row(row)


def json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON, in which a number that is not finite is a string."""

    def strict(value: Any) -> Any:
        is_number = isinstance(value, float)
        return json.dumps(value) if is_number and not math.isfinite(value) else value

    return json.dumps({k: strict(v) for k, v in row.items()}, allow_nan=False)


def introduce(recipe: Recipe, text: Text, seed: int) -> None:
    """Prints which network is trained, and on which text."""
    factors = [f"{step} (inputs x {x:g})" for step, x in recipe.corrupt.items()]
    _print(
        f"A recurrent network of {recipe.width} units learns to predict the next "
        f"character of Python's documentation ({len(text.train):,} characters to train "
        f"on, {len(text.validation):,} held out). SGD, learning rate "
        f"{recipe.learning_rate:g}, momentum {recipe.momentum:g}, seed {seed}. Corrupt "
        f"batches at steps {' and '.join(factors)}."
    )
    _print(
        f"Gradients are clipped to a norm of {recipe.max_norm:g}; the guard skips "
        f"steps above {recipe.skip_above:g}. `grad norm` is the largest of the "
        f"{recipe.eval_every} steps of a row, losses are in nats per character."
    )


def conclude(
    recipe: Recipe, results: Mapping[str, FitResult], restored_loss: float, written: str
) -> None:
    """Prints the results of the runs; the guarded one is the last."""
    *_, (name, guarded) = results.items()
    stop: Any = guarded.stop
    story = og.explain(stop)
    if not stop.should_stop:
        story = f"it took all of its {recipe.num_steps} steps; {story}."
    _print(f"The {name} run: {story}", before="\n")
    _print(
        "Its best parameters are restored: their validation loss, computed again, is "
        f"{restored_loss:.4f}."
    )
    skipped = ", ".join(
        f"step {r.update} (norm {r.grad_norm:.3g}, "
        f"{': '.join(filter(None, [r.reason.name, as_text(r.leaves)]))})"
        for r in og.skipped_steps(guarded.state)
    )
    _print(
        f"It skipped {_num_skipped(guarded)} step(s): {skipped or 'none'}. Corrupt "
        f"batches came at steps {', '.join(map(str, recipe.corrupt))}."
    )
    print()
    print(_line(*_COLUMNS))
    for name, result in results.items():
        stop = result.stop
        stats = jax.device_get(og.find_states(result.state, og.NormStats)[0])
        final = result.history[-1]["val_loss"]
        print(
            _line(
                name,
                f"{result.history[-1]['step']}",
                _ended_by(stop),
                f"{stats.norm_max:.2e}",
                f"{stats.num_nonfinite}",
                f"{_num_skipped(result)}",
                f"{float(stop.best_value):.4g}",
                f"{restored_loss if result is guarded else final:.4g}",
            )
        )
    _print(
        "max norm: the largest finite gradient norm; NaN/Inf: steps with gradients "
        "that are not finite; val: validation loss, best and of the final parameters.",
        before="\n",
    )
    print("\nThe restored model writes:\n")
    for line in written.strip().splitlines():
        for part in textwrap.wrap(line, _WIDTH - 4) or [""]:
            print(f"  | {part}".rstrip())


def _line(*cells: str) -> str:
    first, *others = zip(_COLUMNS.values(), cells, strict=True)
    return f"{first[1]:<{first[0]}}" + "".join(f"  {x:>{width}}" for width, x in others)


def _num_skipped(result: FitResult) -> int:
    return sum(int(s.num_skipped) for s in og.find_states(result.state, og.GuardState))


def _ended_by(stop: og.EarlyStoppingState) -> str:
    reason = og.StopReason(int(stop.stop_reason))
    is_over = reason in (og.StopReason.RUNNING, og.StopReason.BUDGET)
    return "last step" if is_over else reason.name


def _print(paragraph: str, before: str = "") -> None:
    print(before + textwrap.fill(paragraph, _WIDTH))
