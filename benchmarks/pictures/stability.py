"""Over how many learning rates each contender trains: the summary, then by setting."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pictures._style import BLUE, GREY, new_figure, tidy

NAMES = {
    "unclipped": "no clip",
    **{f"optax {x}": f"Optax's clip at {x}" for x in ("0.1", "0.3", "1", "3", "10")},
    "suggested": "suggest_max_norm, at that rate",
    "suggested at lowest": "suggest_max_norm, at the lowest",
    **{f"leaf {x}": f"clip_by_leaf_norm({x})" for x in ("0.1", "1", "10")},
    "zscore": "zscore()",
    "zscore, leaf": "zscore(), by leaf",
    "quantile": "quantile(0.9)",
    "quantile, leaf": "quantile(0.9), by leaf",
    "relative": "relative_to_mean()",
    "relative, leaf": "relative_to_mean(), by leaf",
}
MODELS = {
    "transformer": "trans-\nformer",
    "MLP 2": "2 deep",
    "MLP 8": "8 deep",
    "MLP 32": "32 deep",
}
MEASURES = {
    "mean_width": "decades of\nrates that train",
    "mean_regret_at_best_rate": "loss above the\nbest [nats]",
}


def figure_of(found: dict[str, Any]) -> Figure:
    summary = found["summary"]
    names = list(next(iter(summary.values())))
    figure = new_figure(
        "With SGD a tight clip more than doubles the range of learning rates that "
        "train; with Adam it changes little",
        8.6,
    )
    labels: Any = [NAMES.get(name, name) for name in names]
    axes = figure.subplot_mosaic([list("abcd"), list("eeee")], height_ratios=[1, 1.1])
    for i, (optimizer, rows) in enumerate(summary.items()):
        for ax, (key, what) in zip(("ac"[i], "bd"[i]), MEASURES.items(), strict=True):
            _bars(axes[ax], [rows[n][key] for n in names], f"{optimizer}: {what}")
            axes[ax].set_yticks([])
    axes["a"].set_yticks(range(len(names)), labels)
    _by_setting(axes["e"], found["results"], names)
    return figure


def _bars(ax: Any, values: list[float], title: str) -> None:
    places = range(len(values))
    ax.barh(places, values, color=[GREY, *[BLUE] * (len(values) - 1)], height=0.7)
    most = max(values)
    for place, value in zip(places, values, strict=True):
        ax.text(value + 0.02 * most, place, f"{value:.2f}", va="center", fontsize=8)
    ax.set_xlim(0, 1.3 * most)
    ax.set_xticks([])
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_title(title)
    tidy(ax)


def _by_setting(ax: Any, results: dict[str, Any], names: list[str]) -> None:
    """The widths with SGD: a row a contender, a column a model and initial scale."""
    cells = {key: row["contenders"] for key, row in results.items() if ", SGD," in key}
    widths = np.array(
        [[cell[name]["width"] for cell in cells.values()] for name in names]
    )
    ax.imshow(widths, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (i, j), width in np.ndenumerate(widths):
        color = "white" if width > 1 else "black" if width else "0.6"
        ax.text(j, i, f"{width:.1f}", ha="center", va="center", color=color, fontsize=8)
    ax.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    ax.set_xticks(range(len(cells)), [_setting(key) for key in cells], fontsize=8)
    ax.set_title(
        "SGD: decades of learning rates that train, by model (perceptrons by depth "
        "and initial scale)"
    )
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)


def _setting(key: str) -> str:
    model, _, scale = key.split(", ")
    if not model.startswith("MLP"):
        return MODELS.get(model, model)
    return f"{MODELS[model]}\ninit x {scale.removeprefix('scale ')}"
