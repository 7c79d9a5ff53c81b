"""The rule that skips a step whose loss or norm is far above the last ones."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_count,
    check_kind,
    check_not_negative,
    check_positive,
    check_range,
    static_count,
)
from optax_guard._public import answers_wrong_calls
from optax_guard.skip._rule import Signals, SkipReason, SkipRule
from optax_guard.threshold._base import float32

# In 144 clean runs of 400 steps, of small models, 16 skipped as few steps as 64 did: 8.
# With 10 they were 10.
MIN_HISTORY = 16


class SpikeWindow(NamedTuple):
    """The last values of one signal, in a ring.

    Attributes:
      window_values: float32[window], in the signal's unit; 0 after ``init``.
      window_position: int32[], how many values were added; once the window is full, a
        multiple of it is subtracted. The next value becomes entry ``window_position %
        window``; 0 after ``init``.
    """

    window_values: jax.Array
    window_position: jax.Array


class SpikeState(NamedTuple):
    """State of ``spike``.

    Attributes:
      grad_norm_window: The last global norms before clipping, a ``SpikeWindow``.
      value_window: The last losses, a ``SpikeWindow``.
    """

    grad_norm_window: SpikeWindow
    value_window: SpikeWindow


@answers_wrong_calls
def spike(
    sigma: ArrayLike = 6.0,
    window: int = 128,
    *,
    min_history: ArrayLike | None = None,
    watch: str | Sequence[str] = "value",
    min_deviation: ArrayLike = 1e-3,
    skipped: str = "nothing",
    ddof: ArrayLike = 1,
    max_consecutive: ArrayLike = 64,
) -> SkipRule:
    r"""Skips steps whose loss is far above the last ones; judges from the 17th step on.

    A step is skipped if, for one of the watched signals :math:`x`,
    :math:`x - \mu > \sigma \max(s, \delta|\mu|)`, with the mean :math:`\mu` and
    deviation :math:`s` of the ``window`` values before it and
    :math:`\delta` = ``min_deviation``. Until it has seen ``min_history`` values it
    skips nothing. Then it judges by those that it has, and the window fills;
    ``spike(min_history=9)`` judges from the 10th step on, as ``spike(window=9)`` does.
    Values that are not finite are never judged and never enter the window. While a
    window holds only zeros, the rule skips nothing.

    Values of skipped steps do not enter the window, so a row of bad batches that look
    plausible cannot hide itself. Such a row, a lasting rise of the loss, and parameters
    that one step has damaged look alike; only their length tells them apart. After
    ``max_consecutive`` skipped steps the rule lets the next finite step through and
    empties its windows, so it learns the new level. A lasting rise therefore costs
    ``max_consecutive`` healthy steps. Of a longer row of bad batches the rest is taken:
    `optax_guard.loops.Rewind` with ``max_rise`` is for that. (`benchmarks/README.md`,
    "Bad batches".)

    A small window takes more healthy steps for spikes. Of losses with normal noise it
    is one in 2,600 with ``window=8``, in 59,000 with 16, in 1.3 million with 32 and in
    93 million with 128. The loss of a small batch is skewed, and jumps more often. Of
    50 clean runs of 48 steps with batches of 16, ``window=32`` with ``min_history=16``
    skipped a step in none (``make soak``), and ``window=8`` in two.

    OLMo-core and MaxText's rule is ``spike(sigma, window, watch=("grad_norm",
    "value"), skipped="enter", min_deviation=0, min_history=max(2, window // 2) - 1)``.
    Levanter's has ``min_history=max(2, window // 2)`` and ``ddof=0``.

    Args:
      sigma: How many standard deviations pass; positive.
      window: How many values make up mean and deviation; at least 2. Not traced.
      min_history: How many values must have entered before a step is skipped; ``min(16,
        window)`` if ``None``. Until then a spike is taken, and enters.
      watch: ``"value"``, ``"grad_norm"`` or both. ``"value"`` is the loss given to
        ``update`` as ``value=``; it must be given if it alone is watched.
        ``"grad_norm"`` is the norm before clipping.
      min_deviation: Smallest standard deviation assumed, as a share of the mean's
        magnitude; at least 0.
      skipped: How the values of a skipped step enter the window: ``"nothing"``, not at
        all; ``"enter"``, as they are.
      ddof: The divisor of the variance is the number of values less this: 1, or 0 for
        the variance of a population.
      max_consecutive: Largest number of steps that rules skip in a row before this one
        lets a finite step through; at least 1, may be traced. Steps that are not finite
        do not count, and end in the guard's own alarm.

    Returns:
      A rule for ``guard(inner, skip=...)``, of ``8 * window`` bytes.

    Raises:
      ValueError: If a concrete number is out of range or a string unknown.
      TypeError: If ``window`` is traced; in ``update``, if only the loss is watched and
        ``value=`` was not given.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip=og.skip.spike(min_history=3))
      >>> state = tx.init(jnp.zeros(1))
      >>> for loss in [1.0, 1.1, 0.9, 8.0]:
      ...     updates, state = tx.update(jnp.ones(1), state, value=loss)
      >>> updates, og.SkipReason(int(state.skip_reason)).name
      (Array([0.], dtype=float32), 'SPIKE')

    References:
      OLMo-core's `SkipStepOptimizer <https://github.com/allenai/OLMo-core>`_
    """
    check_positive("sigma", sigma)
    window = static_count("window", window, least=2)
    if min_history is None:
        min_history = min(MIN_HISTORY, window)
    check_count("min_history", min_history)
    check_range("min_history", min_history, 1, window)
    check_kind("watch", watch, Sequence, "a name or a list of names")
    watched = (watch,) if isinstance(watch, str) else tuple(watch)
    for signal in watched:
        check_choice("watch", signal, ("grad_norm", "value"))
    if not watched:
        raise ValueError("`watch` must name a signal, got none.")
    check_not_negative("min_deviation", min_deviation)
    check_choice("skipped", skipped, ("nothing", "enter"))
    check_range("ddof", ddof, 0, 1)
    check_count("max_consecutive", max_consecutive)

    settings = _Settings(
        sigma, window, min_history, watched, min_deviation, skipped, ddof
    )
    return SkipRule(
        reason=SkipReason.SPIKE,
        start=lambda: SpikeState(_empty_window(window), _empty_window(window)),
        judge=functools.partial(_judge, settings),
        learn=functools.partial(_learn, settings),
        max_consecutive=max_consecutive,
    )


class _Settings(NamedTuple):
    sigma: ArrayLike
    window: int
    min_history: ArrayLike
    watched: tuple[str, ...]
    min_deviation: ArrayLike
    skipped: str
    ddof: ArrayLike


def _empty_window(size: int) -> SpikeWindow:
    return SpikeWindow(jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.int32))


def _judge(settings: _Settings, signals: Signals, state: SpikeState) -> jax.Array:
    found = _watched_signals(settings, signals).items()
    is_above = [x > _threshold(settings, getattr(state, name)) for name, x in found]
    return jnp.any(jnp.stack(is_above))


def _learn(
    settings: _Settings, signals: Signals, is_skipped: jax.Array, state: SpikeState
) -> SpikeState:
    found = _watched_signals(settings, signals).items()
    new = {
        name: _window_with(settings, x, getattr(state, name), is_skipped)
        for name, x in found
    }
    return state._replace(**new)


def _watched_signals(settings: _Settings, signals: Signals) -> dict[str, jax.Array]:
    """Maps the window of each signal that is watched and given to its new value."""
    found = {f"{name}_window": getattr(signals, name) for name in settings.watched}
    found = {name: x for name, x in found.items() if x is not None}
    if not found:
        raise TypeError(
            "`spike` watches the loss and needs it: pass `value=loss` to `update` or "
            "`apply_gradients` (of Flax' `TrainState` take the subclass "
            "`optax_guard.flax.TrainState`, which passes it on), or watch the norm: "
            '`spike(watch="grad_norm")`.'
        )
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def _threshold(settings: _Settings, past: SpikeWindow) -> jax.Array:
    """Computes the largest value that passes; infinite without enough history."""
    length = jnp.minimum(past.window_position, settings.window)
    is_seen = jnp.arange(settings.window, dtype=jnp.int32) < length
    number = jnp.maximum(length, 1).astype(jnp.float32)
    mean = jnp.sum(past.window_values) / number
    squares = jnp.where(is_seen, (past.window_values - mean) ** 2, 0.0)
    var = jnp.sum(squares) / jnp.maximum(number - float32(settings.ddof), 1.0)
    smallest = float32(settings.min_deviation) * jnp.abs(mean)
    deviation = jnp.maximum(jnp.sqrt(var), smallest)
    # Only zeros do not tell the scale of the signal, so no value is too large for it.
    is_known = (length >= settings.min_history) & ((deviation > 0) | (mean != 0))
    return jnp.where(is_known, mean + float32(settings.sigma) * deviation, jnp.inf)


def _window_with(
    settings: _Settings, x: jax.Array, past: SpikeWindow, is_skipped: jax.Array
) -> SpikeWindow:
    """Adds the value of a step to a window, as ``skipped=`` says."""
    enters = jnp.isfinite(x)
    if settings.skipped == "nothing":
        enters &= ~is_skipped
    window, position = settings.window, past.window_position
    is_next = (jnp.arange(window, dtype=jnp.int32) == position % window) & enters
    # The position stays below twice the window, so it never overflows.
    following = jnp.where(position + 1 == 2 * window, window, position + 1)
    return SpikeWindow(
        jnp.where(is_next, x, past.window_values),
        jnp.where(enters, following, position),
    )
