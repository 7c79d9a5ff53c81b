"""What all pictures share: size, fonts, a title that is a sentence."""

import textwrap
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import WIDTH

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, GREY, PALE = "#56B4E9", "#CC79A7", "0.45", "0.85"
FONTS: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.titlesize": 11.5,
}


def new_figure(title: str, height: float) -> Figure:
    """A figure with its finding as title."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 76), fontweight="bold")
    return figure


def key_below(figure: Figure, handles: list[Any], title: str, columns: int) -> None:
    """A legend under all axes, whose title says what the x axes are."""
    figure.legend(
        handles=handles,
        title=title,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )


def tidy(ax: Any) -> None:
    """Without frame and marks of ticks; a fine grid along x."""
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)
    ax.grid(axis="x", color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)
