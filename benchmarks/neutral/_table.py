"""The table in Markdown, and the figure."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from benchmarks._results import as_json
from benchmarks.neutral._analysis import (
    Cells,
    Table,
    cells_of,
    read,
    searched,
    tabulate,
    trains,
)
from benchmarks.neutral._contenders import SECOND
from benchmarks.neutral._tasks import TASKS

REFERENCE = "fixed clip"
OURS = "ours, by leaf", "ours, by tree"
MAIN = "tuned 12", "width"
HEADS = {
    "tuned 12": "tuned, 12 tries",
    "tuned 4": "4",
    "tuned 52": "52",
    "width": "width",
    "width, tuned": "width, tuned",
    "near": "near",
    "untuned": "untuned",
}


def rows_of(table: Table) -> list[str]:
    """Markdown; a star marks what is not told apart from the best of its column."""
    heads = [*HEADS.values(), "tuned, 12: above the fixed clip", "width: above it"]
    rows = ["| contender | " + " | ".join(heads) + " |", "|---" + "|---:" * 9 + "|"]
    for name in sorted(table.measures, key=lambda n: -table.seen(n, "tuned 12")):
        cells = [name]
        for measure in HEADS:
            star = "*" if table.is_not_told_apart(name, measure) else ""
            cells.append(f"{table.seen(name, measure):.2f}{star}")
        for measure in MAIN:
            low, high = table.interval(name, measure, REFERENCE)
            gain = table.seen(name, measure) - table.seen(REFERENCE, measure)
            same = name == REFERENCE
            cells.append("" if same else f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def by_task(cells: Cells) -> list[str]:
    """Markdown: for each task the progress after 12 tries, and the width."""
    tasks = [task for task in TASKS if any(task in of for of in cells.values())]
    rows = ["| contender | " + " | ".join(tasks) + " |", "|---" + "|---:" * len(tasks)]
    rows[1] += "|"
    for name, of in cells.items():
        found = [
            f"{searched(of[t], 12).mean():.2f}, {trains(of[t], 0).mean():.2f}"
            if t in of
            else ""
            for t in tasks
        ]
        rows.append("| " + " | ".join([name, *found]) + " |")
    return rows


def main_comparisons(heading: str, table: Table) -> list[str]:
    """Those of the round that the contenders tell."""
    is_first = not set(SECOND) <= set(table.measures)
    pairs = [(name, REFERENCE) for name in (OURS if is_first else SECOND)]
    if not is_first:
        pairs += [(name, OURS[0]) for name in SECOND]
    rows = []
    for name, other in pairs:
        for measure in MAIN:
            low, high = table.interval(name, measure, other)
            gain = table.seen(name, measure) - table.seen(other, measure)
            told = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            rows.append(
                f"* {heading}, {name} above {other}, {measure}: {gain:+.3f} "
                f"[{low:+.3f}, {high:+.3f}], {told}"
            )
    return rows


def plot(tables: dict[tuple[str, int], Table], steps: int, path: pathlib.Path) -> None:
    """The main measures, above the fixed clip's; a column for each optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.3, 7), layout="constrained")
    optimizers = [name for name, length in tables if length == steps]
    axes: Any = figure.subplots(2, len(optimizers), squeeze=False)
    for j, optimizer in enumerate(optimizers):
        table = tables[optimizer, steps]
        names = sorted(table.measures, key=lambda n: table.seen(n, "tuned 12"))
        for i, measure in enumerate(MAIN):
            ax = axes[i, j]
            base = table.seen(REFERENCE, measure)
            seen = np.array([table.seen(name, measure) for name in names]) - base
            ends = [table.interval(name, measure, REFERENCE) for name in names]
            low, high = np.array(ends).T
            colors = ["C3" if name.startswith("ours") else "C0" for name in names]
            ax.hlines(range(len(names)), low, high, colors, linewidth=2)
            ax.axvline(0, color="black", linewidth=0.8)
            ax.scatter(seen, range(len(names)), c=colors, s=25, zorder=3)
            ax.set_yticks(range(len(names)), names, fontsize=9)
            ax.grid(axis="x", alpha=0.4)
            what = ("progress after 12 tries", "decades that train")[i]
            ax.set_xlabel(f"{what}, above the fixed clip's {base:.2f}", fontsize=9)
            if i == 0:
                ax.set_title(f"{optimizer}, {steps} steps")
    figure.savefig(path, dpi=130)


def summary_of(table: Table, cells: Cells) -> dict[str, Any]:
    """Each measure of each contender: mean, ends of its interval, and by task."""
    found = {}
    for name, measures in table.measures.items():
        found[name] = {
            m: [table.seen(name, m), *table.interval(name, m)] for m in measures
        }
        of = cells[name]
        found[name]["tuned 12 by task"] = [
            float(searched(of[t], 12).mean()) for t in table.tasks
        ]
        found[name]["width by task"] = [
            float(trains(of[t], 0).mean()) for t in table.tasks
        ]
    return {"tasks": table.tasks, "contenders": found}


def make_table(folder: pathlib.Path) -> None:
    """Prints all tables, writes them as JSON, draws the figure of the shortest runs."""
    lines, machines = read(folder)
    cells = cells_of(lines)
    tables = {key: tabulate(of) for key, of in sorted(cells.items(), reverse=True)}
    for machine in machines:
        print(machine)
    steps = min(length for _, length in tables)
    print("\nMain comparisons\n")
    for (optimizer, length), table in tables.items():
        heading = f"{optimizer}, {length} steps"
        print("\n".join(main_comparisons(heading, table)))
    for (optimizer, length), table in tables.items():
        print(f"\n{optimizer}, {length} steps, {', '.join(table.tasks)}\n")
        print("\n".join(rows_of(table)))
        print("\nBy task: progress after 12 tries, width\n")
        print("\n".join(by_task(cells[optimizer, length])))
    summaries = {
        f"{optimizer}, {length} steps": summary_of(table, cells[optimizer, length])
        for (optimizer, length), table in tables.items()
    }
    content = {"machines": machines, "tables": summaries}
    text = json.dumps(as_json(content), indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m.group().split()), text)
    (folder / "neutral.json").write_text(text + "\n")
    plot(tables, steps, folder / "neutral.png")
