"""Tables of a history, and of the outcomes of a replay."""

from collections.abc import Iterable, Mapping
from typing import Any

from optax_guard._checks import check_flag, check_iterable
from optax_guard._records.table import aligned, as_markdown, history_cells
from optax_guard.analysis._replay import TEXT_COLUMNS, Replayed, replay_cells

# Nine characters hold any number as `fit` prints it.
_LEAST_WIDTH = 9


def table(
    history: Iterable[Mapping[str, Any]] | Iterable[Replayed], *, markdown: bool = False
) -> str:
    """Writes the rows of a history, or the outcomes of `replay`, as a table.

    A history has the columns that `fit` shows while it runs, if their values are known:
    epoch (or step), largest norm before and after clipping, share of steps clipped,
    number of steps skipped so far, training and validation loss, learning rate.

    Args:
      history: A `History`, rows such as `fit` returns, or the outcomes of `replay`.
      markdown: Whether to write a table of Markdown instead of aligned text.

    Returns:
      A heading and a line for each row, without a newline at the end.

    Raises:
      TypeError: If ``history`` has no rows, or ``markdown`` is not a bool.

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
    check_iterable("history", history, "a `History`, rows or what `replay` returned")
    rows: list[Any] = list(history)
    if rows and all(isinstance(row, Replayed) for row in rows):
        lines = replay_cells(rows)
        if markdown:
            return as_markdown(lines, left=TEXT_COLUMNS)
        return aligned(lines, left=TEXT_COLUMNS)
    lines = history_cells(rows)
    return as_markdown(lines) if markdown else aligned(lines, least=_LEAST_WIDTH)
