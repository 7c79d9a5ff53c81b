"""The table of a history, as text or Markdown."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optax_guard._checks import check_flag
from optax_guard._records.rows import as_rows

# Key of a row -> heading, format. In this order, before what `evaluate` returned.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "epoch": ("epoch", "{:g}".format),
    "step": ("step", "{:g}".format),
    "grad_norm": ("grad norm", "{:.4g}".format),
    "clipped_norm": ("after clip", "{:.4g}".format),
    "clip_rate": ("clipped", "{:.1%}".format),
    "num_skipped": ("skipped", "{:g}".format),
    "num_dropped": ("dropped", "{:g}".format),
    "train_loss": ("train loss", "{:.4g}".format),
    "val_loss": ("val loss", "{:.4g}".format),
}
# In the history, but not worth a column.
_LEFT_OUT = {"clip_threshold", "grad_norm_mean", "nonfinite_rate", "skip_rate"}

_KEYS = (*COLUMNS, "value", "learning_rate")


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
        "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def cells(history: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The texts of the table: the heading, then a list a row."""
    rows = as_rows(history)
    known = {key: 0.0 for key in _KEYS if any(key in row for row in rows)}
    keys = choose_columns(known)
    first = [heading(key) for key in keys]
    return [first, *([cell(k, row.get(k)) for k in keys] for row in rows)]


def choose_columns(row: Mapping[str, float]) -> list[str]:
    known = [key for key in COLUMNS if key in row]
    if "epoch" in row and "step" in row:
        known.remove("step")
    others = [key for key in row if key not in COLUMNS and key not in _LEFT_OUT]
    return known + others


def heading(key: str) -> str:
    return COLUMNS[key][0] if key in COLUMNS else key.replace("_", " ")


def cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return COLUMNS[key][1](value) if key in COLUMNS else f"{value:.4g}"
