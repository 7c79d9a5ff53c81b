"""The host's side of `fit`: loggers, displays, clocks, signals."""

import functools
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_guard._records.writers import Logger, log_function


class Record:
    """The rows of a run. The loggers get a row when the next steps are dispatched.

    With several processes, all keep the history, and the first calls the loggers.
    """

    def __init__(
        self, loggers: Sequence[Logger], display: Any, history: list[dict[str, float]]
    ):
        self.history = history
        is_first = jax.process_index() == 0
        self._loggers = [log_function(x, history) for x in loggers if is_first]
        self._display = display
        self._pending: tuple[int, Any, Any] | None = None

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        # After a crash, users want to see the row before it.
        self.read()

    def put(self, step: int, row: dict[str, Any], flags: dict[str, Any]) -> None:
        """Holds a row of arrays that may not be computed yet."""
        self._pending = step, row, flags

    def read(self) -> dict[str, Any]:
        """Waits for the row that was put last, passes it on and returns its flags."""
        if self._pending is None:
            return {}
        step, row, flags = self._pending
        self._pending = None
        row, flags = jax.device_get((row, flags))
        numbers: dict[str, float] = {"step": step}
        numbers |= {name: np.asarray(x).item() for name, x in row.items()}
        if flags.get("should_stop", False):
            numbers["stop_reason"] = int(flags["stop_reason"])
        self.history.append(numbers)
        # The display comes first: a logger may print a remark about the row below it.
        self._display.row(numbers)
        for logger in self._loggers:
            # A copy: a logger may change what it gets.
            logger(step, dict(numbers))
        return flags


class Interrupt:
    """Turns Ctrl-C and SIGTERM into requests, so that the loop ends at a safe place.

    An exception could come between the dispatch of a step and the assignment of its
    result. Then the old state is donated and the new one is lost. The second Ctrl-C
    raises the usual exception, for users who do not want to wait. A second SIGTERM
    changes nothing: schedulers send it twice, and SIGKILL after it.

    Attributes:
      requested: Whether to end after the step at hand, because of Ctrl-C.
      preempted: Whether to end at the next evaluation, because of SIGTERM.
    """

    def __init__(self):
        self.requested = False
        self.preempted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        # With several processes, one must not leave the loop alone.
        if jax.process_count() == 1:
            self._take(signal.SIGINT, signal.default_int_handler, self._request)
        # The handler of `jax.distributed` is not Python's, and looks like the default.
        self._take(signal.SIGTERM, signal.SIG_DFL, self._preempt)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, default: Any, handler: Callable[..., None]) -> None:
        # A handler that the user has set stays. Only the main thread may set one.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(number) is default
        ):
            self._before[number] = signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True

    def _preempt(self, number: int, frame: Any) -> None:
        del number, frame
        self.preempted = True


def agree(result: jax.Array, seconds: float, preempted: bool) -> tuple[Any, Any]:
    """Time and SIGTERM, the same for all processes of a run.

    With several processes this is one small collective. The host does not wait for it.

    Args:
      result: Any array of the run: its devices tell the processes of the run.
      seconds: Time by the clock of this process.
      preempted: Whether this process has got SIGTERM.

    Returns:
      Seconds by the clock of the first process, float32[], and whether any process was
      preempted, bool[].
    """
    if result.is_fully_addressable:
        return np.float32(seconds), np.bool_(preempted)
    devices = sorted(result.sharding.device_set, key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.array(devices), ("device",))
    own = np.array([[seconds, preempted]], np.float32)
    facts = jax.make_array_from_callback(
        (len(devices), 2),
        NamedSharding(mesh, PartitionSpec("device")),
        lambda index: own,
    )
    return _first_and_any(facts, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=1)
def _first_and_any(
    facts: jax.Array, everywhere: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    facts = jax.lax.with_sharding_constraint(facts, everywhere)
    return facts[0, 0], jnp.any(facts[:, 1] > 0)
