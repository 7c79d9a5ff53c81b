"""What each stop rule costs, and how good the parameters are that it hands back."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures._style import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    PINK,
    RED,
    key_below,
    new_figure,
)

# A family of rules, its words, its colour and mark.
FAMILIES = {
    "patience": ("patience", BLUE, "o"),
    "lag": ("lag", PINK, "v"),
    "GL": ("Prechelt's GL", ORANGE, "s"),
    "UP": ("Prechelt's UP", RED, "^"),
    "PQ": ("Prechelt's PQ", GREEN, "D"),
}
# A task: the score that is drawn, and its words.
TASKS = {
    "digits": ("test_error", "digits: images wrong"),
    "characters": ("test_loss", "characters: loss"),
}
# A measure of a rule, and what is handed back.
MEASURES = {
    "percent_above_oracle": "the best by validation",
    "last_percent_above_oracle": "the last",
}
TOLD = 1, 2, 3, 5, 10, 20


def figure_of(found: dict[str, Any]) -> Figure:
    figure = new_figure(
        "Where the best parameters are kept, a patient stop rule costs evaluations "
        "and nothing else",
        6.6,
    )
    axes = figure.subplots(2, 2, sharex=True)
    for i, (task, (score, title)) in enumerate(TASKS.items()):
        results = found["results"][task][score]
        for j, (measure, what) in enumerate(MEASURES.items()):
            _draw(axes[j, i], results, measure)
            axes[j, i].set_title(f"{title}, handed back: {what}")
    for ax in axes[:, 0]:
        ax.set_ylabel("% above the least\nof the same run")
    first = axes[0, 0]
    handles = [
        first.plot([], [], color=color, marker=mark, label=words)[0]
        for words, color, mark in FAMILIES.values()
    ]
    handles += [
        first.plot([], [], "o", color="0.6", markersize=3, label="smoothed first")[0],
        first.plot([], [], color="0.5", linestyle=":", label="best evaluation")[0],
    ]
    what = "Along x: evaluations used, mean over seeds. Numbers: the patience"
    key_below(figure, handles, what, 4)
    return figure


def _draw(ax: Any, results: dict[str, Any], measure: str) -> None:
    rules = results["rules"]
    for family, (_, color, mark) in FAMILIES.items():
        mine = sorted(
            (row["evaluations"][0], row[measure][0], row["number"])
            for row in rules
            if row["family"] == family and row["smoothed"] == "raw"
        )
        x, y, _ = zip(*mine, strict=True)
        ax.plot(x, y, color=color, marker=mark, markersize=4, linewidth=1)
        if family == "patience" and measure == next(iter(MEASURES)):
            for at_x, at_y, number in (x for x in mine if x[2] in TOLD):
                ax.annotate(
                    f"{number}",
                    (at_x, at_y),
                    xytext=(3, 6),
                    textcoords="offset points",
                    color=color,
                    fontweight="bold",
                )
    smoothed = [row for row in rules if row["smoothed"] != "raw"]
    ax.plot(
        [row["evaluations"][0] for row in smoothed],
        [row[measure][0] for row in smoothed],
        "o",
        color="0.6",
        markersize=2.5,
        zorder=1,
    )
    ax.axvline(results["oracle_at_evaluation"][0], color="0.5", linestyle=":")
    ax.set_xscale("log")
    ticks = (10, 20, 30, 50, 100, 150)
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set_ylim(0)
    ax.grid(color=PALE, linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
