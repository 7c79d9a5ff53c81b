"""The type of a skip rule, its inputs, and the reasons of skipped steps."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
from jax.typing import ArrayLike


class SkipReason(enum.IntEnum):
    """Why a guard skipped a step. Numbers are checkpointed and never reused.

    Attributes:
      NONE: The step was taken.
      NONFINITE: The gradients hold a NaN or an infinity.
      NONFINITE_VALUE: The loss is one; or, in `accumulate`, the ``weight`` is negative
        or not finite.
      NORM_ABOVE: The rule ``norm_above``.
      SPIKE: The rule ``spike``.
      OVERFLOW: The norm after clipping is above 1.8e19, so float32 cannot hold its
        square, which Adam and its kin accumulate.
      NONFINITE_UPDATE: The optimizer made non-finite parameters or moments of finite
        gradients, and all entries that are looked at kept their old values.
      NONFINITE_PARAMS: Gradients, loss or update are not finite, and neither were the
        parameters before the step. Of these the smallest leaves are looked at, at most
        1/1024 of all entries, or a part of one leaf. `accumulate` does not look at them
        for each micro-batch, and says NONFINITE.
    """

    NONE = 0
    NONFINITE = 1
    NONFINITE_VALUE = 2
    NORM_ABOVE = 3
    SPIKE = 4
    OVERFLOW = 5
    NONFINITE_UPDATE = 6
    NONFINITE_PARAMS = 7


def is_nonfinite(reason: jax.Array) -> jax.Array:
    """Whether a step was skipped for its gradients or its loss, not by a rule.

    They held a NaN or an infinity, or were too large for float32.

    Args:
      reason: A ``SkipReason`` as the guard's state holds it, int32[].

    Returns:
      bool[].

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_guard import skip
      >>> bool(skip.is_nonfinite(jnp.int32(skip.SkipReason.NONFINITE)))
      True
    """
    is_of_gradients = (reason == SkipReason.NONFINITE) | (reason == SkipReason.OVERFLOW)
    is_of_others = reason == SkipReason.NONFINITE_VALUE
    return is_of_gradients | is_of_others | (reason == SkipReason.NONFINITE_PARAMS)


class Signals(NamedTuple):
    """The inputs of a skip rule, measured at one step. Both are finite.

    Attributes:
      grad_norm: float[], the global norm before clipping.
      value: float32[], the loss given to ``update`` as ``value=``; ``None`` if it was
        not given.
    """

    grad_norm: jax.Array
    value: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class SkipRule:
    """Decides which finite steps to skip, by pure functions, and names the reason.

    ``start()`` makes the state. ``judge(signals, state)`` says whether to skip.
    ``learn(signals, is_skipped, state)`` adds a finite step. After ``max_consecutive``
    steps that rules have skipped since the last one taken, the guard overrules the rule
    where it fires, and takes the step. Then ``restart(state)`` makes a new state; if it
    is ``None``, ``start()`` does.
    """

    reason: SkipReason
    start: Callable[[], Any]
    judge: Callable[[Signals, Any], jax.Array]
    learn: Callable[[Signals, jax.Array, Any], Any]
    max_consecutive: ArrayLike
    restart: Callable[[Any], Any] | None = None

    @property
    def init(self) -> NoReturn:
        """Raises, because the caller takes the rule for a transformation."""
        raise TypeError(
            "A skip rule is not a gradient transformation and cannot be chained. Pass "
            "it to the guard: `guard(optimizer, skip=rule)`."
        )

    update = init
