"""What does `fit` pay to hand a row to a tracker?

Times of 200 rows of 7 numbers in each tracker that is installed, findings included. All
write to a temporary folder, W&B offline. Run `python -m benchmarks.logging_cost`; `make
test-ecosystem` makes an environment that has them.
"""

import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from optax_guard._records.writers import log_function
from optax_guard.analysis import History

NUM_ROWS = 200
ROW = {"train_loss": 1.3, "val_loss": 1.4, "grad_norm": 0.5, "clip_threshold": 1.0}
ROW |= {"clip_rate": 0.1, "skip_rate": 0.0, "nonfinite_rate": 0.0}

Contender = Callable[[Path], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def history(folder: Path) -> Iterator[Any]:
    yield History(folder / "history.jsonl")


@contextlib.contextmanager
def tensorboardx(folder: Path) -> Iterator[Any]:
    with importlib.import_module("tensorboardX").SummaryWriter(str(folder)) as writer:
        yield writer


@contextlib.contextmanager
def trackio(folder: Path) -> Iterator[Any]:
    os.environ["TRACKIO_DIR"] = str(folder)
    module = importlib.import_module("trackio")
    yield module.init(project="cost", embed=False)
    module.finish()


@contextlib.contextmanager
def wandb(folder: Path) -> Iterator[Any]:
    module = importlib.import_module("wandb")
    with module.init(project="cost", dir=folder, mode="offline") as run:
        yield run


@contextlib.contextmanager
def mlflow(folder: Path, is_async: bool = False) -> Iterator[Any]:
    module = importlib.import_module("mlflow")
    module.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    module.config.enable_async_logging(is_async)
    with module.start_run():
        yield module


CONTENDERS: dict[str, Contender] = {
    "History in a file": history,
    "tensorboardX": tensorboardx,
    "trackio": trackio,
    "W&B, offline": wandb,
    "MLflow, SQLite": mlflow,
    "MLflow, SQLite, asynchronous": lambda folder: mlflow(folder, is_async=True),
}


def microseconds(logger: Any) -> np.ndarray:
    """Time of each row, float64[NUM_ROWS]."""
    log, times = log_function(logger), []
    for step in range(NUM_ROWS):
        row = {**ROW, "train_loss": 1.3 + 0.01 * (step % 3)}
        start = time.perf_counter()
        log(step, row)
        times.append(time.perf_counter() - start)
    return 1e6 * np.array(times)


def main() -> None:
    for name, contender in CONTENDERS.items():
        # What trackers print goes elsewhere.
        with tempfile.TemporaryDirectory() as folder:
            try:
                with (
                    contextlib.redirect_stdout(sys.stderr),
                    contender(Path(folder)) as logger,
                ):
                    times = microseconds(logger)
            except ImportError as error:
                print(f"{name}: {error}")
                continue
        median, late = np.quantile(times, [0.5, 0.9])
        print(f"{name}: median {median:.0f} us, nine of ten within {late:.0f} us")


if __name__ == "__main__":
    main()
