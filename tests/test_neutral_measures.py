"""The measures of the neutral benchmark: searches, widths, paired intervals."""

import itertools

import numpy as np
import pytest

from benchmarks.neutral import _analysis
from benchmarks.neutral._analysis import Cell
from benchmarks.neutral._tasks import TASKS


def cell(tuning, test, decades=0.5):
    return Cell(np.array(tuning, float), np.array(test, float), decades)


def test_search_is_the_mean_over_all_searches():
    rng = np.random.default_rng(0)
    c = cell(rng.random((2, 3, 4)), rng.random((2, 3, 5)))
    tuning, test = c.tuning.mean(-1).ravel(), c.test.reshape(6, 5)
    for tries in (1, 3, 6):
        draws = itertools.combinations(range(6), tries)
        picked = [test[max(d, key=lambda i: tuning[i])] for d in draws]
        np.testing.assert_allclose(
            _analysis.searched(c, tries), np.mean(picked, axis=0), rtol=1e-12
        )


def test_widths_count_decades_and_progress_counts_from_nothing():
    lines = [
        {
            "task": "RNN",
            "contender": name,
            "optimizer": "SGD",
            "steps": 200,
            "trivial": 3.0,
            "tuning_seeds": 1,
            "rates": [0.01, 0.1, 1.0],
            "scores": scores,
        }
        for name, scores in {
            # Setting, rate, seed: one for tuning, two for the test; the best is 1.0.
            "a": [[[2.0, 1.0, 1.0], [3.0, 1.5, 2.5], [9.0, 9.0, None]]],
            "b": [[[2.0, 1.1, 1.3], [3.0, 2.0, 2.0], [9.0, 5.0, 3.0]]],
        }.items()
    ]
    cells = _analysis.cells_of(lines)["SGD", 200]
    np.testing.assert_allclose(
        cells["a"]["RNN"].test[0], [[1, 1], [0.75, 0.25], [0, 0]]
    )
    np.testing.assert_allclose(cells["a"]["RNN"].tuning[0, :, 0], [0.5, 0, 0])
    assert _analysis.trains(cells["a"]["RNN"], 0).tolist() == [2.0, 1.0]
    assert _analysis.trains(cells["b"]["RNN"], 0).tolist() == [2.0, 2.0]
    table = _analysis.tabulate(cells)
    assert table.seen("a", "width") == pytest.approx(1.5)
    assert table.seen("a", "near") == 1.0  # Where the mean is 1; b's is 0.9.
    assert table.seen("b", "near") == 0.0
    assert table.seen("a", "untuned") == pytest.approx(0.5)
    assert table.winner("width") == "b"


def test_bootstrap_is_paired_and_draws_tasks_and_seeds():
    rng = np.random.default_rng(0)
    base = rng.random((3, 1, 4, 12))
    cells = {
        "a": {task: cell(x, x) for task, x in zip(TASKS, base, strict=False)},
        "b": {task: cell(x, x + 0.1) for task, x in zip(TASKS, base, strict=False)},
    }
    table = _analysis.tabulate(cells)
    # Seeds and tasks differ a lot, but b is 0.1 above a in each.
    low, high = table.interval("b", "untuned", "a")
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    values = table.measures["a"]["untuned"]
    means = base[:, 0].mean(1)  # By task and seed.
    assert values[0] == pytest.approx(means.mean())
    within = means.var(1).mean() / 12 / 3
    between = means.mean(1).var() / 3
    assert values[1:].var() == pytest.approx(within + between, rel=0.1)
