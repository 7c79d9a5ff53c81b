"""`fit` on several processes, which are real: same run, same end, whoever is told.

Run by `make test-multihost`. A job is started once and does many runs, for to start it
is what takes long; a hang is cut by `SECONDS`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import pytest

from tests.multihost.job import EVAL_EVERY, HEARTBEAT_SECONDS, Job, whole

pytestmark = pytest.mark.multihost

DEVICES = 4
# Most that any job may take, and the others' end after a death.
SECONDS = 300
SECONDS_TO_END = HEARTBEAT_SECONDS + 60
ROOT = pathlib.Path(__file__).parents[2]
# By the number of processes.
RUNS = {
    2: ("whole", "preempted_unsaved", "timed", "rewound", "damaged", "killed"),
    4: ("whole", "preempted", "resumed"),
}
SAME = ("history", "step", "explained", "preempted", "best_params", "params")


class Processes:
    """A job of several processes, started; none is left at the end of the block."""

    def __init__(self, runs: tuple[str, ...], num_processes: int, folder: pathlib.Path):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = [
            f"--xla_force_host_platform_device_count={DEVICES // num_processes}",
            # To compile is what takes long, and not to run.
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_backend_optimization_level=0",
        ]
        environment = os.environ | {
            "PYTHONPATH": ".",
            "XLA_FLAGS": " ".join(flags),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        }
        self.folder, self.runs = folder, runs
        self._logs = [folder / f"log.{process}" for process in range(num_processes)]
        self._processes = []
        for process, log in enumerate(self._logs):
            arguments = (",".join(runs), num_processes, process, port, folder)
            with log.open("wb") as file:
                self._processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "tests/multihost/job.py",
                            *map(str, arguments),
                        ],
                        cwd=ROOT,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def codes(self) -> list[int]:
        """Exit codes, once all have ended; a death must end all others in time."""
        last = time.monotonic() + SECONDS
        while None in (codes := [process.poll() for process in self._processes]):
            if any(codes):
                last = min(last, time.monotonic() + SECONDS_TO_END)
            assert time.monotonic() < last, f"still running: {codes}\n{self.logs()}"
            time.sleep(0.1)
        return [code for code in codes if code is not None]

    def logs(self) -> str:
        return "\n".join(log.read_text()[-4000:] for log in self._logs)

    def found(self, run: str) -> list[dict[str, Any]]:
        """What a run came to on each process."""
        return [
            json.loads((self.folder / f"{run}.{process}.json").read_text())
            for process in range(len(self._processes))
        ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A job of four processes and one of two, of which one was killed in the end."""
    folder = tmp_path_factory.mktemp("jobs")
    with (
        Processes(RUNS[2], 2, folder / "2") as two,
        Processes(RUNS[4], 4, folder / "4") as four,
    ):
        two_codes = two.codes()
        assert four.codes() == [0] * 4, four.logs()
        with Processes(("restarted",), 2, folder / "2") as again:
            assert again.codes() == [0] * 2, again.logs()
        yield {2: two, 4: four, "killed": two_codes, "restarted": again}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The same run on as many devices of one process."""
    return whole(Job(jax.devices()[:DEVICES]), tmp_path_factory.mktemp("oracle"))


@pytest.fixture(params=RUNS)
def job(request, jobs):
    return jobs[request.param]


def steps(found: dict[str, Any]) -> list[int]:
    return [row["step"] for row in found["history"]]


def the_same(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in SAME}


def test_all_processes_return_the_same(job):
    for run in job.runs:
        if run != "killed":
            first, *others = job.found(run)
            assert [the_same(other) for other in others] == [the_same(first)] * len(
                others
            )


def test_run_is_that_of_one_process(job, oracle):
    found = job.found("whole")[0]
    assert steps(found) == steps(oracle)
    for row, expected in zip(found["history"], oracle["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert (
        found["explained"].split(", best")[0]
        == (oracle["explained"].split(", best")[0])
    )
    assert "PATIENCE" in found["explained"]
    leaves = jax.tree.leaves(found["best_params"])
    assert leaves == pytest.approx(jax.tree.leaves(oracle["best_params"]), rel=1e-3)
    assert found["loaded"] == found["best_params"]


def test_nan_in_the_data_of_one_process_skips_everywhere(job):
    for found in job.found("whole"):
        skipped = [row["num_skipped"] for row in found["history"]]
        assert skipped == [0] + [1] * (len(skipped) - 1)


def test_only_the_first_process_writes(job):
    first, *others = job.found("whole")
    assert first["logged"] == steps(first)
    assert first["displayed"] == [first["step"], len(first["history"])]
    for other in others:
        assert other["logged"] == []
        assert other["displayed"] == [0, 0]


def test_sigterm_to_one_process_ends_all_at_the_same_evaluation(jobs):
    for found in jobs[4].found("preempted"):
        assert found["preempted"]
        assert not found["interrupted"]
        assert found["explained"].startswith("running")
        assert steps(found) == [2, 4, 6]
        assert found["step"] == 6


def test_run_ended_by_sigterm_goes_on_bit_for_bit(jobs):
    resumed, whole = (jobs[4].found(run)[0] for run in ("resumed", "whole"))
    assert not resumed["preempted"]
    assert the_same(resumed) == the_same(whole)


def test_without_a_checkpointer_sigterm_comes_an_interval_later(jobs):
    for found in jobs[2].found("preempted_unsaved"):
        assert found["preempted"]
        assert steps(found) == [2, 4, 6]
        assert found["step"] == 8


def test_time_is_that_of_the_first_process(jobs):
    for found in jobs[2].found("timed"):
        assert found["train_seconds"] == 3.0
        assert "stopped at evaluation 3 (BUDGET)" in found["explained"]


def test_all_go_back_to_what_was_saved_before_the_first_step(jobs):
    for found in jobs[2].found("rewound"):
        assert [(r["step"], r["rewinds"]) for r in found["history"]] == [(2, 0), (4, 1)]
        assert "stopped at evaluation 2 (DIVERGED)" in found["explained"]


def test_of_a_damaged_checkpoint_all_go_back_to_the_same_one_before(jobs):
    whole = jobs[2].found("whole")[0]
    first, other = jobs[2].found("damaged")
    last = steps(whole)[-1]
    for found in (first, other):
        assert found["steps"] == list(range(last - EVAL_EVERY, last))
        assert the_same(found) == the_same(whole)
        assert found["error"].startswith("No checkpoint in ")
    # One of them says so.
    [warning] = first["warnings"]
    assert f"The run goes on from step {last - EVAL_EVERY}." in warning
    assert f"step {last}: " in warning
    assert other["warnings"] == []


def test_death_of_one_process_ends_the_other_with_an_error(jobs):
    other, killed = jobs["killed"]
    assert killed == -signal.SIGKILL
    assert other not in (0, -signal.SIGKILL)
    assert not list(jobs[2].folder.glob("killed.*.json"))


def test_run_of_which_a_process_died_goes_on_bit_for_bit(jobs):
    whole = jobs[2].found("whole")[0]
    for found in jobs["restarted"].found("restarted"):
        assert the_same(found) == the_same(whole)
