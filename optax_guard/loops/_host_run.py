"""A run of `fit` on the host: how it trains, is evaluated and ends."""

import dataclasses
import enum
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._checks import check_leaves
from optax_guard.loops._audit import Audit
from optax_guard.loops._carrier import evaluated, trained_params
from optax_guard.loops._ending import is_over
from optax_guard.loops._evaluation import (
    Evaluation,
    Facts,
    Point,
    evaluate_point,
)
from optax_guard.loops._group import Group, open_group
from optax_guard.loops._host import Interrupt, Record, agree
from optax_guard.loops._inputs import on_mesh, warn_of_end
from optax_guard.loops._interval import Interval, Step, first_interval
from optax_guard.loops._learning_rate import scheduled_rate
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.loops._rewind import Rewind, go_back
from optax_guard.loops._skip_origins import SkipOrigins
from optax_guard.loops._source import END, Source
from optax_guard.loops._store import Store
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


class Ending(enum.Enum):
    """Why a run ends without an error."""

    # It has come to `num_steps`, or there are no more batches.
    COMPLETE = enum.auto()
    # The stopper has stopped it.
    STOPPED = enum.auto()
    # A process of the run has got SIGTERM.
    PREEMPTED = enum.auto()
    # The user has pressed Ctrl-C.
    INTERRUPTED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arguments of `fit` that stay the same over a run.

    Attributes:
      train_step: The user's function. It is held here, because `step` does not hold it.
      step: The compiled step.
      batch_at: The batch of a step, or `END`.
      source: The batches, with the state of their iterator.
      evaluation: The configuration of its evaluations.
      explains_skips: Whether to look for the origin of skipped steps.
      audit: The repetition of some steps, or ``None``.

    The others have the names that they have in `fit`.
    """

    train_step: Callable[[Any, Any], Any]
    step: Step
    batch_at: Callable[[int], Any]
    source: Source
    eval_every: int
    evaluate: Callable[[Any], Any] | None
    stopper: EarlyStopping | None
    rewind: Rewind | None
    learning_rate: optax.Schedule | None
    evaluation: Evaluation
    explains_skips: bool = False
    audit: Audit | None = None


@dataclasses.dataclass
class HostRun:
    """A run between two dispatches.

    Attributes:
      plan: The arguments.
      interrupt: The signals that have come.
      store: The open directory of the checkpoints, or ``None``.
      display: The progress display.
      record: The rows, the last of which may not have been read yet.
      num_steps: The step to train to. It moves to the last step if the batches end.
      step: Steps dispatched.
      state: The train state.
      stop: The stopper's state, or ``None``.
      rewound: The effects of the rewinds so far.
      evaluated_at: Step of the last evaluation.
      ending: Why the run ends, or ``None`` as long as it goes on.
      clock: Seconds on the host's clock at the last evaluation.
      interval: Sums since the last evaluation; ``None`` before the first batch.
      origins: The search for the origins of skipped steps, or ``None``.
      group: The batches that wait for their dispatch; ``None`` before the first batch,
        and if each is dispatched alone.
      before: A copy of the parameters before the last step of an interval.
      first_items: Items that only the first row of the run has.
    """

    plan: Plan
    interrupt: Interrupt
    store: Store | None
    display: Any
    record: Record
    num_steps: int
    step: int
    state: Any
    stop: EarlyStoppingState | None
    rewound: Rewound
    evaluated_at: int
    ending: Ending | None
    clock: float = dataclasses.field(default_factory=lambda: time.monotonic())
    interval: Interval | None = None
    origins: SkipOrigins | None = None
    group: Group | None = None
    before: Any = None
    first_items: dict[str, Any] = dataclasses.field(default_factory=dict)


def train_interval(run: HostRun) -> None:
    """Dispatches the steps up to the next evaluation, or to a Ctrl-C."""
    plan = run.plan
    batch_at, first = plan.batch_at, run.step
    until = min(run.num_steps, (first // plan.eval_every + 1) * plan.eval_every)
    for step in range(first, until):
        if run.interrupt.requested:
            break
        batch = batch_at(step + run.rewound.data_offset)
        if batch is END:
            warn_of_end(step, run.num_steps, is_empty=run.interval is None)
            run.num_steps = step
            break
        if run.interval is None:
            _prepare(run, batch)
        if step == until - 1:
            _dispatch_group(run)
            run.before = _copy(trained_params(run.state))
        group = run.group
        if plan.audit is not None and plan.audit.is_due(step):
            _dispatch_group(run)
            _dispatch_alone(run, batch)
        elif group is None or not group.add(batch):
            _dispatch_group(run)
            # Of another kind than those before, it may open a group.
            if group is None or not group.add(batch):
                _dispatch_alone(run, batch)
        elif group.is_due():
            _dispatch_group(run)
    _dispatch_group(run)


@jax.jit
def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)


def _prepare(run: HostRun, batch: Any) -> None:
    """Checks the first batch, and makes the interval and the group for its kind."""
    train_step = run.plan.step.train_step
    check_leaves("batches", batch)
    interval = first_interval(train_step, run.state, batch)
    run.state, run.stop, run.interval = on_mesh((run.state, run.stop, interval), batch)
    run.group = open_group(train_step, run.state, batch, run.plan.eval_every)


def _dispatch_alone(run: HostRun, batch: Any) -> None:
    assert run.interval is not None  # The first batch makes it.
    run_step, audit = run.plan.step.run_step, run.plan.audit
    carry = run.state, run.interval
    if audit is not None and audit.is_due(run.step):
        carry = audit.take(run_step, carry, batch, run.step)
    else:
        carry = run_step(*carry, batch)
    run.state, run.interval = carry
    run.step += 1
    run.display.advance(1)


def _dispatch_group(run: HostRun) -> None:
    """Dispatches the batches that wait, if any."""
    if run.group is None or run.group.size == 0:
        return
    assert run.interval is not None
    batches, size = run.group.take()
    run.group.wait()
    run.state, run.interval, done = run.plan.step.run_steps(
        run.state, run.interval, batches, size
    )
    run.group.follow(done)
    for _ in range(size):
        run.step += 1
        run.display.advance(1)


def ending_after_steps(run: HostRun) -> Ending | None:
    """Reads the evaluation before these steps, and says whether it ends the run.

    The device is at work on the steps meanwhile. If the evaluation was saved, it has
    been read before.
    """
    flags = _read(run)
    if is_over(flags, run.state):
        return Ending.STOPPED
    if flags.get("preempted", False):
        return Ending.PREEMPTED
    if run.interrupt.requested:
        return Ending.INTERRUPTED
    # No step was left, because the batches ended at the last evaluation.
    return Ending.COMPLETE if run.step == run.evaluated_at else None


def _read(run: HostRun) -> dict[str, Any]:
    """Waits for the last row, and looks for the origin of a skip that it counts.

    This comes before the run goes back or ends because of the skips.
    """
    flags = run.record.read()
    if run.origins is not None and run.record.history:
        run.origins.examine(
            run.record.history[-1], run.state, run.step, run.rewound.data_offset
        )
    return flags


def evaluate_run(run: HostRun) -> None:
    """Dispatches an evaluation, and updates the stopper with it."""
    plan, state, interval = run.plan, run.state, run.interval
    # There was a step, and the first step makes the interval.
    assert interval is not None
    found = {} if plan.evaluate is None else plan.evaluate(evaluated(state))
    now = time.monotonic()
    seconds, preempted = agree(
        interval.means["train_loss"].words, now - run.clock, run.interrupt.preempted
    )
    run.clock = now
    needs_seconds = plan.stopper is not None and "seconds" in plan.stopper.needs
    facts = Facts(
        np.int32(run.step),
        np.float32(seconds) if needs_seconds else None,
        scheduled_rate(plan.learning_rate, state.opt_state, run.step),
        None if run.before is None else (run.before, trained_params(state)),
    )
    point, row, flags = evaluate_point(
        plan.evaluation,
        Point(state, interval, run.stop),
        found,
        facts,
        num_rewinds=run.rewound.num_rewinds,
        lr_scale=run.rewound.lr_scale,
    )
    run.state, run.interval, run.stop = point
    row, run.first_items, run.before = row | run.first_items, {}, None
    run.record.put(run.step, row, {**flags, "preempted": preempted})
    run.evaluated_at = run.step


def ending_after_evaluation(run: HostRun) -> Ending | None:
    """Saves the evaluation, if there is a store, and says whether it ends the run.

    Without a store it is read after the next steps have been dispatched, unless there
    are none.
    """
    is_last = run.step == run.num_steps
    if run.store is None:
        if is_last:
            is_over(_read(run), run.state)  # An exhausted guard raises.
        return Ending.COMPLETE if is_last else None
    flags = _read(run)
    snapshot = Snapshot(
        step=run.step,
        state=run.state,
        stop=run.stop,
        history=run.record.history,
        best_step=int(flags.get("best_step", -1)),
        rewound=run.rewound,
        data=run.plan.source.state(),
    )
    if run.plan.rewind is not None and not is_last:
        back = go_back(run.plan.rewind, run.store, run.plan.stopper, snapshot, flags)
        if back is not None:
            run.state, run.stop, run.rewound = back
            # A restart does the interval again, from the last checkpoint, and goes back
            # as this run did.
            return Ending.PREEMPTED if flags["preempted"] else None
    is_stopped = is_over(flags, run.state)
    run.store.save(snapshot, flags, goes_on=not is_stopped)
    if is_stopped:
        return Ending.STOPPED
    if is_last:
        return Ending.COMPLETE
    return Ending.PREEMPTED if flags["preempted"] else None
