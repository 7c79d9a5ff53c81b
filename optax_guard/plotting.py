"""Figures of norms and losses; they need matplotlib.

Rows of a history are a `History`, what `optax_guard.flax.fit` returns, or the same read
back from JSON, where numbers that are not finite are strings such as ``"NaN"``. Figures
belong to no window: save them with ``figure.savefig(path)``, or leave one as the last
value of a notebook's cell.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from optax_guard._base import check_iterable, check_kind, check_positive
from optax_guard._plot_distribution import (
    plot_norm_distribution as plot_norm_distribution,
)
from optax_guard._plot_history import plot_history
from optax_guard._plot_landscape import plot_landscape
from optax_guard._plot_leaves import plot_leaves
from optax_guard._plot_population import plot_population
from optax_guard._plot_replay import plot_replay
from optax_guard._plot_stopping import plot_early_stopping
from optax_guard._plot_sweep import plot_sweep
from optax_guard._plotting_marks import (
    AFTER,
    LARGEST,
    MEAN,
    NORM_LABEL,
    STYLES,
    THRESHOLD,
    VERMILLION,
    Figure,
    Row,
    column,
    cross,
    finish,
    is_threshold_of_norms,
    line,
    log_scale,
    mark_stop,
    panels,
    value_key,
)
from optax_guard._public import publish
from optax_guard._readout import Rejection
from optax_guard._stop_state import EarlyStoppingState

__all__ = [
    "plot_early_stopping",
    "plot_history",
    "plot_landscape",
    "plot_leaves",
    "plot_norm_distribution",
    "plot_norms",
    "plot_population",
    "plot_replay",
    "plot_runs",
    "plot_sweep",
]


def plot_norms(
    history: Sequence[Row],
    *,
    rejections: Iterable[Rejection] = (),
    stop: EarlyStoppingState | None = None,
    loss_label: str = "loss",
    title: str = "",
) -> Figure:
    """Draws norms before and after clipping against the threshold, and the losses.

    Above, on a logarithmic scale: of each row the step with the largest norm, before
    and after clipping, with the mean norm and the threshold. Steps that the guard
    withheld are crosses at their norm, or, with the norm in digits, at the upper edge
    if it is not finite or far above all steps taken. Below: the losses, the best
    evaluation and the stop. Values that are not finite are crosses at the upper edge.

    Args:
      history: Rows with ``step`` and any of ``grad_norm``, ``clipped_norm``,
        ``grad_norm_mean``, ``clip_threshold``, ``train_loss``, and ``val_loss`` or
        ``value``.
      rejections: What `optax_guard.rejections` returned.
      stop: The state of early stopping, updated once a row.
      loss_label: Label of the lower axis, with its unit.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If ``history`` is empty.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> plotting.plot_norms(rows).axes[0].get_yscale()
      'log'
    """
    figure, (above, below) = panels(history, title)
    check_iterable("rejections", rejections, "what `rejections` returned")
    withheld = list(rejections)
    for each in withheld:
        check_kind("rejections", each, Rejection, "what `rejections` returned")
    # Without a clip the threshold is infinite, which is no failure to be marked.
    is_clipped = np.isfinite(column(history, "clip_threshold")).any()
    line(above, history, "grad_norm", "before clipping, largest", LARGEST)
    line(above, history, "grad_norm_mean", "before clipping, mean", MEAN)
    if is_clipped:
        line(above, history, "clipped_norm", "after clipping, of the largest", AFTER)
    if is_threshold_of_norms(history):
        line(above, history, "clip_threshold", "threshold", THRESHOLD)
    above.set_ylabel(NORM_LABEL)
    top = _top_of_norms(history, withheld)
    for i, rejection in enumerate(withheld):
        norm = rejection.grad_norm
        (mark,) = cross(above, rejection.update + 1, norm, VERMILLION, top=top)
        if i == 0:
            many = "s" * (len(withheld) > 1)
            mark.set_label(f"withheld: {len(withheld)} step{many}")

    line(below, history, "train_loss", "training", AFTER)
    line(below, history, value_key(history), "validation", LARGEST)
    if stop is not None:
        mark_stop((above, below), below, history, stop)
    below.set_ylabel(loss_label)
    log_scale(above, top if withheld else None)
    finish(above, below)
    return figure


def plot_runs(
    histories: Mapping[str, Sequence[Row]],
    *,
    loss_label: str = "loss",
    max_loss: float | None = None,
    title: str = "",
) -> Figure:
    """Draws the gradient norms and the validation losses of several runs.

    Both scales are logarithmic. Values that are not finite are crosses at the upper
    edge; those above ``max_loss`` are hollow markers there.

    Args:
      histories: For the name of each run its rows; at most five runs.
      loss_label: Label of the lower axis, with its unit.
      max_loss: Where the lower axis ends, so that a run that explodes does not flatten
        the others.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there are no rows.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> figure = plotting.plot_runs({"as it was": rows, "shorter": rows[:2]})
      >>> [text.get_text() for text in figure.axes[0].get_legend().texts]
      ['as it was', 'shorter']
    """
    check_kind("histories", histories, Mapping, "a dict of rows by name")
    if max_loss is not None:
        check_positive("max_loss", max_loss)
        if max_loss == math.inf:
            raise ValueError("`max_loss` must be finite, or None for no end, got inf.")
    rows = [row for history in histories.values() for row in history]
    if not rows:
        raise ValueError("`histories` must hold at least one row, got none.")
    figure, (above, below) = panels(rows, title)
    top = math.inf if max_loss is None else max_loss
    for i, (name, history) in enumerate(histories.items()):
        style, edge = STYLES[i % len(STYLES)], 1 - 0.07 * i
        line(above, history, "grad_norm", name, style, edge=edge)
        line(below, history, value_key(history), name, style, top=top, edge=edge)
    above.set_ylabel("largest " + NORM_LABEL)
    below.set_ylabel(loss_label)
    log_scale(above)
    log_scale(below, max_loss)
    if max_loss is not None:
        for axis in ("major", "minor"):
            getattr(below.yaxis, f"set_{axis}_formatter")("{x:g}")
    finish(above, below)
    return figure


def _top_of_norms(history: Sequence[Row], withheld: Sequence[Rejection]) -> float:
    """Where the axis ends: room above the steps that were taken."""
    norms = column(history, "grad_norm")
    norms = norms[np.isfinite(norms)]
    lost = np.array([r.grad_norm for r in withheld if math.isfinite(r.grad_norm)])
    taken = norms[~np.isclose(norms[:, None], lost[None]).any(1)]
    limits = column(history, "clip_threshold")
    known = np.concatenate([taken, limits[np.isfinite(limits)]])
    return 10 * float(known.max()) if known.size else 10.0


def __dir__() -> list[str]:
    return list(__all__)


publish(__name__)
