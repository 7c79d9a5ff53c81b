"""The measures of the plan, and their intervals."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.neutral._tasks import TASKS

REPLICATES = 10_000
TRAINS, NEAR = 0.5, 0.95
SEARCHES = 12, 4, 52


class Cell(NamedTuple):
    """A contender on a task: progress [setting, rate, seed], tuning and test seeds."""

    tuning: np.ndarray
    test: np.ndarray
    decades: float  # Of learning rates that each rate stands for.


# By contender, then by task.
Cells = dict[str, dict[str, Cell]]


def read(folder: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of scores, and lines about the machines."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("neutral_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [x for x in lines if "task" in x], [x for x in lines if "task" not in x]


def cells_of(lines: list[dict[str, Any]]) -> dict[tuple[str, int], Cells]:
    """Progress, by optimizer and number of steps."""
    found: dict[tuple[str, int], Cells] = {}
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for line in lines:
        key = line["optimizer"], line["steps"], line["task"]
        groups.setdefault(key, []).append(line)
    for (optimizer, steps, task), group in groups.items():
        scores = [np.array(line["scores"], float) for line in group]
        first = group[0]["tuning_seeds"]
        trivial = group[0]["trivial"]
        lowest = min(np.nanmin(x[..., first:].mean(-1)) for x in scores)
        by_contender = found.setdefault((optimizer, steps), {})
        for line, score in zip(group, scores, strict=True):
            progress = (trivial - score) / (trivial - lowest)
            # A NaN fails the comparison.
            progress = np.where(progress > 0, progress, 0.0)
            rates = np.log10(line["rates"])
            cell = Cell(
                tuning=progress[..., :first],
                test=progress[..., first:],
                decades=float(rates[1] - rates[0]),
            )
            by_contender.setdefault(line["contender"], {})[task] = cell
    return found


def searched(cell: Cell, tries: int) -> np.ndarray:
    """Test progress by seed, expected after a random search of so many tries.

    Of n configurations in order, best first, the r-th, from 0 on, is the best of k that
    are drawn in C(n - 1 - r, k - 1) of C(n, k) cases.
    """
    mean = cell.tuning.mean(-1).ravel()
    test = cell.test.reshape(mean.size, -1)[np.argsort(-mean, kind="stable")]
    tries = min(tries, mean.size)
    chances = [math.comb(mean.size - 1 - r, tries - 1) for r in range(mean.size)]
    return np.array(chances, float) @ test / math.comb(mean.size, tries)


def trains(cell: Cell, setting: int) -> np.ndarray:
    """Decades at which it trains, by seed."""
    return (cell.test[setting] >= TRAINS).sum(0) * cell.decades


def best_setting(cell: Cell) -> int:
    return int(cell.tuning.mean(-1).max(1).argmax())


def by_seed(cell: Cell) -> dict[str, np.ndarray]:
    """Each measure that is a mean over seeds."""
    found = {f"tuned {k}": searched(cell, k) for k in SEARCHES}
    return found | {
        "width": trains(cell, 0),
        "width, tuned": trains(cell, best_setting(cell)),
        "untuned": cell.test[0].mean(0),
    }


class Bootstrap(NamedTuple):
    """Draws of tasks [replicate, task], and how often each seed counts in them.

    Weights are [replicate, task, seed], and sum to 1 over seeds. The first replicate is
    what was seen.
    """

    tasks: np.ndarray
    weights: np.ndarray


def draw(num_tasks: int, num_seeds: int, replicates: int = REPLICATES) -> Bootstrap:
    rng = np.random.default_rng(24)
    tasks = rng.integers(0, num_tasks, (replicates, num_tasks))
    share = np.full(num_seeds, 1 / num_seeds)
    weights = rng.multinomial(num_seeds, share, (replicates, num_tasks)) / num_seeds
    tasks[0], weights[0] = np.arange(num_tasks), share
    return Bootstrap(tasks, weights)


def replicate(cells: dict[str, Cell], names: list[str], draws: Bootstrap) -> Any:
    """Each measure of a contender, in each replicate."""
    measures = [by_seed(cells[name]) for name in names]
    found = {}
    for key in measures[0]:
        values = np.array([each[key] for each in measures])
        found[key] = (values[draws.tasks] * draws.weights).sum(-1).mean(-1)
    near = np.zeros(draws.tasks.shape)
    for i, name in enumerate(names):
        at = draws.tasks == i
        mean = draws.weights[at] @ cells[name].test[0].T
        # Rounding apart, a mean of progress that is all the same is itself.
        near[at] = (mean >= NEAR - 1e-9).sum(-1) * cells[name].decades
    return found | {"near": near.mean(-1)}


class Table(NamedTuple):
    """Measures by contender and name; each is [replicate], the first what was seen."""

    tasks: list[str]
    measures: dict[str, dict[str, np.ndarray]]

    def seen(self, contender: str, measure: str) -> float:
        return float(self.measures[contender][measure][0])

    def interval(
        self, contender: str, measure: str, other: str | None = None
    ) -> tuple[float, float]:
        """Of 95 %: of a measure, or of how far it is above another contender's."""
        values = self.measures[contender][measure]
        if other is not None:
            values = values - self.measures[other][measure]
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return float(low), float(high)

    def winner(self, measure: str) -> str:
        return max(self.measures, key=lambda name: self.seen(name, measure))

    def is_not_told_apart(self, contender: str, measure: str) -> bool:
        """From the winner."""
        low, high = self.interval(contender, measure, self.winner(measure))
        return low <= 0 <= high


def tabulate(cells: Cells) -> Table:
    """All measures of those contenders that ran on all tasks."""
    tasks = [task for task in TASKS if any(task in of for of in cells.values())]
    complete = {name: of for name, of in cells.items() if set(of) == set(tasks)}
    num_seeds = next(iter(next(iter(complete.values())).values())).test.shape[-1]
    draws = draw(len(tasks), num_seeds)
    return Table(
        tasks, {name: replicate(of, tasks, draws) for name, of in complete.items()}
    )
