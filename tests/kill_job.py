"""Kills `fit`, fills its disk and locks its folder: `kill_job.py NUM_KILLS NUM FOLDER`.

Each run is a process of its own, forked before JAX has started, so that the next one
need not import everything anew. What happened is printed as JSON.
"""

import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard.flax import Checkpointer, TrainState, fit

NUM_STEPS, EVAL_EVERY = 40, 4
# The step at which a fault comes. It is set before a process is forked.
FAULT_AT = 0


def train(
    folder: pathlib.Path,
    num_steps: int = NUM_STEPS,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """A run, or what is left of it; writes the steps it takes, and a digest of all."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "steps.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def batches(step: int) -> np.ndarray:
        os.write(log, f"{step}\n".encode())
        time.sleep(0.005)
        on_step(step)
        batch = np.random.default_rng(step).normal(size=4).astype(np.float32)
        return batch * (np.nan if step % 7 == 3 else 1)

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(
            lambda params: jnp.mean((params["w"] - batch) ** 2)
        )(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    tx = og.guard(optax.adam(0.05), clip=og.threshold.zscore())
    result = fit(
        TrainState.create(apply_fn=str, params={"w": jnp.ones(4)}, tx=tx),
        train_step,
        batches,
        num_steps=num_steps,
        eval_every=EVAL_EVERY,
        evaluate=jax.jit(lambda state: jnp.sum(state.params["w"] ** 2)),
        stopper=og.early_stopping(og.stop.patience(NUM_STEPS)),
        checkpointer=Checkpointer(folder / "run"),
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((result.state, result.stop, result.best_params)):
        digest.update(np.asarray(leaf).tobytes())
    digest.update(repr(result.history).encode())
    (folder / "digest").write_text(digest.hexdigest())


def start(folder: pathlib.Path, on_step: Callable[[int], None] | None = None) -> int:
    """The process that trains in this folder. A fault writes its error into a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if on_step is None:
            train(folder)
        else:
            train(folder, on_step=on_step)
        code = 0
    except Exception as error:
        if on_step is None:
            raise
        # The disk is full, and the folder is locked. This file was open before.
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


def full_disk(step: int) -> None:
    """No file may grow beyond a size: so does a full disk end what is written."""
    if step == FAULT_AT:
        # A program that is compiled now must not be kept half.
        jax.config.update("jax_enable_compilation_cache", False)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def locked_folder(step: int) -> None:
    """Nobody may write where root has written."""
    if step == FAULT_AT:
        os.seteuid(65534)


def suffer(folder: pathlib.Path, fault: Callable[[int], None]) -> dict[str, Any]:
    """A run with a fault of its folder, and one after it, which goes on."""
    reading, writing = os.pipe()
    before = os.dup(2)
    os.dup2(writing, 2)
    pid = start(folder, fault)
    os.dup2(before, 2)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading, errors="replace") as file:
        error = file.read()
    steps = len(steps_in(folder))
    _, again = os.waitpid(start(folder), 0)
    check(again)
    return {
        "name": fault.__name__,
        "code": os.waitstatus_to_exitcode(status),
        "error": error,
        "first": steps_in(folder)[steps],
    }


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps that were taken so far, by all processes."""
    path = folder / "steps.log"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def kill(folder: pathlib.Path, num_steps: int, rest: float) -> tuple[int, int] | None:
    """Starts a run, and kills it so many steps and seconds later.

    Returns the last step before this run and its first, or ``None`` if it came to its
    end before.
    """
    before = steps_in(folder)
    pid = start(folder)
    while len(steps_in(folder)) < len(before) + num_steps:
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            check(status)
            return None
    time.sleep(rest)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return (before[-1] if before else -1), steps_in(folder)[len(before)]


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"A run failed with status {status}.")


def main(num_kills: int, num_faults: int, folder: pathlib.Path) -> None:
    chance = random.Random(0)
    runs, resumed = [folder / "0"], []
    while len(resumed) < num_kills:
        # At a step, while the evaluation is made, or while it is being saved.
        killed = kill(runs[-1], chance.randint(1, 20), chance.uniform(0, 0.1))
        if killed is None:
            runs.append(folder / str(len(runs)))
        else:
            resumed.append(killed)
    faults = [full_disk]
    # To start a process takes seconds: one of each ten is enough for the short run.
    if num_faults > 1 and os.geteuid() == 0:
        faults.append(locked_folder)
    suffered = []
    for i in range(num_faults):
        for fault in faults:
            global FAULT_AT
            FAULT_AT = chance.randint(2 * EVAL_EVERY + 1, NUM_STEPS - EVAL_EVERY - 1)
            runs.append(folder / f"{fault.__name__} {i}")
            suffered.append({"at": FAULT_AT, **suffer(runs[-1], fault)})
    runs.append(folder / "whole")
    for path in runs:
        if not (path / "digest").exists():
            _, status = os.waitpid(start(path), 0)
            check(status)
    digests = [(path / "digest").read_text() for path in runs]
    print(json.dumps({"resumed": resumed, "suffered": suffered, "digests": digests}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
