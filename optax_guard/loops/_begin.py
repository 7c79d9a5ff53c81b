"""The beginning of a run of `fit`: at its first step, or at its latest checkpoint."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_guard._checks import check_not_nan, static_number
from optax_guard._records.diagnosis import Diagnosis
from optax_guard._records.progress import Progress, open_display
from optax_guard._records.writers import Logger
from optax_guard.loops._carrier import evaluated
from optax_guard.loops._checkpoint import Checkpointer
from optax_guard.loops._evaluation import VALUE, named_values, tracked
from optax_guard.loops._host import Interrupt, Record
from optax_guard.loops._host_run import Ending, HostRun, Plan
from optax_guard.loops._inputs import check_steps, copied
from optax_guard.loops._learning_rate import with_plateau
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.loops._skip_origins import SkipOrigins
from optax_guard.loops._source import Source
from optax_guard.loops._store import Store, open_store
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


def open_run(
    stack: contextlib.ExitStack,
    plan: Plan,
    state: Any,
    *,
    num_steps: int,
    loggers: Sequence[Logger],
    progress: bool | Progress,
    checkpointer: Checkpointer | None,
    first_items: dict[str, Any],
) -> HostRun:
    """The run before its first step here. The stack closes all that it has opened."""
    # Signals come first, so that they are held until the last checkpoint is written.
    interrupt = stack.enter_context(Interrupt())
    store = stack.enter_context(
        open_store(checkpointer, keeps_first=plan.rewind is not None)
    )
    start = _first_snapshot(state, plan.stopper, plan.source, num_steps, store)
    if checkpointer is not None and checkpointer.continue_stopped:
        start = _continued(start, plan.stopper)
    steps_left = max(0, num_steps - start.step)
    display = stack.enter_context(open_display(progress, steps_left))
    if progress is True and not any(isinstance(x, Diagnosis) for x in loggers):
        diagnosis = Diagnosis()
        for row in start.history:  # Its findings were printed before the resumption.
            diagnosis.update(row)
        loggers = [*loggers, diagnosis]
    return HostRun(
        plan=plan,
        interrupt=interrupt,
        store=store,
        display=display,
        record=stack.enter_context(Record(loggers, display, start.history)),
        num_steps=num_steps,
        step=start.step,
        state=start.state,
        stop=start.stop,
        rewound=start.rewound,
        evaluated_at=start.step,
        ending=_ending_at_start(start, num_steps),
        first_items={} if start.history else first_items | _first_value(plan, start),
        origins=SkipOrigins(plan.train_step, plan.batch_at, start.step)
        if plan.explains_skips
        else None,
    )


def items_of_baseline(baseline: Any) -> dict[str, Any]:
    """The argument `baseline` of `fit`, as an item of the first row."""
    if baseline is None:
        return {}
    check_not_nan("baseline", baseline)
    return {"baseline": np.float32(static_number("baseline", baseline, "rows hold it"))}


def _first_value(plan: Plan, start: Snapshot) -> dict[str, Any]:
    """The value before the first step, as an item of the first row."""
    if plan.evaluate is None:
        return {}
    values = named_values(plan.evaluate(evaluated(start.state)))
    names = [x for x in (VALUE, "val_loss") if x in values]
    names += [x for x in values if "loss" in x]
    return {"initial_value": values[names[0]]} if names else {}


def _first_snapshot(
    state: Any,
    stopper: EarlyStopping | None,
    source: Source,
    num_steps: int,
    store: Store | None,
) -> Snapshot:
    """The run at its latest checkpoint, or one that begins with this state."""
    if store is not None and store.latest is not None:
        return _resumed(state, stopper, source, store)
    state = copied(state)
    step = int(state.step)
    check_steps(step, num_steps)
    stop = None
    if stopper is not None:
        stop = _first_stop(stopper, state, store)
        state = with_plateau(state, stop)
    start = Snapshot(step, state, stop, history=[], best_step=-1, rewound=Rewound())
    if store is not None and store.keeps_first:
        store.save(start._replace(data=source.state()), {})
    return start


def _first_stop(
    stopper: EarlyStopping, state: Any, store: Store | None
) -> EarlyStoppingState:
    """The stopper's state. With a store the best is on disk; an average stays in it."""
    if store is None:
        return stopper.init(tracked(state))
    if stopper.init(()).recent_params == ():
        return stopper.init()
    return stopper.init(tracked(state))._replace(best_params=None)


def _resumed(
    state: Any, stopper: EarlyStopping | None, source: Source, store: Store
) -> Snapshot:
    if not source.is_resumable:
        raise ValueError(
            "`batches` must be a function `step -> batch`, or an iterator with "
            f"`get_state` and `set_state`, to resume the run in {store.directory}: "
            "another iterable starts again at its first batch."
        )
    stop = None if stopper is None else _first_stop(stopper, state, store)
    latest = store.load_latest(state, stop)
    source.restore(latest.data, store.directory)
    return latest


def _continued(start: Snapshot, stopper: EarlyStopping | None) -> Snapshot:
    """The run, ready to go on if the stopper had stopped it."""
    if stopper is None or start.stop is None or not start.stop.should_stop:
        return start
    stop = stopper.reset(start.stop)
    state = with_plateau(start.state, stop, start.rewound.lr_scale)
    return start._replace(state=state, stop=stop)


def _ending_at_start(start: Snapshot, num_steps: int) -> Ending | None:
    """Why a resumed run ends at once: it has come to its end before."""
    if start.step >= num_steps:
        return Ending.COMPLETE
    if start.stop is not None and bool(start.stop.should_stop):
        return Ending.STOPPED
    return None
