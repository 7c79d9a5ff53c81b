"""The mean gradient and loss of some micro-batches, one after the other.

The loss is kept in two words. A rest of the gradient would be one more array as large
as the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._models import params_of
from optax_guard._norms.two_scales import accumulator_dtype
from optax_guard._norms.two_words import move_mean
from optax_guard._trees import is_inexact


def empty_mean(leaf: Any) -> Any:
    """Zeros, shaped and sharded like a parameter; no array if it has no gradient."""
    if not is_inexact(leaf):
        return optax.MaskedNode()
    dtype = leaf.dtype if jnp.iscomplexobj(leaf) else accumulator_dtype([leaf])
    return jnp.zeros_like(leaf, dtype=dtype)


def mean_with(
    updates: optax.Updates, mean: Any, num: jax.Array, is_dropped: jax.Array
) -> Any:
    """The mean gradient of ``num`` micro-batches, with these updates."""

    def leaf(g: Any, old: Any) -> Any:
        if not is_inexact(g):
            return old
        return running_mean(old, g.astype(old.dtype), num, is_dropped)

    return jax.tree.map(leaf, updates, mean)


def running_mean(
    mean: jax.Array, new: jax.Array, num: jax.Array, is_dropped: jax.Array
) -> jax.Array:
    """The mean of ``num`` values with ``new``; the first replaces the old mean."""
    weight = jnp.maximum(num, 1).astype(mean.dtype)
    # Halves, because the difference of two finite numbers may not be finite.
    difference = (new * 0.5 - mean * 0.5) / weight * 2.0
    moved = jnp.where(num <= 1, new, mean + difference)
    return jnp.where(is_dropped, mean, moved)


def mean_loss(
    words: tuple[jax.Array, jax.Array],
    new: jax.Array,
    num: jax.Array,
    is_dropped: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mean of ``num`` losses with ``new``, in two words."""
    number, rest = (jnp.where(num <= 1, 0.0, word) for word in words)
    moved = jnp.stack(move_mean(number, rest, new, num))
    number, rest = jnp.where(is_dropped, jnp.stack(words), moved)
    return number, rest


def as_gradients(mean: Any, grads: Any, params: Any) -> Any:
    """The mean as gradients; other leaves are those of the last micro-batch."""
    params = params_of(grads, params)

    def leaf(g: Any, mean: Any, param: Any) -> Any:
        if not is_inexact(g):
            return g
        return mean.astype(jnp.promote_types(g.dtype, param.dtype))

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(leaf, grads, mean, grads if params is None else params)
