"""Kills `fit` again and again: `python kill_job.py NUM_KILLS FOLDER`.

Each run is a process of its own, forked before JAX has started, so that the next one
need not import everything anew. What happened is printed as JSON.
"""

import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard.flax import Checkpointer, TrainState, fit

NUM_STEPS, EVAL_EVERY = 40, 4


def train(folder: pathlib.Path, num_steps: int = NUM_STEPS) -> None:
    """A run, or what is left of it; writes the steps it takes, and a digest of all."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "steps.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def batches(step: int) -> np.ndarray:
        os.write(log, f"{step}\n".encode())
        time.sleep(0.005)
        batch = np.random.default_rng(step).normal(size=4).astype(np.float32)
        return batch * (np.nan if step % 7 == 3 else 1)

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(
            lambda params: jnp.mean((params["w"] - batch) ** 2)
        )(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    tx = og.guard(optax.adam(0.05), clip=og.threshold.zscore(), skip=og.skip.spike())
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


def start(folder: pathlib.Path) -> int:
    """The process that trains in this folder."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        train(folder)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


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


def main(num_kills: int, folder: pathlib.Path) -> None:
    chance = random.Random(0)
    runs, resumed = [folder / "0"], []
    while len(resumed) < num_kills:
        # At a step, while the evaluation is made, or while it is being saved.
        killed = kill(runs[-1], chance.randint(1, 20), chance.uniform(0, 0.1))
        if killed is None:
            runs.append(folder / str(len(runs)))
        else:
            resumed.append(killed)
    runs.append(folder / "whole")
    for path in runs:
        if not (path / "digest").exists():
            _, status = os.waitpid(start(path), 0)
            check(status)
    digests = [(path / "digest").read_text() for path in runs]
    print(json.dumps({"resumed": resumed, "digests": digests}))


if __name__ == "__main__":
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
