"""The type of a threshold, and the helpers that all thresholds share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_positive
from optax_guard._trees import as_float

# The norm above which one clips (trigger), and the norm to clip to (target).
Limits = tuple[jax.Array, jax.Array]


class ParamNorms(NamedTuple):
    """Norms of the parameters whose updates are judged; S is the shape of the norms.

    Attributes:
      norms: float[S], the norms of the parameters.
      counts: float[S], how many parameters each of these norms is of.
      rms: float[], the root mean square of all parameters.
    """

    norms: jax.Array
    counts: jax.Array
    rms: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold:
    """Decides when to clip and what to clip to, by three pure functions.

    Not a transformation: pass it where a clip takes a number. ``start(shape)`` makes
    the state for norms of that shape. ``limits(norm, global_norm, state)`` gives the
    norm above which one clips and the norm to clip to, at most the former; neither is
    NaN, whatever the norm. ``learn(norm, clipped_norm, state)`` adds an update that was
    taken; norms that are not finite leave their entries of the state alone. All three
    work entry by entry. With ``unit``, limits are multiples of ``unit(param_norms)``,
    so that they can be relative to the parameters.
    """

    start: Callable[[tuple[int, ...]], Any]
    limits: Callable[[jax.Array, jax.Array, Any], Limits]
    learn: Callable[[jax.Array, jax.Array, Any], Any]
    unit: Callable[[ParamNorms], jax.Array] | None = None

    @property
    def init(self) -> NoReturn:
        """Raises, because the caller takes the threshold for a transformation."""
        raise TypeError(
            "A threshold is not a gradient transformation and cannot be chained. Pass "
            "it to one: `clip_by_global_norm(threshold)`."
        )

    update = init


def capped(
    limits: Callable[[jax.Array, jax.Array, Any], Limits],
    max_norm: ArrayLike | None,
) -> Callable[[jax.Array, jax.Array, Any], Limits]:
    """Adds ``max_norm`` to ``limits``, as a threshold that always holds."""
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
    """Whether a norm tells something about the scale of norms: finite, and not zero.

    Zeros come from parameters that took no part (an idle expert, LoRA's first step). A
    threshold that learnt them could fall to zero, and clip all later updates to that.
    """
    return jnp.isfinite(norm) & (norm > 0)


def end_of_row(
    is_unusual: jax.Array, length: jax.Array, warmup: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Decides whether a row of unusual norms restarts a threshold, and if it goes on.

    Args:
      is_unusual: bool[S], whether this norm is; one that is not ends the row.
      length: int32[S], length of the row with this norm.
      warmup: Length of a row that restarts the threshold.

    Returns:
      bool[S] and bool[S], at most one of them true.
    """
    is_restart = is_unusual & (length >= warmup)
    return is_restart, is_unusual & ~is_restart


def float32(value: ArrayLike) -> jax.Array:
    """Converts a setting to a float32 array."""
    return as_float(value, jnp.float32)


def where_norm(condition: jax.Array, new: Any, old: Any) -> Any:
    """Takes ``new`` for the norms where ``condition`` holds, and ``old`` for others.

    Args:
      condition: bool[S], with one entry for each norm.
      new: A state, whose leaves have shapes that begin with S.
      old: A state of the same class.

    Returns:
      A state of that class.
    """

    def where_leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        extra = (1,) * (b.ndim - condition.ndim)
        return jnp.where(condition.reshape(condition.shape + extra), a, b)

    return jax.tree.map(where_leaf, new, old)
