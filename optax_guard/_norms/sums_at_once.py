"""Several sums over all entries of many leaves, in one read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._norms.alike import alike
from optax_guard._norms.leaf_runs import Part, add_pairwise, values_by_run

Sums = tuple[jax.Array, ...]
Terms = Callable[[jax.Array], Sums]
# How many first sums lie side by side in memory.
_LEAST_WIDTH, _MOST_WIDTH = 64, 4096


def sums_at_once(
    leaves: Sequence[jax.Array],
    part: Part,
    roles: Sequence[str],
    terms: Terms,
    depth: int,
) -> Sums:
    """Sums of ``terms`` over all entries of the leaves of one part.

    Args:
      leaves: Real floating arrays.
      part: The part of the tree that they are.
      roles: Their roles; see ``roles_of``.
      terms: Maps a leaf to several arrays of its shape, of one dtype.
      depth: On CPU, the number of entries that are added up to a first sum.
    """

    # Reductions of one operand are one fusion on TPU and GPU.
    def elsewhere(*leaves: jax.Array) -> Sums:
        runs = values_by_run(list(zip(roles, leaves, strict=True)), part.runs)
        groups = [group for run in runs for group in alike(run)]
        sums = [map(jnp.sum, _added(group, terms)) for group in groups]
        return tuple(map(add_pairwise, zip(*sums, strict=True)))

    def on_cpu(*leaves: jax.Array) -> Sums:
        # XLA would widen half precision once, for the norm and for these sums, and
        # keep all leaves in float32 between them.
        leaves = lax.optimization_barrier(leaves)
        return _on_cpu(alike(zip(roles, leaves, strict=True)), terms, depth)

    return lax.platform_dependent(*leaves, cpu=on_cpu, default=elsewhere)


def _added(group: Sequence[jax.Array], terms: Terms) -> Sums:
    """The terms of arrays of one shape, added entry by entry."""
    return tuple(map(add_pairwise, zip(*map(terms, group), strict=True)))


def _on_cpu(groups: list[list[jax.Array]], terms: Terms, depth: int) -> Sums:
    """The same by two stages.

    Each sum on its own would read the leaf again, and XLA has no fast code for a sum of
    what it must select or compare. One loop to several sums runs entry by entry, since
    the order of additions is fixed. But over so few entries LLVM unrolls it, and works
    on eight first sums in one instruction.
    """
    first: list[Sums] = []
    rests: dict[Any, list[jax.Array]] = {}
    for group in groups:
        if any(jax.typeof(group[0]).sharding.spec):
            # With a sharding in its type an array cannot be made flat without moving.
            first.append(tuple(map(jnp.sum, _added(group, terms))))
            continue
        flat = [x.reshape(-1) for x in group]
        deep = depth // len(group)
        width = _width(flat[0].size, deep)
        size = flat[0].size // (deep * width) * (deep * width)
        if size:
            blocks = [x[:size].reshape(-1, deep, width) for x in flat]
            first.append(_sum_axis(_added(blocks, terms), 1))
        if flat[0].size > size:
            rests.setdefault(flat[0].dtype, []).extend(x[size:] for x in flat)
    # What is less than a block of a leaf shares one loop with that of others.
    for rest in rests.values():
        all_terms = terms(jnp.concatenate(rest))
        padded = [jnp.pad(x, (0, -x.size % depth)) for x in all_terms]
        first.append(_sum_axis(tuple(x.reshape(depth, -1) for x in padded), 0))
    if not first:
        first.append(_added(groups[0], terms))  # All leaves are empty.
    columns = [
        jnp.concatenate([x.reshape(-1) for x in sums])
        for sums in zip(*first, strict=True)
    ]
    # Without a barrier XLA would sum each operand on its own, and add the sums in one
    # kernel, whose compile time grows with the square of their number.
    return tuple(map(jnp.sum, lax.optimization_barrier(columns)))


@functools.cache
def _width(size: int, depth: int) -> int:
    """The number of first sums of a block, if possible so that blocks leave no rest."""
    if size % depth == 0:
        for width in range(_MOST_WIDTH, _LEAST_WIDTH - 1, -1):
            if size // depth % width == 0:
                return width
    return 4 * _LEAST_WIDTH


def _sum_axis(terms: Sums, axis: int) -> Sums:
    zeros = tuple(jnp.zeros((), x.dtype) for x in terms)

    def add(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    return tuple(lax.reduce(terms, zeros, add, (axis,)))
