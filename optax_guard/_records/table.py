"""Cells of the table of a history, and tables as text or Markdown."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from optax_guard._records.rows import as_rows

# Key of a row -> heading, format. These columns come first, in this order.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step": ("step", "{:.15g}".format),
    "epoch": ("epoch", "{:g}".format),
    "grad_norm": ("grad norm", "{:.4g}".format),
    "clipped_norm": ("after clip", "{:.4g}".format),
    "clip_rate": ("clipped", "{:.1%}".format),
    "num_skipped": ("skipped", "{:g}".format),
    "num_dropped": ("dropped", "{:g}".format),
    "train_loss": ("train loss", "{:.4g}".format),
    "val_loss": ("val loss", "{:.4g}".format),
}
# A history has these, but they are not worth a column.
_LEFT_OUT = {
    "clip_threshold",
    "grad_norm_mean",
    "nonfinite_rate",
    "skip_rate",
    "update_ratio",
    "leaf_norm_ratio",
    "initial_value",
    "baseline",
    "stop_reason",
}
_KEYS = (*COLUMNS, "value", "learning_rate")
# The beginnings of the names under which loops write what they evaluate.
_EVALUATED = ("val_", "eval_", "val/", "eval/", "valid_", "valid/", "test_", "test/")


def history_cells(history: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The texts of the table: the heading, then a list for each row."""
    rows = as_rows(history)
    names = dict.fromkeys(key for row in rows for key in row)
    known = {key: 0.0 for key in _KEYS if key in names}
    known |= {key: 0.0 for key in names if key.startswith(_EVALUATED)}
    keys = choose_columns(known)
    first = [heading(key) for key in keys]
    return [first, *([cell(k, row.get(k)) for k in keys] for row in rows)]


def thinned(
    rows: Sequence[Mapping[str, Any]], steps: Collection[float], most: int
) -> list[Mapping[str, Any]]:
    """About as many rows, at equal distances, and all that tell something.

    These are the last row, the rows at some steps, those that count new skips, and
    those of an evaluation.

    Args:
      rows: The rows.
      steps: Steps whose rows stay.
      most: How many rows there may be without those that tell something.
    """
    stride = max(1, -(-len(rows) // most))
    kept = set(range(len(rows))[::-1][::stride])
    kept |= {
        i
        for i, row in enumerate(rows)
        if row.get("step") in steps or _is_evaluation(row)
    }
    before = 0.0
    for i, row in enumerate(rows):
        skipped = row.get("num_skipped", before)
        # Beside a count the rate may be that of all steps so far.
        rate = 0 if "num_skipped" in row else row.get("skip_rate", 0)
        if skipped > before or rate > 0:
            kept.add(i)
        before = skipped
    return [rows[i] for i in sorted(kept)]


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(key == "value" or key.startswith(_EVALUATED) for key in row)


def choose_columns(row: Mapping[str, float]) -> list[str]:
    """The keys of a row that get a column, in their order."""
    known = [key for key in COLUMNS if key in row]
    others = [key for key in row if key not in COLUMNS and key not in _LEFT_OUT]
    return known + others


def heading(key: str) -> str:
    """The heading of a key's column."""
    return COLUMNS[key][0] if key in COLUMNS else key.replace("_", " ")


def cell(key: str, value: float | None) -> str:
    """The text of a value; empty if there is none."""
    if value is None:
        return ""
    return COLUMNS[key][1](value) if key in COLUMNS else f"{value:.4g}"


def aligned(
    lines: Sequence[Sequence[str]], *, left: Collection[int] = (), least: int = 0
) -> str:
    """Cells as aligned text.

    Args:
      lines: The cells of each line; all lines have the same number of cells.
      left: Columns of texts, which are aligned to the left; numbers are to the right.
      least: Least width of a column.

    Returns:
      The lines, without a newline at the end.
    """
    widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(lines: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> str:
    """Cells as a table of Markdown; arguments as for `aligned`."""
    rule = [":---" if i in left else "---:" for i in range(len(lines[0]))]
    # A bar in a name would begin another cell.
    cells = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))
