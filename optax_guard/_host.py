"""What `fit` meets on the host: data, loggers, displays, clocks, Ctrl-C."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from optax_guard._progress import Progress

# What a source of batches returns when there are no more.
END = object()


@runtime_checkable
class MetricWriter(Protocol):
    """What CLU's metric writers have."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], /) -> None:
        """Writes scalars of one step."""
        ...


Logger = Callable[[int, dict[str, float]], Any] | MetricWriter


class Record:
    """Rows on their way to the loggers, one evaluation behind."""

    def __init__(
        self, loggers: Sequence[Logger], display: Any, history: list[dict[str, float]]
    ):
        self.history = history
        self._loggers = loggers
        self._display = display
        self._pending: tuple[int, Any, Any] | None = None

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        # The row before a crash is the one that people want to see.
        self.read()

    def put(self, step: int, row: dict[str, Any], flags: dict[str, Any]) -> None:
        """Keeps a row of arrays that may not be computed yet."""
        self._pending = step, row, flags

    def read(self) -> dict[str, Any]:
        """Waits for the row that was put last, hands it on and returns its flags."""
        if self._pending is None:
            return {}
        step, row, flags = self._pending
        self._pending = None
        row, flags = jax.device_get((row, flags))
        numbers: dict[str, float] = {"step": step}
        numbers |= {name: np.asarray(x).item() for name, x in row.items()}
        self.history.append(numbers)
        # First, so that what a logger prints about a row stands below it.
        self._display.row(numbers)
        for logger in self._loggers:
            # A copy: a logger may change what it gets.
            if isinstance(logger, MetricWriter):
                logger.write_scalars(step, dict(numbers))
            else:
                logger(step, dict(numbers))
        return flags


class Interrupt:
    """Turns the first Ctrl-C into a request, and the second into the usual exception.

    An exception may come between the dispatch of a step and the assignment of its
    result, when the old state is donated and the new one is lost.
    """

    def __init__(self):
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        # Only where Ctrl-C means Python's exception: another handler knows better. Of
        # several processes, one alone must not leave the loop.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and jax.process_count() == 1
        ):
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True


class NoDisplay:
    """Shows nothing."""

    def advance(self, steps: int = 1) -> None:
        """Does nothing."""

    def row(self, row: Mapping[str, float]) -> None:
        """Does nothing."""


def open_display(
    progress: Any, total: int
) -> contextlib.AbstractContextManager[Progress | NoDisplay]:
    """The display that was asked for. One of the user's own is left open."""
    if progress is True:
        return Progress(total)
    return contextlib.nullcontext(progress or NoDisplay())


def open_source(batches: Any) -> Callable[[int], Any]:
    """The batch of each step, or `END`."""
    if callable(batches):
        return batches
    if not isinstance(batches, Iterable):
        raise TypeError(
            "`batches` must be a function `step -> batch` or an iterable of batches, "
            f"got {batches!r}."
        )
    iterator = iter(batches)
    return lambda step: next(iterator, END)


def agree(seconds: float) -> float:
    """Seconds by the clock of the first process, for all of them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        seconds = float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))
    return seconds
