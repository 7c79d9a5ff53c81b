"""The figure of an early stop: evaluations, the best, and the generalisation gap."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optax_guard._checks import check_kind
from optax_guard._records.rows import as_rows
from optax_guard.analysis._replay import Replayed, evaluations_of
from optax_guard.plotting import _marks as marks
from optax_guard.stop._rule import StopReason
from optax_guard.stop._state import EarlyStoppingState


def plot_early_stopping(
    history: Iterable[Mapping[str, Any]],
    *,
    stop: EarlyStoppingState | None = None,
    key: str | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws validation against training loss, and below it the gap between them.

    The gap is the validation loss minus the training loss of the same row: what grows
    while a run overfits. It is marked, as the losses are, where the best evaluation and
    the stop were, so that it is seen what stopping saved. Values that are not finite
    are crosses at the upper edge.

    Args:
      history: A `History`, or rows such as `fit` returns.
      stop: The state of early stopping, updated once an evaluation; without it the
        lowest evaluation is the best.
      key: Column of the evaluation; ``val_loss`` or ``value``, whichever there is, if
        ``None``.
      title: Title of the figure.

    Returns:
      The figure; of one panel if no training loss is known.

    Raises:
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
        gaps = [
            row | {"gap": row[key] - row["train_loss"]}
            for row in rows
            if "train_loss" in row
        ]
        style = marks.thinned(marks.STYLES[1], len(rows))
        label = "validation minus training"
        marks.line(axes[1], gaps, "gap", label, style)
        axes[1].axhline(0, color="0.5", linewidth=1, zorder=1)
        axes[1].set_ylabel("generalisation gap")
    if stop is None:
        marks.mark_lowest(axes[0], rows, key)
    else:
        marks.mark_stop(axes, axes[0], rows, stop)
    marks.finish(*axes)
    return figure


def plot_replay(
    history: Iterable[Mapping[str, Any]],
    replayed: Sequence[Replayed],
    *,
    key: str | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws the evaluations of a run, and below them what each rule would have made.

    Above: the values, and the best of them. Below, a line for each rule: a bar to where
    it would have stopped, with a star at the best until then, and what it gives up.

    Args:
      history: A `History`, or rows such as `fit` returns.
      replayed: What `optax_guard.analysis.replay` returned for it.
      key: As for `replay`.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If no row has the value, or ``replayed`` is empty.

    Examples:
      >>> from optax_guard import analysis, plotting, stop
      >>> rows = [{"step": i, "val_loss": x} for i, x in enumerate([2.0, 1.0, 1.5])]
      >>> found = analysis.replay(rows, {"target(1)": stop.target(1.0)})
      >>> len(plotting.plot_replay(rows, found).axes)
      2
    """
    check_kind("replayed", replayed, Sequence, "what `replay` returned")
    for one in replayed:
        check_kind("replayed", one, Replayed, "what `replay` returned")
    if not replayed:
        raise ValueError("`replayed` must hold a rule at least, got none.")
    rows, key = evaluations_of(as_rows(history), key)
    figure = marks.ShownFigure(
        figsize=(8, 4 + 0.35 * len(replayed)), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[3, 0.5 + 0.35 * len(replayed)]
    )
    marks.line(above, rows, key, key, marks.thinned(marks.LARGEST, len(rows)))
    above.set_ylabel(key)
    for i, one in enumerate(replayed):
        has_stopped = one.reason != StopReason.RUNNING
        color = marks.ORANGE if has_stopped else marks.SKY
        below.barh(i, one.stopped_step, height=0.5, color=color, edgecolor=marks.BLACK)
        if one.best_step >= 0:
            below.plot([one.best_step], [i], **marks.STAR)
        words = (
            f"gives up {one.loss_given_up:.3g}" if one.loss_given_up else "same best"
        )
        inside = one.stopped_step > 0.7 * rows[-1]["step"]
        below.annotate(
            words,
            (one.stopped_step, i),
            xytext=(-5 if inside else 5, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize="small",
        )
        if has_stopped:
            above.axvline(one.stopped_step, color=marks.ORANGE, linestyle=":", zorder=1)
    below.set_yticks(range(len(replayed)), [one.name for one in replayed])
    below.invert_yaxis()
    marks.finish(above, below)
    return figure
