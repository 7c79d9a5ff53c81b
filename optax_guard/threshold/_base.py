"""What a threshold is, and what all of them share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_positive
from optax_guard._trees import as_float

Limits = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold:
    """When to clip and what to clip to, as three pure functions.

    Not a transformation: pass it where a clip takes a number. ``start(shape)`` makes
    the state for norms of that shape. ``limits(norm, global_norm, state)`` gives the
    norm above which one clips and the norm to clip to, at most the former; neither is
    NaN, whatever the norm. ``learn(norm, clipped_norm, state)`` adds an update that was
    taken; norms that are not finite leave their entries of the state alone. All three
    work entry by entry.
    """

    start: Callable[[tuple[int, ...]], Any]
    limits: Callable[[jax.Array, jax.Array, Any], Limits]
    learn: Callable[[jax.Array, jax.Array, Any], Any]

    @property
    def init(self) -> NoReturn:
        """Raises: what asks for this takes the threshold for a transformation."""
        raise TypeError(
            "A threshold is not a gradient transformation and cannot be chained. Pass "
            "it to one: `clip_by_global_norm(threshold)`."
        )

    update = init


def capped(
    limits: Callable[[jax.Array, jax.Array, Any], Limits],
    max_norm: ArrayLike | None,
) -> Callable[[jax.Array, jax.Array, Any], Limits]:
    """The same limits, and ``max_norm`` as one more that always holds."""
    if max_norm is None:
        return limits
    check_positive("max_norm", max_norm)

    def both(norm: jax.Array, global_norm: jax.Array, state: Any) -> Limits:
        trigger, target = limits(norm, global_norm, state)
        cap = as_float(max_norm, norm.dtype)
        # Between the two triggers only the cap is exceeded, and only it counts.
        target = jnp.where(norm > trigger, jnp.minimum(target, cap), cap)
        return jnp.minimum(trigger, cap), target

    return both


def is_informative(norm: jax.Array) -> jax.Array:
    """Whether a norm says something about the scale of norms: finite, and not zero.

    Zeros come from parameters that took no part (an idle expert, LoRA's first step). A
    threshold that learnt them could end at zero, and hold all later updates there.
    """
    return jnp.isfinite(norm) & (norm > 0)


def float32(value: ArrayLike) -> jax.Array:
    """A setting as an array; of float32 whatever it was given as."""
    return as_float(value, jnp.float32)


def where(condition: jax.Array, new: Any, old: Any) -> Any:
    """``jnp.where`` over two states of the same class, entry by entry of the norms."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        extra = (1,) * (b.ndim - condition.ndim)
        return jnp.where(condition.reshape(condition.shape + extra), a, b)

    return jax.tree.map(leaf, new, old)
