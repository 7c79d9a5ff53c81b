"""Of each finding: how often it is true, and how often it is there when it is due."""

import math
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures._style import BLUE, ORANGE, PALE, key_below, new_figure, tidy

# The least precision with which a finding is kept.
NEEDED = 0.8


def figure_of(found: dict[str, Any]) -> Figure:
    # Rules may have been mended after that.
    shown = found.get("first_look", found["all"])
    codes, macro = shown["by_code"], shown["macro"]
    names = [code for code, row in codes.items() if row["due"] or row["false_alarms"]]
    names.sort(key=lambda code: sum(_shares(codes[code]).values()))
    figure = new_figure(
        f"{100 * macro['precision']:.0f} % of the findings are true, and "
        f"{100 * macro['recall']:.0f} % of those that are due are found",
        6.2,
    )
    ax = figure.subplots()
    ax.axvline(NEEDED, color="black", linewidth=0.8, linestyle=":", zorder=0)
    for place, code in enumerate(names):
        shares = _shares(codes[code])
        ax.plot(list(shares.values()), [place] * 2, color=PALE, linewidth=3, zorder=1)
        ax.plot(shares["recall"], place, "s", color=ORANGE, markersize=8)
        ax.plot(shares["precision"], place, "o", color=BLUE, markersize=6)
    ax.set_yticks(range(len(names)), [_words(code, codes[code]) for code in names])
    ax.set_xlim(0, 1.03)
    ticks = (0, 0.2, 0.4, 0.6, 0.8, 1)
    ax.set_xticks(ticks, [f"{100 * x:.0f} %" for x in ticks])
    tidy(ax)
    handles = [
        ax.plot([], [], "o", color=BLUE, label="precision: how many were true")[0],
        ax.plot([], [], "s", color=ORANGE, label="recall: how many were found")[0],
        ax.plot([], [], ":", color="black", label="precision that a finding needs")[0],
    ]
    what = "Means count each finding alike"
    if "first_look" in found:
        what += ". Rules as they were at the first look; some were mended since"
    key_below(figure, handles, what, 3)
    return figure


def _shares(row: dict[str, Any]) -> dict[str, float]:
    found = {name: float(row[name]) for name in ("precision", "recall")}
    return {name: 0.0 if math.isnan(x) else x for name, x in found.items()}


def _words(code: str, row: dict[str, Any]) -> str:
    alarms = row["false_alarms"]
    wrong = f", {alarms} false" if alarms else ""
    words = code.replace("_", " ").capitalize()
    return f"{words} ({row['found']} of {row['due']}{wrong})"
