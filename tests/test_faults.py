"""Faults end to end: each run ends healthy, or in a clear error with nothing lost.

`make soak` runs every class of faults at ten places, `make test-all` at one.
"""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from optax_guard.analysis import History
from tests.fault_runs import EXACT, FAULTS, Run, outcome
from tests.kill_job import EVAL_EVERY

HERE = pathlib.Path(__file__).parent

IS_SOAK = bool(os.environ.get("OPTAX_GUARD_SOAK"))
NUM_KILLS = 50 if IS_SOAK else 1
NUM_SEEDS = 10 if IS_SOAK else 1
NUM_CLEAN = 50 if IS_SOAK else 4


def test_run_whose_process_disk_or_folder_fails_becomes_the_run_that_was_not(tmp_path):
    found = subprocess.run(
        [
            sys.executable,
            HERE / "kill_job.py",
            str(NUM_KILLS),
            str(NUM_SEEDS),
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent,
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert len(report["resumed"]) == NUM_KILLS
    for last, first in report["resumed"]:
        # A checkpoint that was being written is lost with the unfinished interval.
        assert first % EVAL_EVERY == 0
        assert last // EVAL_EVERY * EVAL_EVERY - EVAL_EVERY <= first <= last + 1
    # Of a folder that is locked while files are written, Orbax names the checkpoint.
    errors = {"full_disk": "File too large", "locked_folder": "Permission denied|/run/"}
    for fault in report["suffered"]:
        assert fault["code"] == 1
        assert re.search(errors[fault["name"]], fault["error"])
        # That of the last evaluation may have been in the making.
        last = fault["at"] // EVAL_EVERY * EVAL_EVERY
        assert fault["first"] in (last - EVAL_EVERY, last)
    assert len(set(report["digests"])) == 1


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Runs without a fault: none warns, goes back, skips or stops."""
    folder = tmp_path_factory.mktemp("clean")
    found = [
        Run(seed, folder / str(seed)).fit(audit_every=5) for seed in range(NUM_CLEAN)
    ]
    for result in found:
        assert result.rewinds == result.left_out == ()
        assert result.history[-1]["num_skipped"] == 0
        assert result.stop is not None
        assert not result.stop.should_stop
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_run_with_a_fault_ends_as_well_as_without(clean, tmp_path, name):
    noise = np.std([result.history[-1]["value"] for result in clean])
    for seed in range(NUM_SEEDS):
        found, expected = outcome(name, seed, tmp_path / str(seed)), clean[seed]
        if name in EXACT:
            np.testing.assert_array_equal(found.state.params, expected.state.params)
            assert found.history == expected.history
        assert found.state.step == expected.state.step
        assert found.rewinds == ()
        values = (result.history[-1]["value"] for result in (found, expected))
        assert abs(next(values) - next(values)) <= 3 * noise


@pytest.fixture
def full_disk():
    """No file may grow beyond a size: so does a full disk end what is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int | None) -> None:
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_history_on_a_full_disk_keeps_its_rows_and_goes_on(tmp_path, full_disk):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append(1, loss=1.0)
    full_disk(path.stat().st_size + 10)
    with pytest.raises(OSError, match="File too large"):
        history.append(2, loss=2.0)
    full_disk(None)
    history.append(3, loss=3.0)
    expected = [{"step": 1, "train_loss": 1.0}, {"step": 3, "train_loss": 3.0}]
    assert list(History.read(path)) == list(history) == expected
