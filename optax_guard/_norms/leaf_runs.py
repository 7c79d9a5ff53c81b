"""Runs of neighbouring leaves have their own sums, so that a bad one is named."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._norms.mesh_axes import Names, by_axes

# To name a bad leaf, devices must exchange a mark for each leaf. One all-reduce takes
# up to this many marks; in a tree with more leaves, a run of neighbours shares one.
_MAX_RUNS = 128
# So long a run holds the same leaf of several layers, which one reduction adds up.
_RUN_LENGTH = 32

# For each floating leaf the index of the first one of its run, in ascending order.
Runs = tuple[int, ...]


def run_size(num_leaves: int) -> int:
    """Says how many neighbouring leaves make a run."""
    if num_leaves <= _MAX_RUNS:
        return 1
    return max(_RUN_LENGTH, -(-num_leaves // _MAX_RUNS))


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
    size, first = run_size(num_leaves), {}
    runs = [first.setdefault(i // size, i) for i in indices]
    return tuple(
        Part(names, members, tuple(runs[i] for i in members))
        for names, members in by_axes(axes)
    )


def add_up(
    part: Part, sums: tuple[jax.Array, ...], bad: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Adds up over all devices, and finds the first bad leaf; in one all-reduce."""
    if not part.axes:
        return sums, bad
    *sums_of_all, marks = lax.psum((*sums, _mark_of(bad, part.runs)), part.axes)
    return tuple(sums_of_all), _first_marked(marks, part.runs)


def values_by_run(values: Sequence[Any], runs: Runs) -> list[list[Any]]:
    """Lists the values of each run, from one value for each leaf."""
    by_run: dict[int, list[Any]] = {}
    for run, value in zip(runs, values, strict=True):
        by_run.setdefault(run, []).append(value)
    return list(by_run.values())


def first_bad(sums: Sequence[jax.Array], runs: Runs) -> jax.Array:
    """Finds the first run with a sum that is not finite: its first leaf, or -1."""
    bad = jnp.full((), -1, jnp.int32)
    for run, total in reversed(list(zip(_distinct(runs), sums, strict=True))):
        bad = jnp.where(jnp.isfinite(total), bad, jnp.int32(run))
    return bad


def first_true(marks: jax.Array, runs: Runs) -> jax.Array:
    """Finds the run of the first leaf with a true mark: its first leaf, or -1."""
    first = jnp.array(runs, jnp.int32)[jnp.argmax(marks)]
    return jnp.where(jnp.any(marks), first, -1)


def earliest(bad: Sequence[jax.Array]) -> jax.Array:
    """Finds the smallest index that is not -1; -1 if there is none."""
    return combine(
        lambda a, b: jnp.where(a < 0, b, jnp.where(b < 0, a, jnp.minimum(a, b))), bad
    )


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


def _distinct(runs: Runs) -> np.ndarray:
    return np.unique(runs)


def _mark_of(bad: jax.Array, runs: Runs) -> jax.Array:
    """Returns a vector with a 1 at this device's first bad run, and 0 elsewhere."""
    return (jnp.array(_distinct(runs), jnp.int32) == bad).astype(jnp.float32)


def _first_marked(marks: jax.Array, runs: Runs) -> jax.Array:
    """Finds the first run that some device has marked: its first leaf, or -1."""
    first = jnp.array(_distinct(runs), jnp.int32)[jnp.argmax(marks > 0)]
    return jnp.where(jnp.any(marks > 0), first, -1)
