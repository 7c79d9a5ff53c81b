"""What figures of histories are made of. Only this and its users need matplotlib.

Values that are not finite are drawn, as crosses at the upper edge.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle as Rectangle
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


def style(color: str, marker: str, dashes: Any, width: float = 1.5) -> dict[str, Any]:
    """Keyword arguments of a curve."""
    return {
        "color": color,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": width,
        "markersize": 4,
        # A wide line lies under the narrow ones that coincide with it.
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
NORM_LABEL = "gradient norm\n[loss per unit of parameter]"


def panels(history: Sequence[Row], title: str) -> tuple[Figure, Any]:
    """A figure of two panels over the same steps."""
    if not history:
        raise ValueError("`history` must hold at least one row, got none.")
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(2, 1, sharex=True)


def column(history: Sequence[Row], key: str) -> np.ndarray:
    """Values of a key, NaN where there are none."""
    return np.array([float(row.get(key, math.nan)) for row in history])


def value_key(history: Sequence[Row]) -> str:
    """The key of the validation loss."""
    return "val_loss" if "val_loss" in history[0] else "value"


def line(
    axes: Axes,
    history: Sequence[Row],
    key: str,
    label: str,
    style: Mapping[str, Any],
    *,
    top: float = math.inf,
    edge: float = 1.0,
) -> None:
    """A curve; crosses for what is not finite, hollow markers for what is beyond."""
    if not any(key in row for row in history):
        return
    steps, values = column(history, "step"), column(history, key)
    is_finite = np.isfinite(values)
    axes.plot(steps, np.where(is_finite, values, np.nan), label=label, **style)
    beyond = steps[is_finite & (values > top)]
    if beyond.size:
        hollow = {**style, "linestyle": "none", "markerfacecolor": "white"}
        edges, at_edge = np.full(beyond.size, edge), axes.get_xaxis_transform()
        axes.plot(beyond, edges, transform=at_edge, clip_on=False, **hollow)
    told = set()
    for step, value in zip(steps[~is_finite], values[~is_finite], strict=True):
        # Once is enough: further words would run into each other.
        of = "" if str(value) in told else label
        told.add(str(value))
        is_right = step > (steps.min() + steps.max()) / 2
        side = "right" if is_right else "left"
        cross(axes, step, value, style["color"], edge=edge, of=of, side=side)


def cross(
    axes: Axes,
    step: float,
    value: float,
    color: str,
    *,
    top: float = math.inf,
    edge: float = 1.0,
    of: str | None = None,
    side: str = "left",
) -> list[Line2D]:
    """A cross at a value, or at the upper edge, with words, if it is beyond ``top``."""
    if math.isfinite(value) and value <= top:
        return axes.plot([step], [value], color=color, **CROSS)
    at_edge = axes.get_xaxis_transform()
    words = f"{value:.0e}"
    if not math.isfinite(value):
        words = "NaN" if math.isnan(value) else "Inf"
    # Those of a curve are beside the cross, those of a step above it.
    offset = 0, 6
    place: dict[str, Any] = {"ha": "center", "va": "bottom"}
    if of is not None:
        offset = 7 if side == "left" else -7, -1
        words, place = f"{words} ({of})", {"ha": side, "va": "top"}
    if of != "":
        axes.annotate(
            words,
            (step, edge),
            xycoords=at_edge,
            xytext=offset,
            textcoords="offset points",
            fontsize="small",
            **place,
        )
    return axes.plot([step], [edge], transform=at_edge, color=color, **CROSS)


def color_scale(values: np.ndarray) -> Normalize:
    """From the smallest to the largest value; logarithmic if they span decades.

    Args:
      values: Numbers, masked or not; those that are not finite do not count.
    """
    known = np.ma.masked_invalid(values).compressed()
    if not known.size:
        return Normalize(0, 1)
    low, high = float(known.min()), float(known.max())
    if 0 < 20 * low < high:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1)


def log_scale(axes: Axes, top: float | None = None) -> None:
    """A logarithmic scale, if there is a value to put on it."""
    lowest = axes.dataLim.minposy
    # Matplotlib cannot draw a logarithmic axis without a value to put on it.
    if not math.isfinite(lowest):
        return
    axes.set_yscale("log")
    if top is not None and top > lowest:
        # By itself it would leave room for what is above the top.
        axes.set_ylim(lowest * (lowest / top) ** 0.05, top)


def finish(*panels: Axes) -> None:
    """Grid, legends and the label of the common axis, of panels from top to bottom."""
    panels[-1].set_xlabel("steps done")
    for axes in panels:
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", framealpha=0.9)
