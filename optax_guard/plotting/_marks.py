"""Curves, crosses, stars and scales of all figures. Needs matplotlib.

Values that are not finite are drawn as crosses at the upper edge.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes as Axes
    from matplotlib.cm import ScalarMappable as ScalarMappable
    from matplotlib.colors import LogNorm as LogNorm
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle as Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError as error:
    raise ImportError(
        "`optax_guard.plotting` needs matplotlib: pip install 'optax-guard[plot]'",
        name=error.name,
    ) from error

from optax_guard._checks import check_kind
from optax_guard.stop._rule import StopReason
from optax_guard.stop._state import EarlyStoppingState

Row = Mapping[str, Any]


class ShownFigure(Figure):
    """A figure that notebooks show as the last value of a cell, without `pyplot`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


# The colours of Okabe and Ito can be told apart without colour vision. With markers and
# dashes the curves can be told apart in a black and white print.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILLION, PURPLE, BLACK = "#D55E00", "#CC79A7", "#000000"


def style(color: str, marker: str, dashes: Any, width: float = 1.5) -> dict[str, Any]:
    """Keyword arguments of a curve."""
    return {
        "color": color,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": width,
        "markersize": 4,
        # A narrow line stays visible on a wide one at the same place.
        "zorder": 3 - width / 10,
    }


LARGEST = style(BLUE, "o", "-")
MEAN = style(BLUE, "", ":")
AFTER = style(ORANGE, "^", "--")
THRESHOLD = style(BLACK, "", "-.")
STYLES = (
    style(VERMILLION, "s", ":"),
    style(BLACK, "^", "--"),
    style(SKY, "o", "-", 4),
    style(GREEN, "D", "-."),
    style(PURPLE, "v", "-"),
)
STOP = style(PURPLE, "", (0, (6, 2)))
CROSS: dict[str, Any] = {
    "marker": "X",
    "markersize": 9,
    "markeredgecolor": "white",
    "linestyle": "none",
    "clip_on": False,
    "zorder": 5,
}
STAR = CROSS | {
    "marker": "*",
    "markersize": 16,
    "color": GREEN,
    "markeredgecolor": BLACK,
}
END: dict[str, Any] = {
    "marker": "o",
    "markersize": 5,
    "color": VERMILLION,
    "markeredgecolor": "white",
    "linestyle": "none",
    "zorder": 4,
}
# With more rows than this, markers overlap.
MOST_MARKERS = 80
NORM_LABEL = "gradient norm\n[loss per unit of parameter]"

# White lines and words have a dark outline, so that they can be read on light grounds.
OUTLINE: list[Any] = [withStroke(linewidth=2.5, foreground=BLACK)]


