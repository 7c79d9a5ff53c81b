"""Runs of neighbouring leaves have their own sums, so that bad ones are named."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._norms.marks import packed, run_size, unpacked
from optax_guard._norms.mesh_axes import Names, by_axes

# For each floating leaf the number of its run, in ascending order.
Runs = tuple[int, ...]


class Part(NamedTuple):
    """The leaves that are split over one set of mesh axes.

    Attributes:
      axes: The mesh axes.
      members: Indices of the leaves.
      runs: For each of these leaves its run among all leaves.
    """

    axes: Names
    members: tuple[int, ...]
    runs: Runs

    def of(self, values: Sequence[Any]) -> list[Any]:
        """Picks the values of these leaves from a list with one value for each leaf."""
        return [values[i] for i in self.members]


def parts_of(
    axes: Sequence[Names], indices: Sequence[int], num_leaves: int
) -> tuple[Part, ...]:
    """Sorts the floating leaves by the mesh axes over which they are split."""
    runs = [i // run_size(num_leaves) for i in indices]
    return tuple(
        Part(names, members, tuple(runs[i] for i in members))
        for names, members in by_axes(axes)
    )


def add_up(
    part: Part, sums: tuple[jax.Array, ...], marks: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Adds up over all devices, and joins their marks; in one all-reduce."""
    if not part.axes:
        return sums, marks
    bits = unpacked(marks).astype(jnp.float32)
    *sums_of_all, bits = lax.psum((*sums, bits), part.axes)
    return tuple(sums_of_all), packed(bits > 0)


def values_by_run(values: Sequence[Any], runs: Runs) -> list[list[Any]]:
    """Lists the values of each run, from one value for each leaf."""
    by_run: dict[int, list[Any]] = {}
    for run, value in zip(runs, values, strict=True):
        by_run.setdefault(run, []).append(value)
    return list(by_run.values())


def joined(marks: Sequence[jax.Array]) -> jax.Array:
    return combine(jnp.bitwise_or, marks)


def add_pairwise(values: Sequence[jax.Array]) -> jax.Array:
    """Adds arrays up; the rounding grows with the logarithm of their number."""
    return combine(jnp.add, values)


def combine(add: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Joins values by an associative operation, in a binary tree."""
    values = list(values)
    while len(values) > 1:
        odd = values[len(values) // 2 * 2 :]
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [add(a, b) for a, b in pairs] + odd
    return values[0]
