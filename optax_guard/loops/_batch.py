"""A batch of runs in one program: it starts, trains, shrinks and ends."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard.loops._compiled import CompiledFor, put_together
from optax_guard.loops._ema import with_ema
from optax_guard.loops._inputs import (
    Functions,
    check_arguments,
    check_functions,
    copied,
)
from optax_guard.loops._interval import with_metrics_in_range
from optax_guard.loops._lane import (
    Lane,
    advance,
    evaluation_of,
    first_lane,
    next_evaluation,
)
from optax_guard.stop._averaging import average_of
from optax_guard.stop._state import EarlyStoppingState

_NEEDED = {"state", "train_step", "batches"}
_KNOWN = _NEEDED | {"evaluate", "stopper", "ema"}
# The axis of the members.
_AXIS = "members"


def built(
    build: Callable[[Any], Mapping[str, Any]], member: Any
) -> tuple[Functions, Any]:
    """A member's functions, and the state it starts from."""
    made = build(member)
    if not (isinstance(made, Mapping) and _NEEDED <= made.keys() <= _KNOWN):
        got = sorted(made) if isinstance(made, Mapping) else repr(made)
        raise TypeError(
            f"`build` must return a dict with the keys {sorted(_NEEDED)} and, if "
            f"wanted, {sorted(_KNOWN - _NEEDED)}, got {got}."
        )
    functions = Functions(
        made["train_step"],
        made["batches"],
        made.get("evaluate"),
        made.get("stopper"),
    )
    state = with_ema(made["state"], made.get("ema"))
    check_arguments(state, functions.evaluate, functions.stopper)
    check_functions(functions)
    train_step = with_metrics_in_range(functions.train_step)
    return functions._replace(train_step=train_step), state


# A state may hold functions, and `build` makes new ones each time it is traced. So only
# its leaves go from program to program, and each puts them into a state of its own.


class Limits(NamedTuple):
    """The limits of an advance, the same for all members.

    Attributes:
      until: Step to train to; ``None`` before the first.
      smaller: Size of the next batch: the members are advanced while more go on.
      num_steps: Step at which the run ends.
      eval_every: Steps between evaluations.
    """

    until: Any
    smaller: Any
    num_steps: int
    eval_every: int


class Batch(NamedTuple):
    """The programs of a population.

    Attributes:
      start: ``start(arguments, members, *, num_steps, eval_every)``: all members before
        their first step, and the step at which each starts.
      advance: ``advance(arguments, members, lanes, step, until, smaller, *, num_steps,
        eval_every) -> (step, lanes)``: trains until a step, or until so few go on that
        a smaller batch holds them. The lanes are donated.
    """

    start: Callable[..., tuple[Lane, jax.Array]]
    advance: Callable[..., tuple[jax.Array, Lane]]


@CompiledFor
def compiled_batch(get_build: Callable[[], Any]) -> Batch:
    """The programs of populations that one function builds.

    Their first argument is what a ``Partial`` binds to it.
    """

    def start(
        arguments: Any, members: Any, *, num_steps: int, eval_every: int
    ) -> tuple[Lane, jax.Array]:
        build = put_together(get_build(), arguments)
        limits = Limits(None, None, num_steps, eval_every)
        return jax.vmap(functools.partial(_start_member, build, limits))(members)

    def advance_all(
        arguments: Any,
        members: Any,
        lanes: Lane,
        step: jax.Array,
        until: jax.Array,
        smaller: jax.Array,
        *,
        num_steps: int,
        eval_every: int,
    ) -> tuple[jax.Array, Lane]:
        build = put_together(get_build(), arguments)
        limits = Limits(until, smaller, num_steps, eval_every)
        advance_each = jax.vmap(
            functools.partial(_advance_member, build, step, limits),
            axis_name=_AXIS,
            out_axes=(None, 0),
        )
        return advance_each(members, lanes)

    static = "num_steps", "eval_every"
    return Batch(
        jax.jit(start, static_argnames=static),
        jax.jit(advance_all, static_argnames=static, donate_argnames="lanes"),
    )


def _start_member(build: Any, limits: Limits, member: Any) -> tuple[Lane, jax.Array]:
    functions, state = built(build, member)
    state = copied(state)
    lane = first_lane(
        functions,
        evaluation_of(functions),
        state,
        limits.num_steps,
        limits.eval_every,
        unfilled=jnp.nan,
    )
    return lane._replace(state=jax.tree.leaves(lane.state)), state.step


def _advance_member(
    build: Any, step: jax.Array, limits: Limits, member: Any, lane: Lane
) -> tuple[jax.Array, Lane]:
    functions, state = built(build, member)
    evaluate = evaluation_of(functions)

    # This is the same for all members. With a condition of each one's own, the loop
    # would choose between old and new states at every step.
    def goes_on(carry: tuple[jax.Array, Lane]) -> jax.Array:
        step, lane = carry
        running = jax.lax.psum((~lane.is_over).astype(jnp.int32), _AXIS)
        return (step < limits.until) & (running > limits.smaller)

    def go(carry: tuple[jax.Array, Lane]) -> tuple[jax.Array, Lane]:
        step, old = carry
        then = next_evaluation(step, limits.num_steps, limits.eval_every)
        new = advance(functions, evaluate, old, step, then)
        rows = new.rows
        new, old = new._replace(rows={}), old._replace(rows={})
        kept = jax.tree.map(functools.partial(jnp.where, old.is_over), old, new)
        return then, kept._replace(rows=rows)

    state = jax.tree.unflatten(jax.tree.structure(state), lane.state)
    now, lane = jax.lax.while_loop(goes_on, go, (step, lane._replace(state=state)))
    return now, lane._replace(state=jax.tree.leaves(lane.state))


@functools.partial(jax.jit, donate_argnums=0)
def put(everyone: Any, lanes: Any, places: jax.Array) -> Any:
    """Writes the members of a batch to their places among all."""
    return jax.tree.map(lambda a, b: a.at[places].set(b), everyone, lanes)


@jax.jit
def pick(everyone: Any, places: jax.Array) -> Any:
    """The members at these places."""
    return jax.tree.map(lambda leaf: leaf[places], everyone)


# The average of each member.
average_each = jax.jit(jax.vmap(average_of))


@jax.jit
@jax.vmap
def best_of(stop: EarlyStoppingState, params: Any) -> Any:
    """The best parameters of each member, or its own if none was best."""
    has_best = functools.partial(jnp.where, stop.best_eval >= 0)
    return jax.tree.map(has_best, stop.best_params, params)
