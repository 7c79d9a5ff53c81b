"""A run at an evaluation, and its result."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from optax_guard.debug import NonfiniteOrigin
from optax_guard.loops._carrier import params_of_user, released
from optax_guard.loops._ema import ema_params
from optax_guard.loops._evaluation import batch_stats, tracked
from optax_guard.stop._averaging import average_of
from optax_guard.stop._state import EarlyStoppingState


class Rewound(NamedTuple):
    """The effects of the rewinds of a run.

    Attributes:
      num_rewinds: Rewinds so far.
      lr_scale: Factor on the learning rate, beside that of a `stop.plateau`.
      data_offset: Number that is added to the step to get its batch.
      events: Of each rewind a list of three: its step, the step of the checkpoint, and
        the reason in words.
      left_out: Of each rewind a list of two: the first batch that it has left out, and
        the first after it that came. Ranges that never come are not counted.
    """

    num_rewinds: int = 0
    lr_scale: float = 1.0
    data_offset: int = 0
    events: Sequence[Sequence[Any]] = ()
    left_out: Sequence[Sequence[int]] = ()


class Snapshot(NamedTuple):
    """A run at an evaluation, as a checkpoint holds it.

    Attributes:
      step: Steps done.
      state: The train state.
      stop: The stopper's state without parameters, or ``None``.
      history: All rows, that of this evaluation included.
      best_step: Step of the best evaluation; -1 if there is none.
      rewound: The effects of the rewinds so far.
      data: The state of the batches' iterator on each process, as JSON; ``None`` if it
        has none.
    """

    step: int
    state: Any
    stop: EarlyStoppingState | None
    history: list[dict[str, float]]
    best_step: int
    rewound: Rewound
    data: list[Any] | None = None


class FitResult(NamedTuple):
    """The result of `fit`.

    Attributes:
      state: The state after the last step that ran. After an early stop that is up to
        one interval of evaluation beyond it; the best parameters are not affected.
      best_params: Parameters of the best evaluation, or of `state` if none was finite;
        ``None`` without a stopper.
      stop: The `EarlyStoppingState`, for `explain`; ``None`` without a stopper. If the
        state has `batch_stats`, its ``best_params`` is a dict of both trees; with a
        checkpointer it is ``None``.
      history: One dict of Python numbers an evaluation, as the loggers got them, those
        before a resumption included.
      best_batch_stats: `batch_stats` of the best evaluation, as `best_params`; ``None``
        if the state has none.
      interrupted: Whether the run was ended by Ctrl-C.
      preempted: Whether the run was ended by SIGTERM, to this process or to another of
        the run. With a checkpointer the same call then goes on where it was ended.
      origins: With ``on_skip="explain"``, skipped steps that were examined, each with
        its `NonfiniteOrigin`, or with ``None`` if it did not recur. Those of before a
        resumption are not included.
      rewinds: Of each rewind, those before a resumption included: the step at which it
        came, the step of the checkpoint to which it went back, and the reason.
      left_out: Ranges of batches that did not come, each with its first and the one
        after its last: those of `Rewind(skip_steps=)`, and those that rewinds have left
        out.
      ema_params: With ``ema``, the average after the last step, in the dtypes of the
        parameters; else ``None``. `best_params` are then averages, too.
      average_params: For ``early_stopping(average_last=k)``, the mean of the parameters
        at the last evaluations, or those of `state` if none has entered it; else
        ``None``. Batch statistics do not belong to it: estimate them anew.
    """

    state: Any
    best_params: Any
    stop: EarlyStoppingState | None
    history: list[dict[str, float]]
    best_batch_stats: Any = None
    interrupted: bool = False
    preempted: bool = False
    origins: tuple[tuple[int, NonfiniteOrigin | None], ...] = ()
    rewinds: tuple[tuple[int, int, str], ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    ema_params: Any = None
    average_params: Any = None


def as_result(
    state: Any, best: Any, stop: EarlyStoppingState | None, rows: Any, num_rows: Any
) -> FitResult:
    """The result as `fit` would return it. This waits for the device."""
    columns, size = jax.device_get((rows, num_rows))
    columns = {"step": columns["step"], **columns}
    best_params, best_batch_stats = split_best(state, best)
    return FitResult(
        state=released(state),
        best_params=best_params,
        stop=stop,
        history=[
            {name: column[i].item() for name, column in columns.items()}
            for i in range(int(size))
        ],
        best_batch_stats=best_batch_stats,
        ema_params=ema_params(state),
        average_params=average_params(state, stop),
    )


_average = jax.jit(average_of)


def average_params(
    state: Any,
    stop: EarlyStoppingState | None,
    average: Callable[[Any, Any], Any] = _average,
) -> Any:
    """The average that the stopper's state holds, or ``None`` without one."""
    if stop is None or stop.recent_params == ():
        return None
    whole = average(stop.recent_params, tracked(state))
    has_stats = batch_stats(state) is not None
    return params_of_user(state, whole["params"] if has_stats else whole)


def split_best(state: Any, best: Any) -> tuple[Any, Any]:
    """The best parameters, and the batch statistics that belong to them."""
    if best is None or batch_stats(state) is None:
        return params_of_user(state, best), None
    return params_of_user(state, best["params"]), best["batch_stats"]
