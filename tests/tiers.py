"""The tests that `make test` leaves to `make test-all`: they bear the mark `full`."""

import itertools
from collections.abc import Iterable
from typing import Any

# A file maps to those of its tests, or of its cases by `name`, that cost more than they
# catch; None stands for all of its tests.
FULL: dict[str, set[str] | None] = {
    # Studies, and the arithmetic of benchmarks.
    "test_bad_batches": None,
    "test_generalization": None,
    "test_scale_out": None,
    "test_stability": None,
    "test_step_cost": None,
    # Whole programs: each one trains, compiles for an accelerator or starts processes.
    "test_contract": None,
    "test_demo": None,
    "test_faults": None,
    "test_notebooks": None,
    "test_packaging": None,
    "test_readme": None,
    "test_soak": None,
    # Rules that differ in one setting from one that `make test` runs.
    "test_threshold": {"quantile forgets", "quantile with current"},
}


def is_full(stem: str, *names: object) -> bool:
    """Whether a test in that file, with these names, belongs to the full tier only."""
    listed = FULL.get(stem, set())
    return listed is None or any(name in listed for name in names)


def all_pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """A few rows of the product that hold every pair of values of two axes.

    Each row is the one that adds the most pairs, and the first of these in the order of
    the product: the rows are the same in every run.
    """
    rows = {
        row: set(itertools.combinations(enumerate(row), 2))
        for row in itertools.product(*axes)
    }
    missing, chosen = set().union(*rows.values()), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(rows[row] & missing)))
        missing -= rows[chosen[-1]]
    return chosen
