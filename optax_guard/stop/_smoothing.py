"""Smoothing of the value that stop rules judge."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_fraction, static_count
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._rule import as_float


class Smoother(NamedTuple):
    """A pair of pure functions that smooths a series of finite values.

    Attributes:
      init: Function of no arguments that returns the state.
      update: Function ``(value, state) -> (smoothed, state)`` of a float32 scalar.
    """

    init: Callable[[], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class MovingAverageState(NamedTuple):
    """State of `ema`.

    Attributes:
      smoothed_value: The average, float32, shape (); 0 at first.
      weight_sum: Sum of the weights so far, float32, shape (); 0 at first.
    """

    smoothed_value: jax.Array
    weight_sum: jax.Array


@answers_wrong_calls
def ema(decay: ArrayLike) -> Smoother:
    """Smooths with an exponential moving average that is right from the first value.

    Args:
      decay: Weight of the past, at least 0 and below 1; may be traced.

    Returns:
      A smoother whose state is a `MovingAverageState`.

    Raises:
      ValueError: If ``decay`` is concrete and out of range.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.target(1.0), smooth=stop.ema(0.5))
      >>> state = stopper.init()
      >>> for loss in [4.0, 2.0]:
      ...     state = stopper.update(loss, state)
      >>> [x.item() for x in state.smooth_state]
      [2.666667, 0.75]

    References:
      Kingma and Ba, `Adam: a method for stochastic optimization
      <https://arxiv.org/abs/1412.6980>`_, 2014 (section 3, bias correction)
    """
    check_fraction("decay", decay, or_zero=True)

    def init() -> MovingAverageState:
        return MovingAverageState(
            jnp.asarray(0.0, jnp.float32), jnp.asarray(0.0, jnp.float32)
        )

    def update(
        value: jax.Array, state: MovingAverageState
    ) -> tuple[jax.Array, MovingAverageState]:
        past = as_float(decay)
        weight_sum = past * state.weight_sum + (1 - past)
        # Moved by a share of the difference, a constant stays bit-identical: else
        # its rounding errors would pass for improvements.
        share = (1 - past) / weight_sum
        smoothed = state.smoothed_value + share * (value - state.smoothed_value)
        return smoothed, MovingAverageState(smoothed, weight_sum)

    return Smoother(init, update)


class MedianState(NamedTuple):
    """State of `median`.

    Attributes:
      recent_values: Last values, the newest at the end, float32, shape (k,); +inf
        where there is none yet.
    """

    recent_values: jax.Array


@answers_wrong_calls
def median(k: int) -> Smoother:
    """Smooths with the median of the last k values; one outlier does not move it.

    Args:
      k: Number of values; a concrete whole number of at least 1. Until there are k
        values, the median is that of all values so far.

    Returns:
      A smoother whose state is a `MedianState`.

    Raises:
      ValueError: If ``k`` is below 1.
      TypeError: If ``k`` is traced or no number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_guard import stop
      >>> smoother = stop.median(3)
      >>> state = smoother.init()
      >>> for loss in [2.0, 90.0, 1.0]:
      ...     smoothed, state = smoother.update(jnp.float32(loss), state)
      >>> smoothed.item()
      2.0
    """
    k = static_count("k", k)

    def init() -> MedianState:
        return MedianState(jnp.full((k,), jnp.inf, jnp.float32))

    def update(value: jax.Array, state: MedianState) -> tuple[jax.Array, MedianState]:
        recent = jnp.append(state.recent_values[1:], value)
        ordered = jnp.sort(recent)
        n = jnp.sum(jnp.isfinite(recent), dtype=jnp.int32)
        middle = 0.5 * ordered[(n - 1) // 2] + 0.5 * ordered[n // 2]
        return middle, MedianState(recent)

    return Smoother(init, update)
