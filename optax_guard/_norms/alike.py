"""Leaves that one reduction adds up: the same leaf of several layers."""

import re
from collections.abc import Iterable
from typing import Any

import jax

# From five leaves on, XLA for GPUs begins to write the sum to memory.
_MOST_LEAVES = 4


def roles_of(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths without the number of the layer: the roles of leaves in their layer."""
    return tuple(re.sub(r"\d+", "*", path, count=1) for path in paths)


def alike(leaves: Iterable[tuple[str, jax.Array]]) -> list[list[jax.Array]]:
    """Groups of at most four leaves of one role and type.

    A GPU takes two or three kernels to reduce one leaf. With hundreds of leaves these
    are more kernels than the optimizer has. So leaves of one type are first added entry
    by entry. Under `jit` the type does not tell the sharding, and to add leaves of
    different shardings would move them; but the same leaf of another layer is sharded
    alike.

    Args:
      leaves: The role and the array of each leaf.
    """
    groups: dict[Any, list[jax.Array]] = {}
    for role, leaf in leaves:
        groups.setdefault((role, jax.typeof(leaf)), []).append(leaf)
    n = _MOST_LEAVES
    return [g[i : i + n] for g in groups.values() for i in range(0, len(g), n)]
