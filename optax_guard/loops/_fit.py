"""The host loop: evaluation, early stopping and logs, without a stall."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from optax_guard._checks import static_count
from optax_guard._guarding.guard import GuardState
from optax_guard._guarding.readout import metrics
from optax_guard._public import answers_wrong_calls
from optax_guard._records.diagnosis import Diagnosis
from optax_guard._records.progress import Progress, open_display
from optax_guard._records.writers import Logger
from optax_guard._trees import find_states
from optax_guard.loops._checkpoint import (
    Checkpointer,
    Store,
    check_checkpointer,
    open_store,
)
from optax_guard.loops._ending import flags_of_guard, is_over
from optax_guard.loops._evaluation import (
    VALUE,
    _judge,
    batch_stats,
    check_apart,
    learning_rate_item,
    named_values,
    tracked,
    with_plateau,
)
from optax_guard.loops._host import END, Interrupt, Record, agree, open_source
from optax_guard.loops._inputs import beside, check_arguments, own, warn_of_end
from optax_guard.loops._interval import close, first_interval, run_step, totals
from optax_guard.loops._result import FitResult, Rewound, Run
from optax_guard.loops._rewind import Rewind, check_rewind, go_back
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


@answers_wrong_calls
def fit(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[int], Any] | Iterable[Any],
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[Any], Any] | None = None,
    stopper: EarlyStopping | None = None,
    loggers: Sequence[Logger] = (),
    progress: bool | Progress = False,
    checkpointer: Checkpointer | None = None,
    rewind: Rewind | None = None,
    learning_rate: optax.Schedule | None = None,
) -> FitResult:
    """Trains on the host's loop, with evaluation, early stopping and logging.

    The device never waits for the host: what an evaluation found, the stop flag
    included, is read after the next ``eval_every`` steps have been dispatched. So an
    early stop comes up to one interval late, always at the same step, and the best
    parameters are those of the stopper, which has not moved since. An exhausted guard
    is found out at the same time.

    At an evaluation, in this order: these parameters are evaluated, the stopper is
    updated with them, and the loop goes on. There is one at every multiple of
    ``eval_every`` and one at the end.

    With a checkpointer, the device waits at each evaluation until it is read and what
    is saved has left the device. The best parameters are then on disk and not a second
    time on the device, and a stop comes at its evaluation. If the directory holds a
    checkpoint, the run goes on from there, and becomes bit for bit what it would have
    been: rows, stop and best. If it had stopped, or come to ``num_steps``, `fit`
    returns the same result at once.

    The first Ctrl-C ends the run after the step at hand, and `fit` returns what there
    is; the second raises ``KeyboardInterrupt``. SIGTERM, by which schedulers announce
    that they take the machine away, ends the run at the next evaluation: with a
    checkpointer once that is saved, without one an interval later, as an early stop
    comes. Handlers of one's own for these signals are left in force. Whatever is
    raised, loggers have got every row first.

    On several processes, all call `fit` with the same arguments, and it returns the
    same on all. ``batches`` must return global arrays, of which each process need hold
    only its own part, and ``evaluate`` the value of all data, not that of its part.
    Loggers and display are called on process 0 only. At each evaluation the processes
    agree on the clock and on SIGTERM, in one collective of two numbers a device, so
    that all end at the same one, whichever was told to; a rule that needs the time then
    waits for the device. Ctrl-C raises, and what becomes of the others if a process
    dies is up to `jax.distributed.initialize`, by its ``heartbeat_timeout_seconds``.

    Args:
      state: A `TrainState` of Flax or of this library, or any tree of arrays with
        ``step``, ``params`` and ``opt_state``. It is copied, not donated.
      train_step: ``train_step(state, batch) -> (state, metrics)`` with ``metrics`` a
        dict of scalars, ``"loss"`` among them, or the loss alone. It is jitted here,
        with the state donated, and traced once as long as batches have one shape.
      batches: A function ``step -> batch``, or an iterable of batches. Only the
        function lets a resumed run go on with the right data.
      num_steps: Value of ``state.step`` to train to, as in ``range(state.step,
        num_steps)``. An iterable that ends earlier ends the run, with a warning.
      eval_every: Steps between evaluations.
      evaluate: ``evaluate(state) -> scalar or dict of scalars``. Called as it is: jit
        it, or what it calls, and return arrays without converting them to Python's
        numbers, which would wait for the device.
      stopper: An `early_stopping`. It is told the value, the parameters, the steps,
        the mean training loss since the evaluation before, the optimizer's state and
        the seconds on the host's clock. If its rule holds a `stop.plateau`, its factor
        is written into the optimizer's state.
      loggers: Functions ``(step, row)``, or writers: CLU's, tensorboardX's
        (`optax-guard[log]`) or PyTorch's, which get names in groups such as
        ``grad/norm`` and stay open. Rows of before a resumption are not sent again.
      progress: Whether to show a progress bar and a table, and what
        `optax_guard.analysis.diagnose` finds when it first holds; or a display of one's
        own.
      checkpointer: A `Checkpointer`, to save, and to resume what it finds. The state
        needs ``replace``, as Flax's has, and ``batches`` must be a function to resume.
        Configuration is not saved: optimizer, rule and functions are those given now.
      rewind: A `Rewind`, to go back to the best checkpoint if the run goes bad.
      learning_rate: The schedule that the optimizer was given, to be recorded. Not
        needed with ``optax.inject_hyperparams``, whose state tells the rate.

    Returns:
      A `FitResult`. A row of the history has, as Python numbers:

      * ``step``: steps done;
      * ``train_loss`` and other ``train_*``: means of the metrics of ``train_step``
        over the finite values since the row before, NaN if there were none. Metrics
        with a name that `optax_guard.metrics` uses are left out here;
      * ``grad_norm``, ``clipped_norm``, ``clip_threshold``: of the worst step since the
        row before, the one with the largest finite norm; NaN if there was none; and
        ``grad_norm_mean``, the mean norm over the same steps;
      * ``update_cosine``, ``entries_clipped``, ``units_clipped``, of the clips that
        tell them: means over the same steps;
      * ``clip_rate``, ``nonfinite_rate``, ``skip_rate``: shares of the steps since the
        row before, in [0, 1]; ``num_skipped``: total of the run, of which a rewind
        takes back those since its checkpoint; with `accumulate` also ``num_dropped``,
        the micro-batches left out, and the rates are shares of accumulated steps;
      * ``learning_rate`` of the last update, if the state or `learning_rate` tells it;
      * ``rewinds``, with `rewind`: how often the run had gone back before;
      * ``value``, or the keys of the dict that ``evaluate`` returned.

      Those of norms are there if something of this library measures them, those of
      skips if there is a guard; with several, the first counts.

    Raises:
      ValueError: If an argument is out of range, or a function returns a wrong shape.
      TypeError: If an argument or what a function returns is of the wrong kind.
      GuardExhaustedError: If the guard skipped too many steps in a row, the stopper
        did not stop, and no rewind is left; the message names the last skipped steps.
      RuntimeError: If a checkpoint is damaged; the message says which.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.flax import TrainState, fit
      >>> tx = og.guard(optax.sgd(0.1), clip=1.0)
      >>> state = TrainState.create(apply_fn=None, params=jnp.array(0.5), tx=tx)
      >>> def train_step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p - x) ** 2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> result = fit(state, train_step, lambda step: 0.0, num_steps=4, eval_every=2)
      >>> [(row["step"], round(row["train_loss"], 4)) for row in result.history]
      [(2, 0.205), (4, 0.084)]
    """
    num_steps = static_count("num_steps", num_steps)
    eval_every = static_count("eval_every", eval_every)
    check_arguments(state, evaluate, stopper, loggers)
    check_checkpointer(checkpointer, state)
    if not callable(train_step):
        raise TypeError(f"`train_step` must be a function, got {train_step!r}.")
    if learning_rate is not None and not callable(learning_rate):
        raise TypeError(
            "`learning_rate` must be the optimizer's schedule, which `fit` only "
            f"records, got {learning_rate!r}."
        )
    draw = open_source(batches)
    if rewind is not None:
        check_rewind(rewind, state, batches, stopper, checkpointer)

    with contextlib.ExitStack() as stack:
        # First, so that it is in force until the last checkpoint is written.
        interrupt = stack.enter_context(Interrupt())
        store = stack.enter_context(
            open_store(checkpointer, keeps_first=rewind is not None)
        )
        run = begin(state, stopper, batches, num_steps, store)
        step, state, stop, history, _, rewound = run
        is_done = step >= num_steps or (stop is not None and bool(stop.should_stop))
        preempted = False
        is_guarded = bool(find_states(state, GuardState))
        interval: Any = None
        evaluated_at = step
        clock = time.monotonic()
        display = stack.enter_context(open_display(progress, max(0, num_steps - step)))
        if progress is True and not any(isinstance(x, Diagnosis) for x in loggers):
            diagnosis = Diagnosis()
            for row in history:  # Of before a resumption: what they said was printed.
                diagnosis.update(row)
            loggers = [*loggers, diagnosis]
        record = stack.enter_context(Record(loggers, display, history))

        while not is_done:
            until = min(num_steps, (step // eval_every + 1) * eval_every)
            while step < until and not interrupt.requested:
                batch = draw(step + rewound.data_offset)
                if batch is END:
                    warn_of_end(step, num_steps, is_empty=interval is None)
                    num_steps = until = step
                    break
                if interval is None:
                    interval = first_interval(train_step, state, batch)
                    state, stop, interval = beside((state, stop, interval), batch)
                state, interval = run_step(train_step, state, interval, batch)
                step += 1
                display.advance(1)

            # The device is at work on these steps. Only now is read what the
            # evaluation before them found, unless it had to be saved.
            flags = record.read()
            is_done = is_over(flags, state)
            preempted = not is_done and bool(flags.get("preempted", False))
            if is_done or preempted or interrupt.requested or step == evaluated_at:
                break

            found = {} if evaluate is None else evaluate(state)
            values = named_values(found)
            row, interval = close(interval)
            rate = learning_rate_item(state, step, learning_rate)
            now = time.monotonic()
            seconds, told = agree(row["train_loss"], now - clock, interrupt.preempted)
            clock = now
            flags = {"preempted": told}
            if stopper is not None:
                facts = {"step": np.int32(step), "train_value": row["train_loss"]}
                if "seconds" in stopper.needs:
                    facts["seconds"] = np.float32(seconds)
                if "opt_state" in stopper.needs:
                    facts["opt_state"] = state.opt_state
                judged = values if isinstance(found, Mapping) else values[VALUE]
                # With a store, the best is on disk.
                params = tracked(state) if store is None else None
                stop, judged_flags = _judge(stopper, stop, judged, params, facts)
                flags |= judged_flags
                state = with_plateau(state, stop, rewound.lr_scale)
            if is_guarded:
                counted = metrics(state)
                row |= totals(counted)
                flags |= flags_of_guard(counted)
            if rewind is not None:
                row["rewinds"] = rewound.num_rewinds
            if "learning_rate" not in values:
                row |= rate
            check_apart(row, values)
            record.put(step, {**row, **values}, flags)
            evaluated_at = step

            if store is not None:
                flags = record.read()
                best_step = int(flags.get("best_step", -1))
                run = Run(step, state, stop, record.history, best_step, rewound)
                if rewind is not None and step < num_steps:
                    back = go_back(rewind, store, stopper, run, flags)
                    if back is not None:
                        state, stop, rewound = back
                        continue
                is_done = is_over(flags, state)
                store.save(run)
                preempted = not is_done and step < num_steps and flags["preempted"]
                is_done |= preempted
            if step == num_steps:
                is_over(record.read(), state)
                break

        best = best_variables(state, stopper, stop, store)
        return FitResult(
            state=state,
            best_params=best.get("params"),
            stop=stop,
            history=record.history,
            best_batch_stats=best.get("batch_stats"),
            interrupted=interrupt.requested,
            preempted=bool(preempted),
        )


def begin(
    state: Any,
    stopper: EarlyStopping | None,
    batches: Any,
    num_steps: int,
    store: Store | None,
) -> Run:
    """The run at its latest checkpoint, or one that begins with this state."""
    if store is not None and not store.is_empty():
        return _resumed(state, stopper, batches, store)
    state = own(state)
    step = int(state.step)
    if step >= num_steps:
        raise ValueError(
            f"`num_steps` must be above the steps done, {step}, got {num_steps}: it is "
            "the step to train to, not the number of further steps."
        )
    stop = None
    if stopper is not None:
        # With a store, the best is on disk.
        stop = stopper.init(tracked(state) if store is None else None)
        state = with_plateau(state, stop)
    run = Run(step, state, stop, history=[], best_step=-1, rewound=Rewound())
    if store is not None and store.keeps_first:
        store.save(run)
    return run


def _resumed(
    state: Any, stopper: EarlyStopping | None, batches: Any, store: Store
) -> Run:
    if not callable(batches):
        raise ValueError(
            "`batches` must be a function `step -> batch` to resume the run in "
            f"{store.directory}: an iterable starts again at its first batch."
        )
    run = store.load_latest(state, stopper)
    if stopper is None or run.stop is None or not store.continues_stopped:
        return run
    if not run.stop.should_stop:
        return run
    stop = stopper.reset(run.stop)
    state = with_plateau(run.state, stop, run.rewound.lr_scale)
    return run._replace(state=state, stop=stop)


def best_variables(
    state: Any,
    stopper: EarlyStopping | None,
    stop: EarlyStoppingState | None,
    store: Store | None,
) -> dict[str, Any]:
    """`params` and, if there are, `batch_stats` of the best evaluation."""
    if stopper is None or stop is None:
        return {}
    if store is not None:
        return store.load_best_variables(state)
    best = stopper.best(stop, tracked(state))
    return {"params": best} if batch_stats(state) is None else best
