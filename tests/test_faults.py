"""Processes that are killed and disks that are full: what was good stays good."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from optax_guard.analysis import History
from tests.kill_job import EVAL_EVERY, steps_in, train

HERE = pathlib.Path(__file__).parent

NUM_KILLS = 50 if os.environ.get("OPTAX_GUARD_SOAK") else 5


def test_run_that_is_killed_anywhere_becomes_the_run_that_was_not(tmp_path):
    found = subprocess.run(
        [sys.executable, HERE / "kill_job.py", str(NUM_KILLS), tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert len(report["resumed"]) == NUM_KILLS
    for last, first in report["resumed"]:
        # A checkpoint that was being written is lost with the unfinished interval.
        assert first % EVAL_EVERY == 0
        assert last // EVAL_EVERY * EVAL_EVERY - EVAL_EVERY <= first <= last + 1
    assert len(set(report["digests"])) == 1


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


def test_full_disk_ends_the_run_with_an_error_and_leaves_the_checkpoint_before(
    tmp_path,
):
    """In a process of its own, for Orbax leaves threads behind that have failed."""
    code = f"""
import pathlib, resource, signal
from tests.kill_job import train
folder = pathlib.Path({str(tmp_path / "run")!r})
train(folder, num_steps=4)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
train(folder, num_steps=8)
"""
    # What is compiled in there must not be kept: it could not be written whole.
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert "File too large" in found.stderr
    for name in ("run", "whole"):
        train(tmp_path / name, num_steps=8)
    digests = [(tmp_path / name / "digest").read_text() for name in ("run", "whole")]
    assert digests[0] == digests[1]
    assert steps_in(tmp_path / "run")[4:6] == [4, 5]
