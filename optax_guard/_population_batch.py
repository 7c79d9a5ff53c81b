"""The programs of a population: all members side by side, in one batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._early_stopping import EarlyStoppingState
from optax_guard._fit_inputs import check_arguments, own
from optax_guard._lane import (
    Functions,
    Lane,
    advance,
    check_functions,
    first_lane,
    judge_of,
    next_evaluation,
)

_NEEDED = {"state", "train_step", "batches"}
_KNOWN = _NEEDED | {"evaluate", "stopper"}
# The axis along which members lie, for the one question they answer together.
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
    check_arguments(made["state"], functions.evaluate, functions.stopper, (), None)
    check_functions(functions)
    return functions, made["state"]


# A state may hold functions that `build` makes anew each time it is traced. So between
# programs there are only its leaves; each program puts them into a state of its own.


@functools.partial(jax.jit, static_argnames=("num_steps", "eval_every"))
def start(
    build: Any, members: Any, *, num_steps: int, eval_every: int
) -> tuple[Lane, jax.Array]:
    def one(member: Any) -> tuple[Lane, jax.Array]:
        functions, state = built(build, member)
        state = own(state)
        lane = first_lane(functions, judge_of(functions), state, num_steps, eval_every)
        return lane._replace(state=jax.tree.leaves(lane.state)), state.step

    return jax.vmap(one)(members)


@functools.partial(
    jax.jit, static_argnames=("num_steps", "eval_every"), donate_argnames="lanes"
)
def advance_all(
    build: Any,
    members: Any,
    lanes: Lane,
    step: jax.Array,
    until: jax.Array,
    smaller: jax.Array,
    *,
    num_steps: int,
    eval_every: int,
) -> tuple[jax.Array, Lane]:
    """Trains until a step, or until so few go on that a smaller batch holds them."""

    def one(member: Any, lane: Lane) -> tuple[jax.Array, Lane]:
        functions, state = built(build, member)
        judge = judge_of(functions)

        # The same for all members: a condition of each one's own would make the loop
        # choose between old and new states at every step.
        def goes_on(carry: tuple[jax.Array, Lane]) -> jax.Array:
            step, lane = carry
            running = jax.lax.psum((~lane.is_over).astype(jnp.int32), _AXIS)
            return (step < until) & (running > smaller)

        def go(carry: tuple[jax.Array, Lane]) -> tuple[jax.Array, Lane]:
            step, old = carry
            then = next_evaluation(step, num_steps, eval_every)
            new = advance(functions, judge, old, step, then)
            rows = new.rows
            new, old = new._replace(rows={}), old._replace(rows={})
            kept = jax.tree.map(functools.partial(jnp.where, old.is_over), old, new)
            return then, kept._replace(rows=rows)

        state = jax.tree.unflatten(jax.tree.structure(state), lane.state)
        carry = step, lane._replace(state=state)
        now, lane = jax.lax.while_loop(goes_on, go, carry)
        return now, lane._replace(state=jax.tree.leaves(lane.state))

    vmapped = jax.vmap(one, axis_name=_AXIS, out_axes=(None, 0))
    return vmapped(members, lanes)


@functools.partial(jax.jit, donate_argnums=0)
def put(everyone: Any, lanes: Any, places: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a.at[places].set(b), everyone, lanes)


@jax.jit
def pick(everyone: Any, places: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[places], everyone)


@jax.jit
@jax.vmap
def best_of(stop: EarlyStoppingState, params: Any) -> Any:
    has_best = functools.partial(jnp.where, stop.best_eval >= 0)
    return jax.tree.map(has_best, stop.best_params, params)
