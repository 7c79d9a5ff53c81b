"""Skip rules: which finite steps to withhold. Non-finite ones always are."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._base import check_positive


class SkipReason(enum.IntEnum):
    """Why a guard withheld a step. Numbers are checkpointed and never reused."""

    NONE = 0
    NONFINITE = 1
    NONFINITE_VALUE = 2
    NORM_ABOVE = 3
    SPIKE = 4


class Signals(NamedTuple):
    """What a skip rule sees of a step. Both are finite when a rule is asked.

    Attributes:
      grad_norm: float[], the global norm before clipping.
      value: float32[], the loss given to ``update`` as ``value=``; ``None`` if it was
        not given.
    """

    grad_norm: jax.Array
    value: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class SkipRule:
    """A rule of which steps to withhold, as pure functions and the reason they give.

    ``start()`` makes the state; ``judge(signals, state)`` says whether to withhold;
    ``learn(signals, is_skipped, state)`` adds a finite step.
    """

    reason: SkipReason
    start: Callable[[], Any]
    judge: Callable[[Signals, Any], jax.Array]
    learn: Callable[[Signals, jax.Array, Any], Any]


def norm_above(max_norm: ArrayLike) -> SkipRule:
    """Withholds steps whose global norm before clipping is above ``max_norm``.

    Args:
      max_norm: Largest norm taken, in units of the gradient; positive, may be traced.

    Returns:
      A rule for ``guard(inner, skip=...)``.

    Raises:
      ValueError: If ``max_norm`` is a Python number and not positive.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip=og.skip.norm_above(10.0))
      >>> updates, state = tx.update(jnp.array([30.0]), tx.init(jnp.zeros(1)))
      >>> updates, og.SkipReason(int(state.skip_reason)).name
      (Array([0.], dtype=float32), 'NORM_ABOVE')
    """
    check_positive("max_norm", max_norm)

    def judge(signals: Signals, state: Any) -> jax.Array:
        del state
        return signals.grad_norm > jnp.asarray(max_norm, signals.grad_norm.dtype)

    return SkipRule(
        reason=SkipReason.NORM_ABOVE,
        start=lambda: (),
        judge=judge,
        learn=lambda signals, is_skipped, state: state,
    )
