"""Anybody's log: what is read of the logs in `data/logs`, and what is found in them."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from optax_guard._records.readers import read_log
from optax_guard.analysis import History, diagnose

LOGS = Path(__file__).parent / "data" / "logs"
INDEX: dict[str, dict[str, Any]] = json.loads((LOGS / "index.json").read_text("utf-8"))
# Logs whose findings the rules do not get right yet.
UNMET: set[str] = set()


def read(name: str) -> tuple[History, list[str]]:
    """A log, and the warnings about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = History.read(LOGS / name, **INDEX[name].get("read", {}))
    return history, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", INDEX)
def test_log_is_read_whole(name):
    log = INDEX[name]
    if "tensorboard/logs" in name:
        pytest.importorskip("tensorboardX")
    if "error" in log:
        with pytest.raises(ValueError, match=log["error"]):
            read(name)
        return
    history, warned = read(name)
    how = {k: x for k, x in log.get("read", {}).items() if k != "max_norm"}
    found = read_log(LOGS / name, **how)
    assert found.format == log["format"]
    assert found.sources == log["columns"]
    steps = [row["step"] for row in history]
    assert [len(steps), steps[0], steps[-1]] == log["steps"]
    assert steps == sorted(set(steps))
    for column, (count, last) in log["series"].items():
        values = [row[column] for row in history if column in row]
        assert len(values) == count, column
        wanted = math.nan if last == "nan" else last
        assert values[-1] == pytest.approx(wanted, rel=1e-6, nan_ok=True), column
    if "warning" not in log:
        assert warned == []
    else:
        [warning] = warned
        assert warning.startswith(str(LOGS / name))
        assert re.search(log["warning"], warning)


def is_met(name: str) -> bool:
    history, _ = read(name)
    findings = diagnose(history)
    found = {str(f.code) for f in findings} | {f.severity.upper() for f in findings}
    must, must_not = INDEX[name]["must"], INDEX[name]["must_not"]
    is_due = all(found & set(one.split("|")) for one in must)
    return is_due and not found & set(must_not)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.xfail(strict=True) if name in UNMET else ()
        )
        for name, log in INDEX.items()
        if "error" not in log
    ],
)
def test_findings_that_are_due_and_no_others(name):
    if "tensorboard/logs" in name:
        pytest.importorskip("tensorboardX")
    assert is_met(name)
