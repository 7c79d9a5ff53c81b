"""What each process of a job runs.

`python job.py RUN,... PROCESSES PROCESS PORT FOLDER` joins a job, does some of `RUNS`
and writes what each came to into ``FOLDER/RUN.PROCESS.json``. On as many devices of one
process, `Job` is the oracle.
"""

import json
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_guard as og
from optax_guard.flax import Checkpointer, FitResult, Rewind, TrainState, fit, load_best

NUM_STEPS, EVAL_EVERY = 14, 2
EXAMPLES, FEATURES, CLASSES = 16, 8, 4
# At this step, the last quarter of the batch, on the last process, is NaN.
BAD_STEP = 3
# From this step on labels are wrong, so that the held-out loss rises.
WRONG_FROM = 6
# Before this step a process is sent a signal.
SIGNAL_STEP = 5
# Seconds in which the others end when a process has died.
HEARTBEAT_SECONDS = 10

TX = og.guard(optax.adam(0.05), clip=1.0)
STOPPER = og.early_stopping(og.stop.patience(1))


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        # A bias would have no gradient but what rounding leaves, which Adam magnifies.
        x = nn.Dense(16, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(CLASSES)(x)


MODEL = Classifier()


def examples(seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(EXAMPLES, FEATURES))
    return {"x": x.astype(np.float32), "labels": np.argmax(x[:, :CLASSES], axis=1)}


def training_examples(step: int) -> dict[str, np.ndarray]:
    found = examples(step)
    if step >= WRONG_FROM:
        found["labels"] = (found["labels"] + 1) % CLASSES
    if step == BAD_STEP:
        found["x"][-EXAMPLES // 4 :] = np.nan
    return found


def loss_fn(params, batch_stats, batch):
    logits, new = MODEL.apply(
        {"params": params, "batch_stats": batch_stats},
        batch["x"],
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), new["batch_stats"]


def train_step(state, batch):
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.batch_stats, batch
    )
    state = state.apply_gradients(grads=grads, value=loss, batch_stats=batch_stats)
    return state, loss


@jax.jit
def loss_of(state, batch):
    return loss_fn(state.params, state.batch_stats, batch)[0]


def make_state() -> TrainState:
    variables = MODEL.init(jax.random.key(0), examples(0)["x"])
    return TrainState.create(apply_fn=MODEL.apply, tx=TX, **variables)


class Display:
    """Steps and rows that it was shown."""

    def __init__(self):
        self.steps, self.rows = 0, 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def row(self, row: Any) -> None:
        self.rows += 1


class Job:
    """A model sharded over devices, whichever process they belong to, and its data."""

    def __init__(self, devices: Any):
        self.mesh = Mesh(np.array(devices), ("data",))
        self.held_out = self.put(examples(seed=1000))
        # Kernels are sharded, with their moments, and all else is replicated.
        shardings = jax.tree.map(
            lambda x: self.sharding("data") if x.ndim == 2 else self.sharding(),
            jax.eval_shape(make_state),
        )
        self.state = jax.jit(make_state, out_shardings=shardings)
        self.gathered = jax.jit(lambda x: x, out_shardings=self.sharding())

    def sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A global batch, of which each process puts its own part on its devices."""
        sharding = self.sharding("data")
        return {
            name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
            for name, x in batch.items()
        }

    def fit(
        self,
        directory: pathlib.Path | None = None,
        on_step: Callable[[int], None] = lambda step: None,
        stopper: og.EarlyStopping = STOPPER,
        **kwargs: Any,
    ) -> FitResult:
        def batches(step):
            on_step(step)
            return self.put(training_examples(step))

        return fit(
            self.state(),
            train_step,
            batches,
            num_steps=NUM_STEPS,
            eval_every=EVAL_EVERY,
            evaluate=lambda state: loss_of(state, self.held_out),
            stopper=stopper,
            checkpointer=None if directory is None else Checkpointer(directory),
            **kwargs,
        )

    def found(self, result: FitResult) -> dict[str, Any]:
        """What a run came to, for JSON, which keeps floats to the last bit."""
        whole = jax.device_get(self.gathered((result.best_params, result.state.params)))
        best_params, params = jax.tree.map(np.ndarray.tolist, whole)
        assert result.stop is not None
        return {
            "history": result.history,
            "step": int(result.state.step),
            "explained": og.explain(result.stop),
            "train_seconds": float(result.stop.train_seconds),
            "preempted": result.preempted,
            "interrupted": result.interrupted,
            "best_params": best_params,
            "params": params,
        }


def send(number: signal.Signals, process: int) -> Callable[[int], None]:
    """Sends a signal to one of the processes, by itself."""

    def on_step(step: int) -> None:
        if step == SIGNAL_STEP and jax.process_index() == process:
            os.kill(os.getpid(), number)

    return on_step


def clock_of_process() -> Callable[[], float]:
    """Each reading is a second later on process 0, a thousand on others."""
    readings = iter(range(10**6))
    return lambda: next(readings) * (1.0 if jax.process_index() == 0 else 1e3)


def whole(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    display, logged = Display(), []
    result = job.fit(
        folder / "whole",
        loggers=[lambda step, row: logged.append(step)],
        progress=display,
    )
    best = load_best(folder / "whole")["params"]
    return job.found(result) | {
        "logged": logged,
        "displayed": [display.steps, display.rows],
        "loaded": jax.tree.map(np.ndarray.tolist, best),
    }


def preempted(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    last = jax.process_count() - 1
    return job.found(job.fit(folder / "preempted", send(signal.SIGTERM, last)))


def resumed(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    return job.found(job.fit(folder / "preempted"))


def preempted_unsaved(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    return job.found(job.fit(None, send(signal.SIGTERM, 0)))


def timed(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    stopper = og.early_stopping(og.stop.budget(seconds=2.5))
    with mock.patch("optax_guard.loops._host_run.time") as clock:
        clock.monotonic = clock_of_process()
        return job.found(job.fit(None, stopper=stopper))


def rewound(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    # Before the first evaluation any value is too high, so it goes back to step 0.
    stopper = og.early_stopping(og.stop.divergence(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewind = Rewind(times=1, lr_factor=1.0)
        result = job.fit(folder / "rewound", stopper=stopper, rewind=rewind)
    return job.found(result)


def damaged(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    """The run again, first without its last checkpoint, then without any."""
    steps: list[int] = []
    harm(checkpoints(folder / "whole")[-1])
    with warnings.catch_warnings(record=True) as caught:
        result = job.fit(folder / "whole", steps.append)
    harm(*checkpoints(folder / "whole"))
    message = ""
    try:
        job.fit(folder / "whole", steps.append)
    except RuntimeError as error:
        message = str(error)
    return job.found(result) | {
        "steps": steps,
        "warnings": [str(x.message) for x in caught if x.category is UserWarning],
        "error": message,
    }


def checkpoints(directory: pathlib.Path) -> list[pathlib.Path]:
    found = [path for path in directory.iterdir() if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def harm(*directories: pathlib.Path) -> None:
    """Cuts a file of each checkpoint short. The first process sees it, as any would."""
    multihost_utils.sync_global_devices("before harm")
    for path in directories if jax.process_index() == 0 else ():
        victim = max(path.rglob("*"), key=lambda x: x.is_file() and x.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])


def killed(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    last = jax.process_count() - 1
    return job.found(job.fit(folder / "killed", send(signal.SIGKILL, last)))


def restarted(job: Job, folder: pathlib.Path) -> dict[str, Any]:
    return job.found(job.fit(folder / "killed"))


RUNS = {
    run.__name__: run
    for run in (
        whole,
        preempted,
        resumed,
        preempted_unsaved,
        timed,
        rewound,
        damaged,
        killed,
        restarted,
    )
}


def main() -> None:
    """Runs, as one process of a job, the runs that are named."""
    names, num_processes, process, port, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}",
        int(num_processes),
        int(process),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        initialization_timeout=60,
    )
    job = Job(jax.devices())
    for name in names.split(","):
        found = RUNS[name](job, pathlib.Path(folder))
        path = pathlib.Path(folder, f"{name}.{process}.json")
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
