"""The mean gradient and loss of some micro-batches, one after the other.

The loss is kept in two words. A rest of the gradient would be one more array as large
as the parameters.

A mean moves by a number: how many micro-batches of the weight of the new one it is of.
Without weights this is the number of micro-batches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._checks import check_number, check_part
from optax_guard._models import params_of
from optax_guard._norms.statistics import as_float32
from optax_guard._norms.two_scales import accumulator_dtype
from optax_guard._norms.two_words import add_in_two_words, move_mean
from optax_guard._trees import is_inexact


def empty_mean(leaf: Any) -> Any:
    """Zeros, shaped and sharded like a parameter; no array if it has no gradient."""
    if not is_inexact(leaf):
        return optax.MaskedNode()
    dtype = leaf.dtype if jnp.iscomplexobj(leaf) else accumulator_dtype([leaf])
    return jnp.zeros_like(leaf, dtype=dtype)


def check_shapes(updates: optax.Updates, mean: Any) -> None:
    """Raises unless the gradients have the shapes of their accumulators."""
    gradients = [g for g in jax.tree.leaves(updates) if is_inexact(g)]
    means = jax.tree.leaves(mean)
    for g, one in zip(gradients, means, strict=False):
        shape = jnp.shape(g)
        if len(gradients) == len(means) and shape[1:] == one.shape != shape:
            raise ValueError(
                "`grads` of `accumulate` must have the shapes of the parameters, got "
                f"{shape} for {one.shape}. Gradients per example cannot be averaged "
                "over micro-batches before each is clipped. Aggregate them before the "
                "accumulation: `optax.chain(differentially_private_aggregate(...), "
                "accumulate(optimizer, every_k))`."
            )
    check_part(
        "accumulate",
        "parameters",
        mean,
        lambda: jax.tree.map(empty_mean, updates),
        "It was made for other parameters, or these updates are not shaped like them.",
    )


class Weight(NamedTuple):
    """The weight of a micro-batch, and that of its group with it.

    Attributes:
      total: The weight of the group in two words, each float32[].
      num: How many micro-batches of this weight weigh as much, float[]; at least 1.
      counts: bool[], whether it is not 0; or True.
      is_usable: bool[], whether it is finite and not negative, and the total finite;
        ``None`` if no weight was given.
    """

    total: tuple[jax.Array, jax.Array]
    num: jax.Array
    counts: jax.Array | bool = True
    is_usable: jax.Array | None = None


def weigh(before: tuple[jax.Array, jax.Array], weight: Any) -> Weight:
    """Adds a weight, 1 if it is ``None``, to that of the group before."""
    if weight is None:
        total = add_in_two_words(*before, jnp.float32(1))
        return Weight(total, total[0])
    check_number("weight", weight)
    number = as_float32(jnp.asarray(weight))
    total = add_in_two_words(*before, number)
    counts = number != 0
    # Float64 under x64, where gradients may be doubles.
    one, *words = (
        x.astype(jnp.result_type(float))
        for x in (jnp.where(counts, number, 1.0), *total)
    )
    is_usable = (number >= 0) & jnp.isfinite(total[0])
    return Weight(total, sum(words) / one, counts, is_usable)


def mean_with(
    updates: optax.Updates, mean: Any, num: jax.Array, is_added: jax.Array
) -> Any:
    """The mean gradient of ``num`` micro-batches, with these updates."""

    def leaf(g: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return old
        return running_mean(old, g.astype(old.dtype), num, is_added)

    return jax.tree.map(leaf, updates, mean)


def running_mean(
    mean: jax.Array, new: jax.Array, num: jax.Array, is_added: jax.Array
) -> jax.Array:
    """The mean of ``num`` values with ``new``; the first replaces the old mean."""
    weight = jnp.maximum(num, 1).astype(mean.dtype)
    # Halves, because the difference of two finite numbers may not be finite.
    difference = (new * 0.5 - mean * 0.5) / weight * 2.0
    moved = jnp.where(num <= 1, new, mean + difference)
    return jnp.where(is_added, moved, mean)


def mean_loss(
    words: tuple[jax.Array, jax.Array],
    new: jax.Array,
    num: jax.Array,
    is_added: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mean of ``num`` losses with ``new``, in two words."""
    number, rest = (jnp.where(num <= 1, 0.0, word) for word in words)
    moved = jnp.stack(move_mean(number, rest, new, num))
    number, rest = jnp.where(is_added, moved, jnp.stack(words))
    return number, rest


def as_gradients(mean: Any, grads: Any, params: Any) -> Any:
    """The mean as gradients; leaves without one are those of the last micro-batch."""
    params = params_of(grads, params)

    def leaf(g: Any, mean: Any, param: Any) -> Any:
        if isinstance(mean, optax.MaskedNode):
            return g
        return mean.astype(jnp.promote_types(g.dtype, param.dtype))

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(leaf, grads, mean, grads if params is None else params)
