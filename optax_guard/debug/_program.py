"""A traced function as a flat list of operations."""

from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

# Primitives that only call their body. The flat list holds the body instead.
_CALLS = frozenset(
    """
    checkpoint closed_call core_call core_closed_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr jit pjit remat remat2
    """.split()  # noqa: SIM905 - a list of strings would take a line for each
)


class Step(NamedTuple):
    """One operation of a program.

    Attributes:
      eqn: The equation of the jaxpr.
      inputs: Numbers of the values that it reads.
      outputs: Numbers of the values that it makes.
      callers: The equations around it, outermost first: calls and loops.
    """

    eqn: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[JaxprEqn, ...]


class Program(NamedTuple):
    """A jaxpr without calls. Values have numbers in the place of variables."""

    steps: list[Step]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]


def flatten(closed: Any, callers: tuple[JaxprEqn, ...] = ()) -> Program:
    """The program of a jaxpr, open or closed, with the bodies of calls in their place.

    Args:
      closed: The jaxpr.
      callers: The equations around it.
    """
    steps: list[Step] = []
    constants: dict[int, Any] = {}
    count = 0

    def number(value: Any = None) -> int:
        nonlocal count
        count += 1
        if value is not None:
            constants[count] = value
        return count

    inputs = tuple(number() for _ in open_jaxpr(closed).invars)
    outputs = _inline(closed, inputs, callers, steps, number)
    return Program(steps, inputs, tuple(outputs), constants)


def _inline(
    closed: Any, inputs: Any, callers: Any, steps: list[Step], number: Any
) -> list[int]:
    """Appends the operations of a jaxpr; the numbers of its results."""
    jaxpr = open_jaxpr(closed)
    consts = closed.consts if isinstance(closed, ClosedJaxpr) else ()
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {v: number(x) for v, x in zip(jaxpr.constvars, consts, strict=True)}

    def read(atom: Any) -> int:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return number(np.asarray(atom.val, aval.dtype))
        return env[atom]

    for eqn in jaxpr.eqns:
        operands = tuple(map(read, eqn.invars))
        body = body_of_call(eqn)
        if body is None:
            results = tuple(number() for _ in eqn.outvars)
            steps.append(Step(eqn, operands, results, callers))
        else:
            results = _inline(body, operands, (*callers, eqn), steps, number)
        env |= dict(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside of a closed one, or itself."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def body_of_call(eqn: JaxprEqn) -> Any:
    """The jaxpr that a call runs; ``None`` if the equation is no call."""
    if eqn.primitive.name not in _CALLS:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next((eqn.params[name] for name in names if name in eqn.params), None)
