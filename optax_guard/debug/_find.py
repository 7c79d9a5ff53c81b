"""Finding the operation that made a result non-finite."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._trees import is_inexact, path_names
from optax_guard.debug._entries import Entry
from optax_guard.debug._execution import Devices, run
from optax_guard.debug._origin import NonfiniteOrigin, first_bad_entry, summarize
from optax_guard.debug._program import Program, flatten
from optax_guard.debug._source import NOWHERE, find_place
from optax_guard.debug._walk import KINDS, walk_back


class Traced(NamedTuple):
    """A function traced at its arguments.

    Attributes:
      program: Its operations.
      inputs: The arrays among the arguments.
      names: The name of each, such as ``args/0/x``.
      first_result: The type of the first array that it returns; ``None`` if it returns
        none.
    """

    program: Program
    inputs: list[Any]
    names: list[str]
    first_result: Any

    def inputs_of(self, argument: str) -> list[int]:
        """The numbers of the inputs that belong to an argument, such as ``args/1``."""
        pairs = zip(self.program.inputs, self.names, strict=True)
        return [i for i, name in pairs if f"{name}/".startswith(f"{argument}/")]


def find_nonfinite(
    fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> NonfiniteOrigin | None:
    """Finds the operation that made a result NaN or infinite, and its source line.

    The function is traced, and its operations run one by one. The search goes from a
    bad entry of the result back through the operations that passed it on. If the result
    holds a NaN, the origin is the operation that made it from entries without NaN. Else
    it is the one that made an Inf from finite entries. A value that a ``where``
    discards is no origin. The search goes into ``jit``, ``grad``, ``vmap``, loops,
    branches, ``checkpoint``, custom derivatives, ``shard_map`` and ``pmap``.

    Operations run as they are written. A NaN that arises only because the compiler
    fuses or reorders them is not found. One that the compiler hides is found.

    Args:
      fn: The function, such as ``jax.value_and_grad(loss)`` or ``tx.update``.
      *args: Its arguments. All arrays in them are traced, those in modules of Equinox
        and NNX included. Other values stay as they are.
      **kwargs: Its keyword arguments, likewise.

    Returns:
      A `NonfiniteOrigin`, which prints as text; ``None`` if the result is finite.

    Raises:
      TypeError: If ``fn`` is no function.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> def mean(x, mask):
      ...     return jnp.sum(x * mask) / jnp.sum(mask)
      >>> origin = og.debug.find_nonfinite(mean, jnp.ones(3), jnp.zeros(3))
      >>> origin.kind, origin.primitive, origin.function
      ('nan', 'div', 'mean')
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function, got {fn!r}.")
    traced = trace(fn, args, kwargs)
    return origin_among(traced, traced.program.outputs)


def trace(
    fn: Callable[..., Any], args: Any, kwargs: Any, *, of_gradient: bool = False
) -> Traced:
    """Traces a function. Arrays among its arguments are inputs, all else stays.

    Args:
      fn: The function.
      args: Its arguments.
      kwargs: Its keyword arguments.
      of_gradient: Whether to trace the gradient of the first result, by all floating
        inputs.
    """
    rest, state, rebuild = _split_modules((args, kwargs))
    leaves, treedef = jax.tree.flatten((rest, state))
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def on_arrays(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            filled[i] = x
        args, kwargs = rebuild(*jax.tree.unflatten(treedef, filled))
        rest, state, _ = _split_modules(fn(*args, **kwargs))
        return [x for x in jax.tree.leaves((rest, state)) if isinstance(x, jax.Array)]

    inputs = [leaves[i] for i in places]
    traced: Callable[..., Any] = on_arrays
    floating = tuple(i for i, x in enumerate(inputs) if is_inexact(x))
    if of_gradient and floating:
        traced = jax.grad(lambda *arrays: on_arrays(*arrays)[0], floating)
    names = [f"args/{name}" for name in path_names(rest[0])]
    names += [f"kwargs/{name}" for name in path_names(rest[1])]
    names += [f"modules/{name}" for name in path_names(state)]
    jaxpr = jax.make_jaxpr(traced)(*inputs)
    first = next(iter(jaxpr.out_avals), None)
    return Traced(flatten(jaxpr), inputs, [names[i] for i in places], first)


def _is_array(x: Any) -> bool:
    """Whether JAX can trace a value as an array, as it can none of text or objects."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "OSUMm"
    return isinstance(x, jax.Array)


def _split_modules(tree: Any) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """A tree without its NNX modules, their state, and the way back.

    The way back builds new modules, so that those of the caller do not change.
    """
    nnx = sys.modules.get("flax.nnx")
    # Before Flax 0.12 a module was no pytree, and an optimizer was no module.
    classes = () if nnx is None else (nnx.Module, nnx.Optimizer, nnx.Rngs)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, classes))
    places = [i for i, x in enumerate(leaves) if isinstance(x, classes)]
    if nnx is None or not places:
        return tree, (), lambda rest, state: rest
    # Together, because an optimizer may hold the model that stands beside it.
    graph, state = nnx.split([leaves[i] for i in places])
    without = [None if i in places else x for i, x in enumerate(leaves)]

    def rebuild(rest: Any, state: Any) -> Any:
        filled = treedef.flatten_up_to(rest)
        for i, module in zip(places, nnx.merge(graph, state), strict=True):
            filled[i] = module
        return jax.tree.unflatten(treedef, filled)

    return jax.tree.unflatten(treedef, without), state, rebuild


def origin_among(traced: Traced, targets: Sequence[int]) -> NonfiniteOrigin | None:
    """The origin of the bad values among ``targets``; ``None`` if all are finite."""
    program, devices = traced.program, Devices()
    flags = run(program, devices, traced.inputs, (), len(program.steps))[1]
    kind, bad = choose(flags, targets)
    if not bad:
        return None
    source = walk_back(program, devices, traced.inputs, bad, kind, flags)
    return as_origin(traced, source, kind, min(bad))


def choose(
    flags: Mapping[int, Any], targets: Sequence[int]
) -> tuple[str, dict[int, None]]:
    """The values with a NaN, or if there is none those with an Inf, for `walk_back`."""
    for n, kind in enumerate(KINDS):
        bad = dict.fromkeys(i for i in targets if flags[i][n])
        if bad:
            return kind, bad
    return "", {}


def as_origin(
    traced: Traced, source: NonfiniteOrigin | Entry | None, kind: str, target: int
) -> NonfiniteOrigin:
    """The origin; if no operation made the bad entry, one of its input or constant."""
    if isinstance(source, NonfiniteOrigin):
        return source
    return _bad_from_the_start(traced, source, kind, target)


def _bad_from_the_start(
    traced: Traced, source: Entry | None, kind: str, target: int
) -> NonfiniteOrigin:
    """The record of an argument or a constant that was bad before any operation."""
    program = traced.program
    if source is None:
        name, array, number = "constant", program.constants[target], target
        advice = "A constant of the function is bad itself."
    else:
        name, array = "input", traced.inputs[source.position]
        number = program.inputs[source.position]
        argument = traced.names[source.position]
        advice = f"`{argument}` is bad already: look where it is made."
    array = jnp.asarray(array)
    reader = next((step for step in program.steps if number in step.inputs), None)
    place = NOWHERE if reader is None else find_place(reader)
    summary = summarize(array)
    return NonfiniteOrigin(
        kind=kind,
        primitive=name,
        **place._asdict(),
        operands=(),
        result=summary,
        num_bad=summary.num_nan if kind == "nan" else summary.num_inf,
        first_bad=first_bad_entry(kind, array) if source is None else source.at,
        iteration=(),
        advice=advice,
    )
