"""Thresholds: from a norm and its past, when to clip and what to clip to."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._base import check_positive, is_number
from optax_guard._statistics import increment


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold:
    """When to clip and what to clip to, as three pure functions.

    Not a transformation: pass it where a clip takes a number. ``start(shape)`` makes
    the state for norms of that shape; ``limits(norm, state)`` gives the norm above
    which one clips and the norm to clip to; ``learn(norm, clipped_norm, state)`` adds
    an update that was taken.
    """

    start: Callable[[tuple[int, ...]], Any]
    limits: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
    learn: Callable[[jax.Array, jax.Array, Any], Any]

    @property
    def init(self) -> NoReturn:
        """Raises: what asks for this takes the threshold for a transformation."""
        raise TypeError(
            "A threshold is not a gradient transformation and cannot be chained. Pass "
            "it to one: `clip_by_global_norm(threshold)`."
        )

    update = init


def as_threshold(name: str, value: Any) -> Threshold:
    """A threshold from a number, a schedule or a threshold.

    Args:
      name: The argument's name, for the error.
      value: A positive number, possibly traced; or a function from the number of
        updates taken so far to one, as in ``optax.schedules``; or a threshold.
    """
    if isinstance(value, Threshold):
        return value
    if is_number(value):
        check_positive(name, value, "To measure without clipping, use `record_norm()`.")
        return _constant(value)
    if callable(value) and not hasattr(value, "update"):
        return _scheduled(value)
    raise TypeError(
        f"`{name}` must be a positive number, a schedule or one of "
        f"`optax_guard.threshold`, got {value!r} of type {type(value).__name__}."
    )


def _constant(value: ArrayLike) -> Threshold:
    def limits(norm: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        del state
        limit = jnp.asarray(value).astype(norm.dtype)
        return limit, limit

    return Threshold(lambda shape: (), limits, lambda norm, clipped_norm, state: state)


def _scheduled(schedule: Callable[..., Any]) -> Threshold:
    def limits(norm: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        limit = jnp.asarray(schedule(state)).astype(norm.dtype)
        return limit, limit

    def learn(norm: jax.Array, clipped_norm: jax.Array, state: jax.Array) -> jax.Array:
        del norm, clipped_norm
        return increment(state, True)

    return Threshold(lambda shape: jnp.zeros((), jnp.int32), limits, learn)
