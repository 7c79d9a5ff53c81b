"""The step of each row, where a file leaves it out or counts within epochs."""

from collections.abc import Sequence
from itertools import pairwise

Row = dict[str, float]
# These tell when a row was measured. Others, such as a time, may come with every row.
MEASURED = ("train_loss", "val_loss", "value", "grad_norm")


def number_steps(
    rows: Sequence[tuple[str, Row]], *, says_step: bool
) -> tuple[list[Row], list[str]]:
    """Gives every row a whole step.

    A row without a step belongs to the step before it. Without any step the epochs are
    the steps, if they are whole and rise; else rows are numbered from 0. Steps that
    begin anew in each epoch are counted on.

    Args:
      rows: The place of each row, for messages, and the row.
      says_step: Whether the place of a row is known to be its step.

    Returns:
      The rows, ``step`` first, and notes of what was assumed.
    """
    if not any("step" in row for _, row in rows):
        return _without_steps([row for _, row in rows], says_step)
    last, numbered = 0, []
    for place, row in rows:
        last = _whole(place, row["step"]) if "step" in row else last
        numbered.append({**row, "step": last})
    if not _begins_anew(numbered):
        return numbered, []
    return _counted_on(numbered), ["`step` begins anew in each epoch and is counted on"]


def _whole(place: str, step: float) -> int:
    if not 0 <= step < float("inf") or step % 1:
        raise ValueError(f"{place}: `step` must be a whole number >= 0, got {step}.")
    return int(step)


def _without_steps(rows: list[Row], says_step: bool) -> tuple[list[Row], list[str]]:
    if _tells_epochs(rows):
        return [{"step": int(row["epoch"]), **row} for row in rows], []
    numbered = [{"step": i, **row} for i, row in enumerate(rows)]
    if says_step or len(rows) < 2:
        return numbered, []
    return numbered, ["there is no step; rows are numbered from 0"]


def _tells_epochs(rows: list[Row]) -> bool:
    """Whether epochs are whole and rise, and each has one loss and one norm.

    A resumed run repeats some; training and evaluation may have rows of their own.
    """
    if not rows or not all(
        0 <= row.get("epoch", -1) < float("inf") and not row["epoch"] % 1
        for row in rows
    ):
        return False
    seen = set(rows[0])
    num_rises = num_falls = 0
    for a, b in pairwise(rows):
        if a["epoch"] == b["epoch"]:
            if any(name in b for name in MEASURED if name in seen):
                return False
            seen |= set(b)
            continue
        num_rises += b["epoch"] > a["epoch"]
        num_falls += b["epoch"] < a["epoch"]
        seen = set(b)
    return num_rises >= num_falls


def _begins_anew(rows: list[Row]) -> bool:
    """Whether the step falls where the epoch rises, and nowhere else."""
    falls = [(a, b) for a, b in pairwise(rows) if b["step"] < a["step"]]
    return bool(falls) and all(
        "epoch" in a and "epoch" in b and b["epoch"] > a["epoch"] for a, b in falls
    )


def _counted_on(rows: list[Row]) -> list[Row]:
    counted, offset, last = [], 0, 0
    first = min(row["step"] for row in rows)
    for row in rows:
        if row["step"] < last:
            offset += last + (first == 0)
        last = row["step"]
        counted.append({**row, "step": offset + last})
    return counted
