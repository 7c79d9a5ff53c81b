"""The way back through a loop: compiled up to the iteration that failed."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from optax_guard.debug._entries import Entry, Scene
from optax_guard.debug._execution import Devices, Operation
from optax_guard.debug._origin import NonfiniteOrigin, is_bad
from optax_guard.debug._program import flatten, open_jaxpr

_MOST = np.iinfo(np.int32).max


class Loop:
    """A ``scan`` or a ``while`` in one form: constants, a carry, and rows of inputs."""

    def __init__(self, eqn: JaxprEqn) -> None:
        params = eqn.params
        self.is_scan = eqn.primitive.name == "scan"
        self.body = params["jaxpr" if self.is_scan else "body_jaxpr"]
        if self.is_scan:
            self.length = params["length"]
            self.is_reversed = params["reverse"]
            self.first_const = 0
            self.first_carry = params["num_consts"]
            self.num_carry = params["num_carry"]
        else:
            self.length = _MOST  # As many as its condition allows.
            self.is_reversed = False
            self.condition = params["cond_jaxpr"]
            self.first_const = params["cond_nconsts"]
            self.first_carry = self.first_const + params["body_nconsts"]
            self.num_carry = len(eqn.outvars)

    def split(self, operands: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """Constants of the body, first carry, inputs with a row for each iteration."""
        first_row = self.first_carry + self.num_carry
        return (
            operands[self.first_const : self.first_carry],
            operands[self.first_carry : first_row],
            operands[first_row:],
        )

    def row(self, iteration: Any) -> Any:
        """The row of the inputs that an iteration reads, and the inverse of that."""
        return self.length - 1 - iteration if self.is_reversed else iteration

    def goes_on(self, operands: Sequence[Any], carry: Any) -> Any:
        """Whether the condition of a ``while`` holds."""
        if self.is_scan:
            return True
        return _call(self.condition, *operands[: self.first_const], *carry)[0]


def enter_loop(scene: Scene, entry: Entry) -> NonfiniteOrigin | Entry | None:
    """Goes into the iteration in which an entry first turned bad, then further back."""
    _, step, devices, operands, kind = scene
    loop = Loop(step.eqn)
    program = flatten(loop.body, (*step.callers, step.eqn))
    consts, _, rows = loop.split(operands)
    axis = len(devices.axes)
    position, index = entry
    iteration = loop.length
    if position >= loop.num_carry:
        iteration = loop.row(index[axis])
        index = (*index[:axis], *index[axis + 1 :])
    while True:
        if position < loop.num_carry:
            iteration = _last_good(scene, iteration, Entry(position, index))
            if iteration < 0:
                return Entry(loop.first_carry + position, index)
        state = _advance(scene, iteration)[0]
        row = loop.row(iteration)
        at_row = [lax.index_in_dim(x, row, axis, keepdims=False) for x in rows]
        source = scene.walk_back(
            program,
            devices,
            [*consts, *state, *at_row],
            {program.outputs[position]: index},
            kind,
        )
        if isinstance(source, NonfiniteOrigin):
            return source._replace(iteration=(row, *source.iteration))
        if source is None:
            return None
        if source.position < len(consts):
            return Entry(loop.first_const + source.position, source.at)
        position, index = source.position - len(consts), source.at
        if position >= loop.num_carry:
            at = (*index[:axis], row, *index[axis:])
            return Entry(loop.first_carry + position, at)


def _last_good(scene: Scene, limit: int, entry: Entry) -> int:
    """The iteration before which an entry of the carry was last good; -1: never."""
    device = entry.at[: len(scene.devices.axes)]
    return int(_advance(scene, limit, entry)[1][device])


def _advance(scene: Scene, limit: int, entry: Entry | None = None) -> Any:
    """The carry before an iteration, and when an entry of it was last good."""
    devices = scene.devices
    position, index = (None, ()) if entry is None else entry
    index = np.array(index[len(devices.axes) :], np.int32)
    numbers = [devices.shared(np.int32(limit)), devices.shared(index)]
    operation = Operation(scene.step.eqn)
    return _compiled(
        devices, operation, scene.kind, position, *scene.operands, *numbers
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(
    devices: Devices,
    operation: Operation,
    kind: str,
    position: int | None,
    *operands: jax.Array,
) -> Any:
    function = functools.partial(_iterate, Loop(operation.eqn), kind, position)
    varying = [*operation.varying(), frozenset(), frozenset()]
    return devices.apply(function, operands, varying)


def _iterate(loop: Loop, kind: str, position: int | None, *given: Any) -> Any:
    """Runs a loop for some iterations.

    Args:
      loop: The loop.
      kind: ``"nan"`` or ``"inf"``.
      position: Which part of the carry holds the entry; ``None`` if there is none.
      *given: The operands of the loop, the number of iterations, the entry's index.

    Returns:
      The carry, and the number of the last iteration before which the entry was good.
    """
    *operands, limit, index = given
    consts, carry, rows = loop.split(operands)

    def last_good(count: Any, carry: Any, before: Any) -> Any:
        if position is None:
            return before
        bad = is_bad(kind, carry[position])[tuple(index)]
        return jnp.where(bad, before, count)

    def goes_on(state: Any) -> Any:
        count, carry, _ = state
        return (count < limit) & loop.goes_on(operands, carry)

    def advance(state: Any) -> Any:
        count, carry, good = state
        at = [lax.dynamic_index_in_dim(x, loop.row(count), 0, False) for x in rows]
        carry = _call(loop.body, *consts, *carry, *at)[: loop.num_carry]
        return count + 1, carry, last_good(count + 1, carry, good)

    zero = jnp.int32(0)
    first = (zero, list(carry), last_good(zero, carry, jnp.int32(-1)))
    _, carry, good = lax.while_loop(goes_on, advance, first)
    return carry, good


def _call(jaxpr: Any, *operands: Any) -> list[Any]:
    consts = getattr(jaxpr, "consts", ())
    return jaxpr_as_fun(ClosedJaxpr(open_jaxpr(jaxpr), consts))(*operands)
