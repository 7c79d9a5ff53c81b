"""The figure of a report on stopping: the gap, and rules; losses are in another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optax_guard._records.rows import as_rows
from optax_guard.analysis._replay import Replayed, evaluations_of
from optax_guard.plotting import _marks as marks
from optax_guard.plotting._replay import draw_rules, rules_height
from optax_guard.plotting._stopping import draw_gap


def plot_outlook(
    history: Iterable[Mapping[str, Any]], replayed: Sequence[Replayed]
) -> marks.Figure:
    """Draws the lower panels of `plot_early_stopping` and of `plot_replay`.

    Args:
      history: Rows, of which one has ``train_loss``, or there are rules.
      replayed: The outcomes of rules; there may be none.
    """
    rows, key = evaluations_of(as_rows(history), None)
    has_gap = any("train_loss" in row for row in rows)
    heights = [3.0] * has_gap + [rules_height(replayed)] * bool(replayed)
    figure = marks.ShownFigure(
        figsize=(8, 0.8 + sum(heights)), dpi=120, layout="constrained"
    )
    axes = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    if has_gap:
        draw_gap(axes[0], rows, key)
    if replayed:
        draw_rules(axes[-1], rows, replayed)
    marks.finish(*axes)
    return figure