def two_panels(rows: Sequence[Row], title: str) -> tuple[Figure, Any]:
    """A figure of two panels, one above the other, with a common axis of steps."""
    if not rows:
        raise ValueError("`history` must hold at least one row, got none.")
    figure = ShownFigure(figsize=(8, 7), dpi=120, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(2, 1, sharex=True)


def thinned(style: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """A style without markers where they would overlap."""
    return {**style, "marker": ""} if num_rows > MOST_MARKERS else dict(style)


def spans_decades(rows: Sequence[Row], keys: Iterable[str]) -> bool:
    """Whether the values are positive and the largest is over 20 times the smallest."""
    values = np.concatenate([column(rows, key) for key in keys])
    values = values[np.isfinite(values)]
    return values.size > 0 and 0 < 20 * values.min() < values.max()


def is_threshold_of_norms(rows: Sequence[Row]) -> bool:
    """Whether the threshold bounds global norms: it is finite, and no norm exceeds it.

    The global norm may exceed a threshold of entries, leaves or units.
    """
    limits, after = column(rows, "clip_threshold"), column(rows, "clipped_norm")
    return bool(np.isfinite(limits).any() and not (after > 1.001 * limits).any())


def mark_lowest(panel: Axes, rows: Sequence[Row], key: str) -> None:
    """Draws a star at the lowest finite value, if there is one."""
    values = column(rows, key)
    if np.isfinite(values).any():
        best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
        mark_best(panel, rows[best]["step"], values[best])


def mark_best(panel: Axes, step: float, value: float) -> None:
    """Draws a star and names it in the legend."""
    label = f"best: {value:.4g} at step {step}"
    panel.plot([step], [value], label=label, **STAR)


def mark_stop(
    panels: Iterable[Axes],
    losses: Axes | None,
    rows: Sequence[Row],
    stop: EarlyStoppingState,
) -> None:
    """Marks the best evaluation in the losses, and the stop in all panels."""
    check_kind("stop", stop, EarlyStoppingState, "an `EarlyStoppingState` or None")
    best, stopped = int(stop.best_eval), int(stop.stopped_at)
    if losses is not None and 0 <= best < len(rows):
        mark_best(losses, rows[best]["step"], float(stop.best_value))
    if 0 <= stopped < len(rows):
        step = rows[stopped]["step"]
        reason = StopReason(int(stop.stop_reason)).name
        for axes in panels:
            axes.axvline(step, label=f"stop: {reason} at step {step}", **STOP)


def column(history: Sequence[Row], key: str) -> np.ndarray:
    """Values of a key; NaN in rows without it."""
    return np.array([float(row.get(key, math.nan)) for row in history])


def value_key(history: Sequence[Row]) -> str:
    """The key of the validation loss."""
    return "val_loss" if any("val_loss" in row for row in history) else "value"


def line(
    axes: Axes,
    history: Sequence[Row],
    key: str,
    label: str,
    style: Mapping[str, Any],
    *,
    top: float | None = None,
    edge: float = 1.0,
    told_by: str | None = None,
) -> None:
    """Draws a curve.

    Values that are not finite are crosses. Values above ``top`` are hollow markers at
    the height ``edge`` (1 is the upper edge). Rows without the key are left out. A
    cross is left out where the value of ``told_by`` is not finite either.
    """
    history = [row for row in history if key in row]
    if not history:
        return
    steps, values = column(history, "step"), column(history, key)
    is_finite = np.isfinite(values)
    axes.plot(steps, np.where(is_finite, values, np.nan), label=label, **style)
    beyond = steps[is_finite & (values > (math.inf if top is None else top))]
    if beyond.size:
        hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
        edges, at_edge = np.full(beyond.size, edge), axes.get_xaxis_transform()
        axes.plot(beyond, edges, transform=at_edge, clip_on=False, **hollow)
    named = set()
    is_marked = ~is_finite
    if told_by is not None:
        is_marked &= np.array([math.isfinite(row.get(told_by, 0.0)) for row in history])
    for step, value in zip(steps[is_marked], values[is_marked], strict=True):
        # Only the first cross of a kind is named: further words would overlap.
        of = "" if str(value) in named else label
        named.add(str(value))
        is_right = step > sum(axes.get_xlim()) / 2
        side = "right" if is_right else "left"
        cross(axes, step, value, style["color"], edge=edge, of=of, side=side)


def cross(
    axes: Axes,
    step: float,
    value: float,
    color: str,
    *,
    top: float | None = None,
    edge: float = 1.0,
    of: str | None = None,
    side: str = "left",
) -> list[Line2D]:
    """Draws a cross at a value.

    A value that is not finite or is above ``top`` has its cross at the upper edge, with
    the value in words; ``of`` is the name of its curve, and "" leaves the words out.
    """
    if math.isfinite(value) and (top is None or value <= top):
        return axes.plot([step], [value], color=color, **CROSS)
    at_edge = axes.get_xaxis_transform()
    words = f"{value:.0e}"
    if not math.isfinite(value):
        words = "NaN" if math.isnan(value) else "Inf"
    # Words on a curve's value are beside the cross, words on a step are above it.
    offset = 0, 6
    place: dict[str, Any] = {"ha": "center", "va": "bottom"}
    if of is not None:
        offset = 7 if side == "left" else -7, -7
        words, place = f"{words} ({of})", {"ha": side, "va": "top"}
    if of != "":
        axes.annotate(
            words,
            (step, edge),
            xycoords=at_edge,
            xytext=offset,
            textcoords="offset points",
            fontsize="small",
            # A curve may pass behind the words.
            bbox={"color": "white", "alpha": 0.8, "pad": 0.5},
            zorder=4,
            **place,
        )
    return axes.plot([step], [edge], transform=at_edge, color=color, **CROSS)


def colors(values: np.ndarray) -> tuple[np.ma.MaskedArray, Normalize]:
    """Values to draw as colours, and their scale: logarithmic if they span decades.

    Values that are not finite are masked. On a logarithmic scale a zero has the colour
    of the smallest positive value.
    """
    shown = np.ma.masked_invalid(values)
    known = shown.compressed()
    if not known.size:
        return shown, Normalize(0, 1)
    low, high = float(known.min()), float(known.max())
    positive = known[known > 0]
    if low >= 0 and positive.size and 20 * float(positive.min()) < high:
        low = float(positive.min())
        return np.ma.maximum(shown, low), LogNorm(low, high)
    return shown, Normalize(low, high if high > low else low + 1)


def log_scale(axes: Axes, top: float | None = None) -> None:
    """Makes the scale logarithmic, if a value is positive."""
    lowest = axes.dataLim.minposy
    # Matplotlib cannot draw a logarithmic axis without a positive value.
    if not math.isfinite(lowest):
        return
    axes.set_yscale("log")
    if top is not None and top > lowest:
        # By itself Matplotlib would leave room for the values above the top.
        axes.set_ylim(lowest * (lowest / top) ** 0.05, top)
    name_ticks(axes.yaxis)


def name_ticks(axis: Any) -> None:
    """Names 1, 2 and 5 of each decade, where there are few decades."""
    low, high = axis.get_view_interval()
    if 0 < low < high < 200 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def finish(*panels: Axes) -> None:
    """Adds grids, legends and the label of the common axis to panels, top to bottom."""
    panels[-1].set_xlabel("steps done")
    for axes in panels:
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", framealpha=0.9)
