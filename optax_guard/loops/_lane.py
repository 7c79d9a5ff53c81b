"""A run on the device, alone or as one member of a population."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard.loops._carrier import evaluated
from optax_guard.loops._evaluation import (
    Evaluation,
    Facts,
    Point,
    evaluate_point,
    judge,
    tracked,
)
from optax_guard.loops._inputs import Functions
from optax_guard.loops._interval import Interval, add_step, first_interval
from optax_guard.loops._learning_rate import with_plateau
from optax_guard.stop._state import EarlyStoppingState

Evaluate = Callable[["Lane", jax.Array], tuple["Lane", dict[str, Any]]]


class Lane(NamedTuple):
    """The arrays that one run carries from an evaluation to the next.

    Attributes:
      state: The user's state.
      interval: Sums since the last evaluation.
      stop: The `EarlyStoppingState`, or ``None`` without a stopper.
      rows: One array a column of the history, shape (rows,). A place that no evaluation
        has filled is 0, or in a population, if it is a float, NaN.
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
    functions: Functions,
    evaluate: Evaluate,
    state: Any,
    num_steps: int,
    eval_every: int,
    *,
    unfilled: float,
) -> Lane:
    """A run before its first step, with columns of this float for its history."""
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
    _, row = jax.eval_shape(evaluate, lane, step)
    size = -(-num_steps // eval_every)

    def column(cell: jax.ShapeDtypeStruct) -> jax.Array:
        empty = unfilled if jnp.issubdtype(cell.dtype, jnp.inexact) else 0
        return jnp.full((size,), empty, cell.dtype)

    return lane._replace(rows={name: column(cell) for name, cell in row.items()})


def evaluation_of(functions: Functions) -> Evaluate:
    """Evaluates a lane without rows: ``(lane, step) -> (lane, row)``, traced once."""
    update, needs = None, frozenset()
    if functions.stopper is not None:
        update, needs = functions.stopper.update, functions.stopper.needs
    evaluation = Evaluation(functools.partial(judge, update, needs))

    @functools.partial(jax.jit, inline=True)
    def evaluate(lane: Lane, step: jax.Array) -> tuple[Lane, dict[str, Any]]:
        found = {}
        if functions.evaluate is not None:
            found = functions.evaluate(evaluated(lane.state))
        point = Point(lane.state, lane.interval, lane.stop)
        point, row, flags = evaluate_point(evaluation, point, found, Facts(step))
        is_over = lane.is_over
        for name, flag in flags.items():
            if name.startswith(("should_stop", "guard_exhausted")):
                is_over |= flag
        return Lane(*point, {}, lane.num_rows + 1, is_over), {"step": step, **row}

    return evaluate


def advance(
    functions: Functions,
    evaluate: Evaluate,
    lane: Lane,
    step: jax.Array,
    until: jax.Array,
) -> Lane:
    """Trains from a step to the next evaluation, and writes its row."""

    def take_step(i: jax.Array, carry: tuple[Any, Interval]) -> tuple[Any, Interval]:
        return add_step(functions.train_step, *carry, functions.batches(i))

    # The number of steps is traced. So one program serves the first interval of a
    # resumed run, the last of any, which may be short, and those between.
    state, interval = jax.lax.fori_loop(
        step, until, take_step, (lane.state, lane.interval)
    )
    lane = lane._replace(state=state, interval=interval)
    new, row = evaluate(lane._replace(rows={}), until)
    # The row of a member that is over gets a place that does not exist.
    place = jnp.where(lane.is_over, len(lane.rows["step"]), lane.num_rows)
    rows = {
        name: lane.rows[name].at[place].set(cell, mode="drop")
        for name, cell in row.items()
    }
    return new._replace(rows=rows)


def next_evaluation(step: jax.Array, num_steps: int, eval_every: int) -> jax.Array:
    """The next step with an evaluation."""
    return jnp.minimum(num_steps, (step // eval_every + 1) * eval_every)
