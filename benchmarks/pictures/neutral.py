"""The gain of each rule on a fixed clip: after a search, and in rates that train."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures._style import BLUE, GREY, RED, key_below, new_figure, tidy

# A measure, and what it says.
MEASURES = {
    "tuned 12": "progress after 12 tries",
    "width": "decades of rates that train",
}
NAMES = {"unclipped": "no clip", "ours, by leaf": "our bound, by leaf"}
NAMES |= {"ours, by tree": "our bound, by tree", "fixed clip": "a fixed clip"}


def figure_of(found: dict[str, Any]) -> Figure:
    shortest = min(int(key.split()[1]) for key in found["tables"])
    tables = {k: x for k, x in found["tables"].items() if f" {shortest} " in k}
    figure = new_figure(
        "After 12 tries no rule is clearly the best; only a bound on the update lets "
        "one be wrong about the learning rate",
        6.6,
    )
    axes = figure.subplots(len(MEASURES), len(tables), squeeze=False)
    for j, (setting, table) in enumerate(tables.items()):
        rules = table["contenders"]
        names = sorted(rules, key=lambda name: rules[name]["tuned 12"][0])
        for i, (measure, what) in enumerate(MEASURES.items()):
            base = rules["fixed clip"][measure][0]
            gains = [rules[name][f"{measure} above the fixed clip"] for name in names]
            _draw(axes[i, j], gains)
            axes[i, j].set_yticks(range(len(names)), [NAMES.get(x, x) for x in names])
            title = f"{setting.split(',')[0]}: {what}\n(with a fixed clip: {base:.2f})"
            axes[i, j].set_title(title)
    first = axes[0, 0]
    handles = [
        first.plot([], [], "o-", color=color, label=label)[0]
        for color, label in (
            (BLUE, "better than a fixed clip"),
            (GREY, "not told apart"),
            (RED, "worse"),
        )
    ]
    what = (
        f"Along x: gain on a fixed clip after {shortest} steps, with its interval of "
        "95 % (over tasks and seeds)"
    )
    key_below(figure, handles, what, 3)
    return figure


def _draw(ax: Any, gains: list[list[float]]) -> None:
    for place, (gain, low, high) in enumerate(gains):
        color = BLUE if low > 0 else RED if high < 0 else GREY
        ax.plot([low, high], [place] * 2, color=color, linewidth=2)
        ax.plot(gain, place, "o", color=color, markersize=5)
    ax.axvline(0, color="black", linewidth=0.8, zorder=0)
    tidy(ax)
