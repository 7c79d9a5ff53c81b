"""Averages of the parameters at the last evaluations, in two copies for any number."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._trees import is_inexact
from optax_guard.stop._rule import as_int


class RecentParamsState(NamedTuple):
    """Means of parameters over two blocks of evaluations; part of a stopper's state.

    The blocks take turns. As soon as one is full, the other is empty, and is the next.

    Attributes:
      block_means: Two trees like the parameters, the mean over each block. Floating
        entries are float32, or wider if the parameters are. One that was finite at no
        evaluation of the block is not finite. Other leaves are those of the last
        evaluation. Of an empty block they mean nothing; at first they are the
        parameters given to `init`.
      block_sizes: Evaluations in each block, int32[2]; 0 at first.
      current_block: Index of the block of the last evaluation, int32, shape (); 0 at
        first.
    """

    block_means: tuple[Any, Any]
    block_sizes: jax.Array
    current_block: jax.Array


def no_recent(params: Any) -> RecentParamsState:
    """The state before the first evaluation, in buffers of its own."""

    def wide(leaf: Any) -> jax.Array:
        return jnp.array(leaf, _wide_dtype(leaf), copy=True)

    means = jax.tree.map(wide, params), jax.tree.map(wide, params)
    return RecentParamsState(means, jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32))


def add_recent(
    recent: RecentParamsState, params: Any, average_last: ArrayLike, takes: jax.Array
) -> RecentParamsState:
    """Adds the parameters of an evaluation to the current block, or to the next.

    Args:
      recent: The means.
      params: The parameters.
      average_last: Size of a block; may be traced.
      takes: Whether the evaluation enters at all, bool, shape ().
    """
    sizes, current = recent.block_sizes, recent.current_block
    size = sizes[current]
    is_full = size >= as_int(average_last)
    current = jnp.where(is_full, 1 - current, current)
    size = jnp.where(is_full, 0, size) + 1
    is_current = jnp.arange(2, dtype=jnp.int32) == current
    others = jnp.where(size >= as_int(average_last), 0, sizes)

    def add_to_mean(mean: jax.Array, new: Any) -> jax.Array:
        if not is_inexact(mean):
            return new
        new = jnp.asarray(new, mean.dtype)
        return jnp.where(size > 1, _mix(mean, new, jnp.ones_like(size), size), new)

    def added(i: int) -> Any:
        # Keep comes first: XLA then aliases the carry instead of copying it.
        return jax.lax.switch(
            (takes & is_current[i]).astype(jnp.int32),
            [
                lambda mean, _: mean,
                lambda mean, params: jax.tree.map(add_to_mean, mean, params),
            ],
            recent.block_means[i],
            params,
        )

    return RecentParamsState(
        (added(0), added(1)),
        jnp.where(takes, jnp.where(is_current, size, others), sizes),
        jnp.where(takes, current, recent.current_block),
    )


def average_of(recent: RecentParamsState, default: Any) -> Any:
    """The mean over both blocks in the dtypes of the default, which it is if empty."""
    sizes, current = recent.block_sizes, recent.current_block
    total = sizes[0] + sizes[1]

    def chosen(first: jax.Array, second: jax.Array, given: Any) -> jax.Array:
        if is_inexact(first):
            mean = _mix(first, second, sizes[1], total)
            mean = mean.astype(jnp.result_type(given))
        else:
            mean = jnp.where(current > 0, second, first)
        return jnp.where(total > 0, mean, given)

    return jax.tree.map(chosen, *recent.block_means, default)


def as_recent(params: Any) -> Any:
    """Shapes and dtypes of the means of such parameters, to compare trees."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), _wide_dtype(leaf)), params
    )


def _wide_dtype(leaf: Any) -> Any:
    dtype = jnp.result_type(leaf)
    is_narrow = is_inexact(leaf) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def _mix(
    old: jax.Array, new: jax.Array, part: jax.Array, whole: jax.Array
) -> jax.Array:
    """The mean of two leaves, without entries that are not finite.

    Args:
      old: A mean of so many that ``part`` are left of ``whole``.
      new: The mean of these.
      part: Evaluations in ``new``.
      whole: Evaluations in both.
    """
    dtype = jnp.finfo(old.dtype).dtype
    share = part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)
    # The products cannot overflow, and cancel where both are equal.
    mixed = old + (share * new - share * old)
    mixed = jnp.where(part < whole, jnp.where(part > 0, mixed, old), new)
    one = jnp.where(jnp.isfinite(new), new, old)
    return jnp.where(jnp.isfinite(old) & jnp.isfinite(new), mixed, one)
