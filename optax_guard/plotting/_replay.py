"""The figure of a replay: where each stop rule would have stopped a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optax_guard._checks import check_kind
from optax_guard._records.rows import as_rows
from optax_guard.analysis._replay import Replayed, evaluations_of
from optax_guard.plotting import _marks as marks
from optax_guard.stop._rule import StopReason


def plot_replay(
    history: Iterable[Mapping[str, Any]],
    replayed: Sequence[Replayed],
    *,
    key: str | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws the evaluations of a run, and where each rule would have stopped.

    Below them, each rule has a bar up to the step at which it would have stopped. A
    star marks the best evaluation until then, and words tell the loss that it gives up.

    Args:
      history: A `History`, or rows such as `fit` returns.
      replayed: The outcomes that `optax_guard.analysis.replay` returned for it.
      key: As for `replay`.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If an argument is of another type.
      ValueError: If no row has the value, or ``replayed`` is empty.

    Examples:
      >>> from optax_guard import analysis, plotting, stop
      >>> rows = [{"step": i, "val_loss": x} for i, x in enumerate([2.0, 1.0, 1.5])]
      >>> found = analysis.replay(rows, {"target(1)": stop.target(1.0)})
      >>> len(plotting.plot_replay(rows, found).axes)
      2
    """
    check_kind("replayed", replayed, Sequence, "the outcomes of `replay`")
    for one in replayed:
        check_kind("replayed", one, Replayed, "the outcomes of `replay`")
    if not replayed:
        raise ValueError("`replayed` must hold at least one outcome, got none.")
    rows, key = evaluations_of(as_rows(history), key)
    figure = marks.ShownFigure(
        figsize=(8, 4 + 0.35 * len(replayed)), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=[3, rules_height(replayed)]
    )
    marks.line(above, rows, key, key, marks.thinned(marks.LARGEST, len(rows)))
    above.set_ylabel(key)
    draw_rules(below, rows, replayed)
    for one in replayed:
        if one.reason != StopReason.RUNNING:
            above.axvline(one.stopped_step, color=marks.ORANGE, linestyle=":", zorder=1)
    marks.finish(above, below)
    return figure


def rules_height(replayed: Sequence[Replayed]) -> float:
    """The height of a panel of rules, in inches."""
    return 0.5 + 0.35 * len(replayed)


def draw_rules(
    panel: marks.Axes, rows: Sequence[marks.Row], replayed: Sequence[Replayed]
) -> None:
    """Draws a bar for each rule, up to the step at which it would have stopped."""
    for i, one in enumerate(replayed):
        has_stopped = one.reason != StopReason.RUNNING
        color = marks.ORANGE if has_stopped else marks.SKY
        panel.barh(i, one.stopped_step, height=0.5, color=color, edgecolor=marks.BLACK)
        if one.best_step >= 0:
            panel.plot([one.best_step], [i], **marks.STAR)
        words = (
            f"gives up {one.loss_given_up:.3g}" if one.loss_given_up else "same best"
        ) + (", undecidable" if one.undecidable else "")
        inside = one.stopped_step > 0.7 * rows[-1]["step"]
        # The words stay clear of a star at the end of the bar.
        offset = 14 if one.best_step > 0.95 * one.stopped_step else 5
        panel.annotate(
            words,
            (one.stopped_step, i),
            xytext=(-offset if inside else offset, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize="small",
        )
    panel.set_yticks(range(len(replayed)), [one.name for one in replayed])
    panel.invert_yaxis()
