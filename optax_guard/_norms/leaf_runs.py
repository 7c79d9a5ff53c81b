"""Runs of neighbouring leaves: added up one by one, so that a bad one can be named."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._norms.mesh_axes import Names, by_axes

# The name of a bad leaf needs its own sum across devices. Up to this many sums travel
# in one all-reduce; trees with more leaves name a run of neighbouring leaves.
_MAX_RUNS = 128
# Long enough to hold the same leaf of several layers, which one reduction adds up.
_RUN_LENGTH = 32

# For each floating leaf the index of the first one of its run, in ascending order.
Runs = tuple[int, ...]


def part_size(num_leaves: int) -> int:
    """How many neighbouring leaves make a run."""
    if num_leaves <= _MAX_RUNS:
        return 1
    return max(_RUN_LENGTH, -(-num_leaves // _MAX_RUNS))


class Part(NamedTuple):
    """The leaves that are split over one set of mesh axes.

    Attributes:
      axes: The mesh axes.
      members: Indices of the leaves.
      runs: For each of them its run among all leaves.
    """

    axes: Names
    members: tuple[int, ...]
    runs: Runs

    def of(self, values: Sequence[Any]) -> list[Any]:
        """What belongs to these leaves, of values for all."""
        return [values[i] for i in self.members]


def parts_of(
    axes: Sequence[Names], indices: Sequence[int], num_leaves: int
) -> tuple[Part, ...]:
    """The floating leaves of a tree, by the mesh axes over which they are split."""
    size, first = part_size(num_leaves), {}
    runs = [first.setdefault(i // size, i) for i in indices]
    return tuple(
        Part(names, members, tuple(runs[i] for i in members))
        for names, members in by_axes(axes)
    )


def add_up(
    part: Part, sums: tuple[jax.Array, ...], bad: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Sums over all devices, and the first bad leaf of any; one all-reduce."""
    if not part.axes:
        return sums, bad
    *sums_of_all, marks = lax.psum((*sums, _mark_of(bad, part.runs)), part.axes)
    return tuple(sums_of_all), _first_marked(marks, part.runs)


def split(values: Sequence[Any], runs: Runs) -> list[list[Any]]:
    """Values, one of each leaf, in runs."""
    parts: dict[int, list[Any]] = {}
    for run, value in zip(runs, values, strict=True):
        parts.setdefault(run, []).append(value)
    return list(parts.values())


def first_bad(sums: Sequence[jax.Array], runs: Runs) -> jax.Array:
    """Index of the first leaf of the first run whose sum is not finite, or -1."""
    bad = jnp.full((), -1, jnp.int32)
    for run, total in reversed(list(zip(_distinct(runs), sums, strict=True))):
        bad = jnp.where(jnp.isfinite(total), bad, jnp.int32(run))
    return bad


def first_true(marks: jax.Array, runs: Runs) -> jax.Array:
    """Index of the first leaf of the run of the first true one of all leaves, or -1."""
    first = jnp.array(runs, jnp.int32)[jnp.argmax(marks)]
    return jnp.where(jnp.any(marks), first, -1)


def earliest(bad: Sequence[jax.Array]) -> jax.Array:
    """The smallest index that is not -1, or -1."""
    return combine(
        lambda a, b: jnp.where(a < 0, b, jnp.where(b < 0, a, jnp.minimum(a, b))), bad
    )


def add_pairwise(values: Sequence[jax.Array]) -> jax.Array:
    """Sum of arrays; its rounding grows with the logarithm of their number."""
    return combine(jnp.add, values)


def combine(add: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Values joined by an associative operation, in a tree of pairs."""
    values = list(values)
    while len(values) > 1:
        odd = values[len(values) // 2 * 2 :]
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [add(a, b) for a, b in pairs] + odd
    return values[0]


def _distinct(runs: Runs) -> np.ndarray:
    return np.unique(runs)


def _mark_of(bad: jax.Array, runs: Runs) -> jax.Array:
    """A vector that is 1 at this device's first bad run."""
    return (jnp.array(_distinct(runs), jnp.int32) == bad).astype(jnp.float32)


def _first_marked(marks: jax.Array, runs: Runs) -> jax.Array:
    """Index of the first leaf of the first run that some device has marked, or -1."""
    first = jnp.array(_distinct(runs), jnp.int32)[jnp.argmax(marks > 0)]
    return jnp.where(jnp.any(marks > 0), first, -1)
