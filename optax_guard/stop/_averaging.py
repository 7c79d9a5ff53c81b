"""Averages of the parameters at the last evaluations, in two copies for any number."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._trees import is_inexact
from optax_guard.stop._rule import as_int


class RecentParamsState(NamedTuple):
    """Means of parameters over two blocks of evaluations; part of a stopper's state.

    The means are trees like the parameters. Their entries are float32, or of a wider
    dtype that the parameters have. Leaves that are not floating hold the newest.

    Attributes:
      older: Mean over the block of evaluations before the current one; the parameters
        given to `init` until there is one.
      newer: Mean over the current block; at first the parameters given to `init`, later
        anything until the block has an evaluation.
      block_sizes: Evaluations in ``older`` and in ``newer``, int32[2]; 0 at first.
    """

    older: Any
    newer: Any
    block_sizes: jax.Array


def no_recent(params: Any) -> RecentParamsState:
    """The state before the first evaluation, in buffers of its own."""

    def wide(leaf: Any) -> jax.Array:
        return jnp.array(leaf, _wide_dtype(leaf), copy=True)

    older, newer = jax.tree.map(wide, params), jax.tree.map(wide, params)
    return RecentParamsState(older, newer, jnp.zeros(2, jnp.int32))


def add_recent(
    recent: RecentParamsState, params: Any, average_last: ArrayLike, takes: jax.Array
) -> RecentParamsState:
    """Adds the parameters of an evaluation to the current block.

    A block that is full becomes the one before.

    Args:
      recent: The means.
      params: The parameters.
      average_last: Size of a block; may be traced.
      takes: Whether the evaluation enters at all, bool, shape ().
    """
    size = recent.block_sizes[1] + 1
    closes = size >= as_int(average_last)

    def moved() -> Any:
        return _toward(recent.newer, params, jnp.ones_like(size), size)

    # Keep comes first: XLA then aliases the carry instead of copying it.
    older, newer = jax.lax.switch(
        jnp.where(takes, 1 + closes, 0),
        [
            lambda: (recent.older, recent.newer),
            lambda: (recent.older, moved()),
            lambda: (moved(), recent.newer),
        ],
    )
    sizes = jnp.stack([recent.block_sizes[0], size])
    sizes = jnp.where(closes, jnp.stack([size, jnp.zeros_like(size)]), sizes)
    sizes = jnp.where(takes, sizes, recent.block_sizes)
    return RecentParamsState(older, newer, sizes)


def average_of(recent: RecentParamsState, default: Any) -> Any:
    """The mean over both blocks in the dtypes of the default, which it is if empty."""
    size = recent.block_sizes[1]
    total = recent.block_sizes[0] + size
    mean = _toward(recent.older, recent.newer, size, total)

    def chosen(leaf: Any, given: Any) -> jax.Array:
        return jnp.where(total > 0, leaf.astype(jnp.result_type(given)), given)

    return jax.tree.map(chosen, mean, default)


def as_recent(params: Any) -> Any:
    """Shapes and dtypes of the means of such parameters, to compare trees."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), _wide_dtype(leaf)), params
    )


def _wide_dtype(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    is_narrow = is_inexact(leaf) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def _toward(mean: Any, params: Any, part: jax.Array, whole: jax.Array) -> Any:
    """Moves a mean by a share toward parameters; entries that are not finite do not."""

    def moved(old: jax.Array, new: Any) -> jax.Array:
        if not is_inexact(old):
            return jnp.where(part > 0, new, old)
        new = jnp.asarray(new, old.dtype)
        dtype = jnp.finfo(old.dtype).dtype
        share = part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)
        # The products cannot overflow, and cancel where both are equal.
        mixed = old + (share * new - share * old)
        mixed = jnp.where(jnp.isfinite(old) & (part < whole), mixed, new)
        return jnp.where(jnp.isfinite(new) & (part > 0), mixed, old)

    return jax.tree.map(moved, mean, params)
