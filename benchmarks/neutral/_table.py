"""The table in Markdown, and the figure."""

import json
import pathlib
import re
from typing import Any

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
from benchmarks.pictures import draw

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


def summary_of(table: Table, cells: Cells) -> dict[str, Any]:
    """Each measure of each contender: mean, ends of its interval, and by task.

    Of the main ones also how far they are above the fixed clip's, paired.
    """
    found = {}
    for name, measures in table.measures.items():
        found[name] = {
            m: [table.seen(name, m), *table.interval(name, m)] for m in measures
        }
        for m in MAIN:
            gain = table.seen(name, m) - table.seen(REFERENCE, m)
            ends = table.interval(name, m, REFERENCE)
            found[name][f"{m} above the fixed clip"] = [gain, *ends]
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
    draw("neutral", folder / "neutral.json")
