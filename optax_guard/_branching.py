"""Taking a step or keeping what was: a branch where it is free, else a mask."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._clipping import map_inexact, select


def take_or_keep(
    is_taken: jax.Array,
    take: Callable[..., Any],
    keep: Callable[..., Any],
    *operands: Any,
    hides_bad: bool = False,
    use_cond: bool = False,
) -> Any:
    """``take(*operands)`` where ``is_taken``, else ``keep``.

    On CPU a masked result is a second copy of everything, and a branch is free; on TPU
    and GPU the mask fuses into the optimizer and a branch is what costs. There,
    ``hides_bad`` makes the first operand zeros where ``take`` does not count. With
    ``use_cond`` it is a branch everywhere.
    """
    # Under jit it is traced once for its shapes and for both platforms.
    take = jax.jit(take, inline=True)
    like = jax.eval_shape(take, *operands)

    def branch(*operands: Any) -> Any:
        return lax.switch(
            is_taken.astype(jnp.int32), [lambda *x: keep(like, *x), take], *operands
        )

    def mask(updates: Any, *others: Any) -> Any:
        seen = updates
        if hides_bad:
            # What is masked out must not have been NaN: its derivative is 0 * NaN.
            seen = map_inexact(
                lambda x: jnp.where(is_taken, x, jnp.zeros_like(x)), seen
            )
        return select(is_taken, take(seen, *others), keep(like, updates, *others))

    if use_cond:
        return branch(*operands)
    return lax.platform_dependent(*operands, cpu=branch, default=mask)


def cast_like(tree: Any, like: Any) -> Any:
    """``tree`` with the dtypes of ``like``, as both sides of a choice must have."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            "`inner` must not change the structure of its state in `update`, but "
            f"turned {jax.tree.structure(tree)} into {jax.tree.structure(like)}: a "
            "step that is withheld could not give the old state back."
        )

    def leaf(x: Any, y: Any) -> Any:
        if x.shape != y.shape:
            raise ValueError(
                "`inner` must not change shapes of its state in `update`, but turned "
                f"{x.shape} into {y.shape}. Is it a state of other parameters?"
            )
        return x if x.dtype == y.dtype else x.astype(y.dtype)

    return jax.tree.map(leaf, tree, like)
