"""Figures of norms and losses; the only module that imports matplotlib.

Rows of a history are what `optax_guard.flax.fit` returns, or the same read back from
JSON, where numbers that are not finite are strings such as ``"NaN"``. Figures belong to
no window: save them with ``figure.savefig(path)``, or leave one as the last value of a
notebook's cell.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optax_guard._readout import Rejection
from optax_guard._stop_base import StopReason
from optax_guard._stop_state import EarlyStoppingState

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError as error:
    raise ImportError(
        "`optax_guard.plotting` needs matplotlib: pip install 'optax-guard[plot]'",
        name=error.name,
    ) from error

Row = Mapping[str, Any]

# Okabe and Ito's colours: told apart without colour vision and, with the markers and
# dashes that go with them, in a black and white print.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILLION, PURPLE, BLACK = "#D55E00", "#CC79A7", "#000000"


def _style(color: str, marker: str, dashes: Any, width: float = 1.5) -> dict[str, Any]:
    return {
        "color": color,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": width,
        "markersize": 4,
        # A wide line lies under the narrow ones that coincide with it.
        "zorder": 3 - width / 10,
    }


_LARGEST = _style(BLUE, "o", "-")
_MEAN = _style(BLUE, "", ":")
_AFTER = _style(ORANGE, "^", "--")
_THRESHOLD = _style(BLACK, "", "-.")
_STYLES = (
    _style(VERMILLION, "s", ":"),
    _style(BLACK, "^", "--"),
    _style(SKY, "o", "-", 4),
    _style(GREEN, "D", "-."),
    _style(PURPLE, "v", "-"),
)
_STOP = _style(PURPLE, "", (0, (6, 2)))
_CROSS: dict[str, Any] = {
    "marker": "X",
    "markersize": 9,
    "markeredgecolor": "white",
    "linestyle": "none",
    "clip_on": False,
    "zorder": 5,
}
_STAR = _CROSS | {
    "marker": "*",
    "markersize": 16,
    "color": GREEN,
    "markeredgecolor": BLACK,
}
_NORM_LABEL = "gradient norm\n[loss per unit of parameter]"


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
    """
    figure, (above, below) = _panels(history, title)
    withheld = list(rejections)
    # Without a clip the threshold is infinite, which is no failure to be marked.
    is_clipped = np.isfinite(_column(history, "clip_threshold")).any()
    _line(above, history, "grad_norm", "before clipping, largest", _LARGEST)
    _line(above, history, "grad_norm_mean", "before clipping, mean", _MEAN)
    if is_clipped:
        _line(above, history, "clipped_norm", "after clipping, of the largest", _AFTER)
        _line(above, history, "clip_threshold", "threshold", _THRESHOLD)
    above.set_ylabel(_NORM_LABEL)
    top = _top_of_norms(history, withheld)
    for i, rejection in enumerate(withheld):
        norm = rejection.grad_norm
        (mark,) = _cross(above, rejection.update + 1, norm, VERMILLION, top=top)
        if i == 0:
            many = "s" * (len(withheld) > 1)
            mark.set_label(f"withheld: {len(withheld)} step{many}")

    _line(below, history, "train_loss", "training", _AFTER)
    _line(below, history, _value_key(history), "validation", _LARGEST)
    if stop is not None:
        _mark_stop(above, below, history, stop)
    below.set_ylabel(loss_label)
    _log_scale(above, top if withheld else None)
    _finish(above, below)
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
    """
    rows = [row for history in histories.values() for row in history]
    figure, (above, below) = _panels(rows, title)
    top = math.inf if max_loss is None else max_loss
    for i, (name, history) in enumerate(histories.items()):
        style, edge = _STYLES[i % len(_STYLES)], 1 - 0.07 * i
        _line(above, history, "grad_norm", name, style, edge=edge)
        _line(below, history, _value_key(history), name, style, top=top, edge=edge)
    above.set_ylabel("largest " + _NORM_LABEL)
    below.set_ylabel(loss_label)
    _log_scale(above)
    _log_scale(below, max_loss)
    if max_loss is not None:
        for axis in ("major", "minor"):
            getattr(below.yaxis, f"set_{axis}_formatter")("{x:g}")
    _finish(above, below)
    return figure


def _panels(history: Sequence[Row], title: str) -> tuple[Figure, Any]:
    if not history:
        raise ValueError("`history` must hold at least one row, got none.")
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(2, 1, sharex=True)


def _column(history: Sequence[Row], key: str) -> np.ndarray:
    return np.array([float(row.get(key, math.nan)) for row in history])


def _value_key(history: Sequence[Row]) -> str:
    return "val_loss" if "val_loss" in history[0] else "value"


def _top_of_norms(history: Sequence[Row], withheld: Sequence[Rejection]) -> float:
    """Where the axis ends: room above the steps that were taken."""
    norms = _column(history, "grad_norm")
    norms = norms[np.isfinite(norms)]
    lost = np.array([r.grad_norm for r in withheld if math.isfinite(r.grad_norm)])
    taken = norms[~np.isclose(norms[:, None], lost[None]).any(1)]
    limits = _column(history, "clip_threshold")
    known = np.concatenate([taken, limits[np.isfinite(limits)]])
    return 10 * float(known.max()) if known.size else 10.0


def _line(
    axes: Axes,
    history: Sequence[Row],
    key: str,
    label: str,
    style: Mapping[str, Any],
    *,
    top: float = math.inf,
    edge: float = 1.0,
) -> None:
    if not any(key in row for row in history):
        return
    steps, values = _column(history, "step"), _column(history, key)
    is_finite = np.isfinite(values)
    axes.plot(steps, np.where(is_finite, values, np.nan), label=label, **style)
    beyond = steps[is_finite & (values > top)]
    if beyond.size:
        hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
        edges, at_edge = np.full(beyond.size, edge), axes.get_xaxis_transform()
        axes.plot(beyond, edges, transform=at_edge, clip_on=False, **hollow)
    for step, value in zip(steps[~is_finite], values[~is_finite], strict=True):
        _cross(axes, step, value, style["color"], edge=edge, of=label)


def _cross(
    axes: Axes,
    step: float,
    value: float,
    color: str,
    *,
    top: float = math.inf,
    edge: float = 1.0,
    of: str = "",
) -> list[Line2D]:
    """A cross at a value, or at the upper edge, with words, if it is beyond ``top``."""
    if math.isfinite(value) and value <= top:
        return axes.plot([step], [value], color=color, **_CROSS)
    at_edge = axes.get_xaxis_transform()
    words = f"{value:.0e}"
    if not math.isfinite(value):
        words = "NaN" if math.isnan(value) else "Inf"
    axes.annotate(
        f"{words} ({of})" if of else words,
        (step, edge),
        xycoords=at_edge,
        xytext=(7, -1) if of else (0, 6),
        textcoords="offset points",
        fontsize="small",
        ha="left" if of else "center",
        va="top" if of else "bottom",
    )
    return axes.plot([step], [edge], transform=at_edge, color=color, **_CROSS)


def _mark_stop(
    above: Axes, below: Axes, history: Sequence[Row], stop: EarlyStoppingState
) -> None:
    best, stopped = int(stop.best_eval), int(stop.stopped_at)
    if 0 <= best < len(history):
        step, value = history[best]["step"], float(stop.best_value)
        label = f"best: {value:.4g} at step {step}"
        below.plot([step], [value], label=label, **_STAR)
    if 0 <= stopped < len(history):
        step = history[stopped]["step"]
        reason = StopReason(int(stop.stop_reason)).name
        for axes in (above, below):
            axes.axvline(step, label=f"stop: {reason} at step {step}", **_STOP)


def _log_scale(axes: Axes, top: float | None = None) -> None:
    lowest = axes.dataLim.minposy
    # Matplotlib cannot draw a logarithmic axis without a value to put on it.
    if not math.isfinite(lowest):
        return
    axes.set_yscale("log")
    if top is not None and top > lowest:
        # By itself it would leave room for what is above the top.
        axes.set_ylim(lowest * (lowest / top) ** 0.05, top)


def _finish(above: Axes, below: Axes) -> None:
    below.set_xlabel("steps done")
    for axes in (above, below):
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", framealpha=0.9)
