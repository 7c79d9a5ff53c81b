"""What a run is on the device, alone or as one of a population."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._guarding.guard import GuardState
from optax_guard._guarding.readout import metrics
from optax_guard._trees import find_states
from optax_guard.loops._evaluation import (
    VALUE,
    check_apart,
    learning_rate_item,
    named_values,
    tracked,
    with_plateau,
)
from optax_guard.loops._inputs import Functions
from optax_guard.loops._interval import (
    Interval,
    close,
    first_interval,
    run_step,
    totals,
)
from optax_guard.stop._state import EarlyStoppingState


class Lane(NamedTuple):
    """All that one run carries from an evaluation to the next.

    Attributes:
      state: The user's state.
      interval: Sums since the last evaluation.
      stop: The `EarlyStoppingState`, or ``None`` without a stopper.
      rows: One array a column of the history, shape (rows,); NaN or 0 where no
        evaluation has been.
      num_rows: Evaluations so far, int32[].
      is_over: Whether a rule has fired or a guard is exhausted, bool[].
    """

    state: Any
    interval: Interval
    stop: EarlyStoppingState | None
    rows: dict[str, jax.Array]
    num_rows: jax.Array
    is_over: jax.Array


def first_lane(
    functions: Functions, judge: Any, state: Any, num_steps: int, eval_every: int
) -> Lane:
    """A run before its first step, with empty columns for its history."""
    stop = None
    if functions.stopper is not None:
        stop = functions.stopper.init(tracked(state))
        state = with_plateau(state, stop)
    step = jnp.asarray(state.step, jnp.int32)
    lane = Lane(
        state=state,
        interval=first_interval(functions.train_step, state, functions.batches(step)),
        stop=stop,
        rows={},
        num_rows=jnp.zeros((), jnp.int32),
        is_over=jnp.zeros((), bool),
    )
    _, row = jax.eval_shape(judge, lane, step)
    size = -(-num_steps // eval_every)

    def column(cell: jax.ShapeDtypeStruct) -> jax.Array:
        empty = jnp.nan if jnp.issubdtype(cell.dtype, jnp.inexact) else 0
        return jnp.full((size,), empty, cell.dtype)

    return lane._replace(rows={name: column(cell) for name, cell in row.items()})


def judge_of(functions: Functions) -> Callable[..., tuple[Lane, dict[str, Any]]]:
    """The evaluation: ``(lane without rows, step) -> (lane, row)``, traced once."""

    @functools.partial(jax.jit, inline=True)
    def judge(lane: Lane, step: jax.Array) -> tuple[Lane, dict[str, Any]]:
        state, stop = lane.state, lane.stop
        found = {} if functions.evaluate is None else functions.evaluate(state)
        values = named_values(found)
        row, interval = close(lane.interval)
        is_over = lane.is_over
        rate = learning_rate_item(state, step)
        if functions.stopper is not None and stop is not None:
            facts = {"step": step, "train_value": row["train_loss"]}
            if "opt_state" in functions.stopper.needs:
                facts["opt_state"] = state.opt_state
            judged = values if isinstance(found, Mapping) else values[VALUE]
            stop = functions.stopper.update(judged, stop, tracked(state), **facts)
            state = with_plateau(state, stop)
            is_over |= stop.should_stop
        guards = find_states(state, GuardState)
        if guards:
            row |= totals(metrics(state))
            for guard in guards:
                is_over |= guard.guard_exhausted
        if "learning_rate" not in values:
            row |= rate
        check_apart(row, values)
        lane = Lane(state, interval, stop, {}, lane.num_rows + 1, is_over)
        return lane, {"step": step, **row, **values}

    return judge


def advance(
    functions: Functions, judge: Any, lane: Lane, step: jax.Array, until: jax.Array
) -> Lane:
    """Trains from a step to the next evaluation, and writes its row."""

    def take(i: jax.Array, carry: tuple[Any, Interval]) -> tuple[Any, Interval]:
        state, interval = carry
        batch = functions.batches(i)
        return run_step(functions.train_step, state, interval, batch)

    # Of traced length, one program serves the first interval of a resumed run and the
    # last of any, which may be short, and those between.
    state, interval = jax.lax.fori_loop(step, until, take, (lane.state, lane.interval))
    lane = lane._replace(state=state, interval=interval)
    new, row = judge(lane._replace(rows={}), until)
    # The row of a member that is over is written nowhere.
    place = jnp.where(lane.is_over, len(lane.rows["step"]), lane.num_rows)
    rows = {
        name: lane.rows[name].at[place].set(cell, mode="drop")
        for name, cell in row.items()
    }
    return new._replace(rows=rows)


def next_evaluation(step: jax.Array, num_steps: int, eval_every: int) -> jax.Array:
    """The next step with an evaluation."""
    return jnp.minimum(num_steps, (step // eval_every + 1) * eval_every)
