"""The step of each row, where a file leaves it out or counts within epochs."""

from collections.abc import Sequence
from itertools import pairwise

Row = dict[str, float]


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
    epochs = [row.get("epoch", -1.0) for row in rows]
    if _rises(epochs):
        numbered = [
            {"step": int(epoch), **row} for epoch, row in zip(epochs, rows, strict=True)
        ]
        return numbered, []
    numbered = [{"step": i, **row} for i, row in enumerate(rows)]
    if says_step or len(rows) < 2:
        return numbered, []
    return numbered, ["there is no step; rows are numbered from 0"]


def _rises(epochs: list[float]) -> bool:
    """Whether they are whole and rise, but for a resume that repeats some."""
    if not epochs or not all(0 <= x < float("inf") and not x % 1 for x in epochs):
        return False
    num_rises = sum(b > a for a, b in pairwise(epochs))
    num_equal = sum(b == a for a, b in pairwise(epochs))
    return num_equal == 0 and 2 * num_rises >= len(epochs) - 1


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
