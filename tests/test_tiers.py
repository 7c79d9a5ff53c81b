"""The tiers of tests: which ones are left to `make test-all` and to `make soak`."""

import itertools
from pathlib import Path

import pytest

from tests.tiers import FULL, SOAK, all_pairs, tier_of

TESTS = Path(__file__).parent


@pytest.mark.parametrize("tier", [FULL, SOAK], ids=["full", "soak"])
def test_every_entry_of_a_tier_is_there(tier):
    sources = {path.stem: path.read_text("utf-8") for path in TESTS.rglob("test_*.py")}
    for stem, names in tier.items():
        source = sources[stem]
        for name in names or ():
            test = name.partition("[")[0]
            assert f"def {test}(" in source or f'"{name}"' in source, (stem, name)


def test_a_test_is_of_a_tier_by_its_file_its_name_or_its_case():
    assert tier_of("test_soak", "test_any", None) == "full"
    assert tier_of("test_threshold", "test_any", "quantile forgets") == "full"
    assert tier_of(
        "test_stop_conformance", "test_stops_where_the_other_system_does"
    ) == ("soak")
    assert tier_of("test_threshold", "test_any", "zscore") is None
    assert tier_of("test_rooms", "test_any", None) is None


@pytest.mark.parametrize("sizes", [(4, 5, 2), (4, 5, 2, 4), (3, 3, 3), (2, 7), (1, 1)])
def test_a_cover_holds_every_pair_in_few_rows(sizes):
    axes = [[f"{axis}{i}" for i in range(size)] for axis, size in enumerate(sizes)]
    rows = all_pairs(*axes)
    assert rows == all_pairs(*axes)
    *_, second, first = [1, *sorted(sizes)]
    assert first * second <= len(set(rows)) == len(rows) <= 1.5 * first * second
    assert set(rows) <= set(itertools.product(*axes))
    for first, second in itertools.combinations(range(len(axes)), 2):
        held = {(row[first], row[second]) for row in rows}
        assert held == set(itertools.product(axes[first], axes[second]))
