"""The table of a history, as text or Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from optax_guard import _progress
from optax_guard._base import check_flag
from optax_guard._history_rows import as_rows

_KEYS = (*_progress.COLUMNS, "value", "learning_rate")


def table(history: Iterable[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """The rows of a history, with the columns that `fit` shows while it runs.

    Args:
      history: A `History`, or rows such as `fit` returns.
      markdown: Whether to write a table of Markdown instead of aligned text.

    Returns:
      Epoch (or step), largest norm before and after clipping, share of steps clipped,
      steps skipped in all, training and validation loss, learning rate: those of them
      that are known; a line a row, under a heading.

    Raises:
      TypeError: If ``history`` has no rows, or ``markdown`` is no bool.

    Examples:
      >>> from optax_guard.analysis import History, table
      >>> history = History()
      >>> history.append(1, loss=2.3, grad_norm=15.2, clip_threshold=5.0)
      >>> history.append(2, loss=1.8, grad_norm=12.7, clip_threshold=5.0)
      >>> print(table(history))
           step  grad norm  after clip    clipped  train loss
              1       15.2           5     100.0%         2.3
              2       12.7           5     100.0%         1.8
    """
    check_flag("markdown", markdown)
    lines = cells(history)
    if markdown:
        lines.insert(1, ["---:"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(9, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def cells(history: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The texts of the table: the heading, then a list a row."""
    rows = as_rows(history)
    known = {key: 0.0 for key in _KEYS if any(key in row for row in rows)}
    keys = _progress.choose_columns(known)
    heading = [_progress.heading(key) for key in keys]
    return [heading, *([_progress.cell(k, row.get(k)) for k in keys] for row in rows)]
