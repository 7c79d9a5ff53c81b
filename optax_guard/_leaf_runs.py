"""Runs of neighbouring leaves: added up one by one, so that a bad one can be named."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The name of a bad leaf needs its own sum across devices. Up to this many sums travel
# in one all-reduce; trees with more leaves name a run of neighbouring leaves.
_MAX_RUNS = 128
# Long enough to hold the same leaf of several layers, which one reduction adds up.
_RUN_LENGTH = 32


def part_size(num_leaves: int) -> int:
    """How many neighbouring leaves make a run."""
    if num_leaves <= _MAX_RUNS:
        return 1
    return max(_RUN_LENGTH, -(-num_leaves // _MAX_RUNS))


def split(values: Sequence[Any]) -> list[list[Any]]:
    """Values, one of each leaf, in runs."""
    size = part_size(len(values))
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def first_bad(sums: Sequence[jax.Array], num_leaves: int) -> jax.Array:
    """Index of the first leaf of the first run whose sum is not finite, or -1."""
    bad = jnp.full((), -1, jnp.int32)
    for i in reversed(range(len(sums))):
        first = jnp.int32(i * part_size(num_leaves))
        bad = jnp.where(jnp.isfinite(sums[i]), bad, first)
    return bad


def mark_of(bad: jax.Array, leaves: list[jax.Array]) -> jax.Array:
    """A vector that is 1 at this device's first bad leaf."""
    return (jnp.arange(len(leaves), dtype=jnp.int32) == bad).astype(jnp.float32)


def first_true(marks: jax.Array) -> jax.Array:
    """Index of the first true entry of a vector, or -1."""
    return jnp.where(jnp.any(marks), jnp.argmax(marks), -1).astype(jnp.int32)


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
