"""The time of a step against its size: a panel for each number of leaves."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures._style import (
    BLUE,
    GREEN,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    key_below,
    new_figure,
)

# A variant, its words, its colour and mark.
VARIANTS = {
    "optax apply_if_finite(clip)": ("optax.apply_if_finite of a clip", RED, "^"),
    "optax clip": ("optax.clip_by_global_norm", ORANGE, "s"),
    "guard(clip_by_value), apply_gradients": ("guard(clip_by_value)", GREEN, "D"),
    "guard, apply_gradients": ("guard(clip=1.0)", BLUE, "o"),
    "guard(max_update), apply_gradients": ("guard(max_update=...)", PINK, "P"),
    "clip_by_global_norm": ("og.clip_by_global_norm", SKY, "v"),
    "written by hand": ("by hand, no statistics", "0.6", "x"),
}
TITLE = "On a CPU Optax's clip takes twice the time of AdamW alone, ours a fifth more"


def figure_of(found: dict[str, Any]) -> Figure:
    rows = [
        row
        for row in found["rows"]
        if (row["optimizer"], row["dtype"]) == ("adamw", "float32")
    ]
    # Variants measured before a guard looked for entries that would not be finite.
    old = found.get("before_the_finite_law", ())
    counts = sorted({row["leaves"] for row in rows})
    figure = new_figure(TITLE, 4.4)
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    handles = {}
    for ax, leaves in zip(axes, counts, strict=True):
        mine = [row for row in rows if row["leaves"] == leaves]
        for variant, (words, color, mark) in VARIANTS.items():
            line = sorted(
                (row["params"] / 1e6, row["ratio"], *row["quartiles"])
                for row in mine
                if row["variant"] == variant
            )
            if not line:
                continue
            size, ratio, low, high = zip(*line, strict=True)
            ax.fill_between(size, low, high, color=color, alpha=0.12, linewidth=0)
            (handles[words],) = ax.plot(
                size,
                ratio,
                color=color,
                marker=mark,
                markersize=5,
                linestyle="--" if variant in old else "-",
                alpha=0.5 if variant in old else 1.0,
                label=f"{words} (before)" if variant in old else words,
            )
        ax.axhline(mine[0]["floor"], color="black", linewidth=0.8, linestyle=":")
        ax.set_title(f"{leaves} leaves")
        ax.set_xscale("log")
        sizes = sorted({row["params"] / 1e6 for row in mine})
        ax.set_xticks(sizes, [f"{x:g}M" for x in sizes])
        ax.minorticks_off()
        ax.set_ylim(0.8, None)
        ax.grid(axis="y", color=PALE, linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time of a step, plain AdamW = 1")
    what = (
        "Along x: parameters. Median and quartiles. Dotted: one more read of gradients"
    )
    if old:
        what += (
            "\nBefore: without the finite law. With it a guard takes more; see the text"
        )
    key_below(figure, list(handles.values()), what, 3)
    return figure
