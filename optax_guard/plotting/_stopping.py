"""The figure of an early stop: losses, the best evaluation, the generalisation gap."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optax_guard._records.rows import as_rows
from optax_guard.analysis._replay import evaluations_of
from optax_guard.plotting import _marks as marks
from optax_guard.stop._state import EarlyStoppingState


def plot_early_stopping(
    history: Iterable[Mapping[str, Any]],
    *,
    stop: EarlyStoppingState | None = None,
    key: str | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws validation against training loss, and below it the gap between them.

    The gap is the validation loss minus the training loss of the same row; it grows
    while a run overfits. The stop is marked in both panels, the best evaluation in the
    losses. Values that are not finite are crosses at the upper edge.

    Args:
      history: A `History`, or rows such as `fit` returns.
      stop: The state of early stopping, updated once an evaluation. Without it the
        lowest evaluation is the best.
      key: Column of the evaluation. If ``None``, the one that is recorded of
        ``val_loss`` and ``value``.
      title: Title of the figure.

    Returns:
      The figure; it has one panel if no training loss is known.

    Raises:
      TypeError: If an argument is of another type.
      ValueError: If no row has the evaluation.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "train_loss": 1 / i, "val_loss": i} for i in (1, 2, 3)]
      >>> len(plotting.plot_early_stopping(rows).axes)  # the losses, and the gap
      2
    """
    rows, key = evaluations_of(as_rows(history), key)
    has_train = any("train_loss" in row for row in rows)
    figure = marks.ShownFigure(
        figsize=(8, 6.5 if has_train else 4), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    axes = figure.subplots(1 + has_train, 1, sharex=True, squeeze=False)[:, 0]
    curves = [(key, "validation", marks.LARGEST)]
    if has_train:
        curves.append(("train_loss", "training", marks.AFTER))
    for i, (name, label, style) in enumerate(curves):
        style = marks.thinned(style, len(rows))
        marks.line(axes[0], rows, name, label, style, edge=1 - 0.11 * i)
    if marks.spans_decades(rows, [name for name, *_ in curves]):
        marks.log_scale(axes[0])
    axes[0].set_ylabel("loss")
    if has_train:
        draw_gap(axes[1], rows, key)
    if stop is None:
        marks.mark_lowest(axes[0], rows, key)
    else:
        marks.mark_stop(axes, axes[0], rows, stop)
    marks.finish(*axes)
    return figure


def draw_gap(panel: marks.Axes, rows: Sequence[marks.Row], key: str) -> None:
    """Draws by how much the value of an evaluation is above the training loss."""
    gaps = [
        {"step": row["step"], "gap": row[key] - row["train_loss"]}
        for row in rows
        if "train_loss" in row
    ]
    style = marks.thinned(marks.STYLES[1], len(gaps))
    marks.line(panel, gaps, "gap", "validation minus training", style)
    panel.axhline(0, color="0.5", linewidth=1, zorder=1)
    panel.set_ylabel("generalisation gap")
