"""Running one operation at a time, on one device or on each of a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from optax_guard.debug._origin import is_bad
from optax_guard.debug._program import Program


class Devices(NamedTuple):
    """Where operations run: as they are, or on each device of a ``shard_map``.

    In the body of a ``shard_map`` a value differs between devices. It is held as one
    array whose leading axes are the axes of the mesh.

    Attributes:
      mesh: The mesh; ``None`` outside of ``shard_map``.
      axes: Names of the axes over which values differ.
      is_checked: Whether the types of values say over which axes they vary.
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()
    is_checked: bool = False

    def apply(
        self,
        function: Callable[..., Any],
        values: Sequence[Any],
        varying: Sequence[frozenset[Any]],
    ) -> Any:
        """``function`` of the values; on each device of the mesh, if there is one.

        Args:
          function: A function of what one device holds.
          values: The values.
          varying: For each, the axes over which its type says that it varies.
        """
        if not self.axes:
            return function(*values)
        if not self.is_checked:
            varying = [frozenset(self.axes)] * len(values)
        names = [tuple(a for a in self.axes if a in some) for some in varying]
        # The copies of a value that does not vary are equal. The first is taken.
        given = [
            x[tuple(slice(None) if a in own else 0 for a in self.axes)]
            for x, own in zip(values, names, strict=True)
        ]

        def on_one(*local: Any) -> Any:
            own = [
                lax.squeeze(x, range(len(n))) for x, n in zip(local, names, strict=True)
            ]
            return self.stacked(function(*own))

        in_specs = tuple(PartitionSpec(*own) for own in names)
        mapped = self.mapped(on_one, in_specs, PartitionSpec(*self.axes))
        return mapped(*given)

    def mapped(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Any:
        """``function`` under ``shard_map``."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=self.is_checked,
        )

    def stacked(self, tree: Any) -> Any:
        """Values of one device, with the leading axes."""
        axes = range(len(self.axes))
        return jax.tree.map(lambda x: lax.expand_dims(jnp.asarray(x), axes), tree)

    def shared(self, x: Any) -> jax.Array:
        """A value that is the same on all devices, with the leading axes."""
        x = jnp.asarray(x)
        sizes = tuple(self.mesh.shape[axis] for axis in self.axes)
        return jnp.broadcast_to(x, (*sizes, *x.shape))


class Operation:
    """An equation as a static argument of ``jit``: equal equations compile once."""

    def __init__(self, eqn: JaxprEqn) -> None:
        self.eqn = eqn
        self.key: Any = (eqn.primitive, tuple(sorted(eqn.params.items())))
        try:
            hash(self.key)
        except TypeError:  # A parameter is a list or an array.
            self.key = id(eqn)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and self.key == other.key

    def varying(self) -> list[frozenset[Any]]:
        """For each operand, the mesh axes over which its type says that it varies."""
        avals: list[Any] = [atom.aval for atom in self.eqn.invars]
        # Before JAX 0.10 it was called `vma`.
        return [
            aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
            for aval in avals
        ]

    def __call__(self, *operands: Any) -> list[Any]:
        """The results of the equation, always as a list."""
        given = self.eqn.primitive.get_bind_params(self.eqn.params)
        # Before JAX 0.10, with the bodies apart as functions.
        functions, params = given if isinstance(given, tuple) else ((), given)
        with self.eqn.ctx.manager:
            out = self.eqn.primitive.bind(*functions, *operands, **params)
        return list(out) if self.eqn.primitive.multiple_results else [out]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    devices: Devices, operation: Operation, *operands: jax.Array
) -> list[jax.Array]:
    return devices.apply(operation, operands, operation.varying())


# On its own, because in one program with each operation it would be compiled anew for
# each, which takes three times the time of the operations.
@jax.jit
def flags_of(x: jax.Array) -> jax.Array:
    """bool[2]: whether an array holds a NaN, and an Inf."""
    return jnp.stack([is_bad(kind, x).any() for kind in ("nan", "inf")])


def run(
    program: Program, devices: Devices, inputs: Sequence[Any], keep: Any, last: int
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Runs the first steps of a program.

    Args:
      program: The program.
      devices: Where it runs.
      inputs: Its inputs.
      keep: Numbers of the values to keep; others are freed after their last use.
      last: Number of steps.

    Returns:
      The values that are kept, and for all values whether they hold a NaN and an Inf.
    """
    values = dict(zip(program.inputs, inputs, strict=True))
    values |= {i: devices.shared(x) for i, x in program.constants.items()}
    # One program at a time: on CPU several with collectives can wait for each other.
    flags: dict[int, Any] = {
        i: jax.block_until_ready(flags_of(x)) for i, x in values.items()
    }
    steps = program.steps[:last]
    last_use = {i: n for n, step in enumerate(steps) for i in step.inputs}
    for n, step in enumerate(steps):
        if step.outputs:  # Others only print.
            operands = [values[i] for i in step.inputs]
            operation = Operation(step.eqn)
            # Older JAX has `pmap` as an operation, which must stay outside of `jit`.
            is_pmap = step.eqn.primitive.name == "xla_pmap"
            outputs = (
                operation(*operands) if is_pmap else _run(devices, operation, *operands)
            )
            jax.block_until_ready(outputs)
            values |= dict(zip(step.outputs, outputs, strict=True))
            flags |= {
                i: jax.block_until_ready(flags_of(values[i])) for i in step.outputs
            }
        for i in {*step.inputs, *step.outputs}:
            if last_use.get(i, n) <= n and i not in keep:
                values.pop(i, None)
    return values, jax.device_get(flags)
