"""How far each fault throws the loss: a panel a fault, a row a kind of protection."""

import math
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures._style import BLUE, ORANGE, RED, key_below, new_figure, tidy

# Kinds of protection, and the contenders of each.
KINDS = {
    "no protection": ["unguarded"],
    "Optax's clip": ["optax clip"],
    "apply_if_finite": ["apply_if_finite"],
    "apply_if_finite of the clip": ["apply_if_finite(clip)"],
    "ZClip": ["ZClip"],
    "OLMo, MaxText, levanter": ["OLMo", "MaxText", "levanter"],
    "guard: fixed clip": ["guard(clip=1)"],
    "guard: clips that adapt": [
        "guard(zscore)",
        "guard(quantile)",
        "guard(relative)",
        "guard(adagc)",
    ],
    "guard: clip and spike()": ["guard(clip=1, spike)"],
    "guard: clip; fit rewinds": ["guard(clip=1), rewind"],
    "guard: both; fit rewinds": ["guard(clip=1, spike), rewind"],
}
FAULTS = {
    "NaN": "1 batch of NaN",
    "loss x 1e4": "1 loss 10,000 times\nas large",
    "loss x 1e30": "1 loss 1e30 times\nas large",
    "inputs x 1e3": "inputs of 1 batch\ntimes 1,000",
    "8 shuffled": "wrong labels in\n8 batches",
    "32 shuffled": "wrong labels in\n32 batches",
    "100 shuffled": "wrong labels in\n100 batches",
    "loss x 5 for good": "loss 5 times as large\nfrom then on",
}
LEAST, LOST = 0.004, 12.0


def figure_of(found: dict[str, Any]) -> Figure:
    figure = new_figure(
        "Every guard shrugs off a single bad batch; of 100 plausible ones in a row "
        "only a rewind cures",
        6.4,
    )
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    kinds = {
        kind: [name for name in names if name in found["results"]]
        for kind, names in KINDS.items()
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    for ax, (fault, title) in zip(axes.ravel(), FAULTS.items(), strict=True):
        for i, names in enumerate(kinds.values()):
            for name in names:
                _mark(ax, i, found["results"][name][fault])
        ax.set_title(title)
        ax.set_xscale("log")
        ax.set_xlim(LEAST / 1.4, LOST * 1.6)
        ax.set_xticks([0.01, 0.1, 1, LOST], ["0.01", "0.1", "1", "lost"])
        ax.minorticks_off()
        ax.set_yticks(range(len(kinds)), list(kinds))
        ax.set_ylim(len(kinds) - 0.4, -0.6)
        tidy(ax)
        for i, kind in enumerate(kinds):
            if kind.startswith("guard"):
                ax.axhspan(i - 0.5, i + 0.5, color=BLUE, alpha=0.07, linewidth=0)
    first = axes[0, 0]
    handles = [
        first.plot([], [], "o", color=BLUE, label="recovers within 300 steps")[0],
        first.plot([], [], "o", color=ORANGE, label="does not recover")[0],
        first.plot([], [], "X", color=RED, label="lost: parameters are NaN")[0],
    ]
    what = (
        "Along x: how far the held-out loss rises above the run without fault, at most "
        "[nats]; median and range of seeds"
    )
    key_below(figure, handles, what, 3)
    return figure


def _mark(ax: Any, place: int, cell: dict[str, Any]) -> None:
    """The median of the seeds, and their range."""
    rises = [float(x) for x in cell["peak_excursion"]]
    if not median(cell["finite_params"]):
        ax.plot(LOST, place, "X", color=RED, markersize=7)
        return
    recovers = math.isfinite(median(float(x) for x in cell["steps_to_recover"]))
    color = BLUE if recovers else ORANGE
    shown = [min(max(x, LEAST), LOST / 1.8) for x in rises]
    ax.plot([min(shown), max(shown)], [place] * 2, color=color, alpha=0.35, linewidth=2)
    ax.plot(median(shown), place, "o", color=color, markersize=5)
