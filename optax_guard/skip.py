"""Skip rules: which finite steps to skip. Non-finite ones always are."""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_count,
    check_kind,
    check_positive,
    check_range,
    check_static,
)
from optax_guard._public import answers_wrong_calls, publish
from optax_guard.threshold._base import Threshold, float32
from optax_guard.threshold._coerce import as_threshold

__all__ = [
    "Signals",
    "SkipReason",
    "SkipRule",
    "is_nonfinite",
    "norm_above",
    "spike",
]
# Classes that are met in states and never constructed by users.
_STATES = [
    "SpikeState",
    "SpikeWindow",
]


class SkipReason(enum.IntEnum):
    """Why a guard skipped a step. Numbers are checkpointed and never reused."""

    NONE = 0
    NONFINITE = 1
    NONFINITE_VALUE = 2
    NORM_ABOVE = 3
    SPIKE = 4


def is_nonfinite(reason: jax.Array) -> jax.Array:
    """Whether a step was skipped for a NaN or an infinity, not by a rule.

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
    return (reason == SkipReason.NONFINITE) | (reason == SkipReason.NONFINITE_VALUE)


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
    """A rule of which steps to skip, as pure functions and the reason they give.

    ``start()`` makes the state; ``judge(signals, state)`` says whether to skip;
    ``learn(signals, is_skipped, state)`` adds a finite step; ``restart(state)`` is what
    the state becomes when the guard overrules the rule, ``start()`` if it is ``None``.
    """

    reason: SkipReason
    start: Callable[[], Any]
    judge: Callable[[Signals, Any], jax.Array]
    learn: Callable[[Signals, jax.Array, Any], Any]
    restart: Callable[[Any], Any] | None = None

    @property
    def init(self) -> NoReturn:
        """Raises: what asks for this takes the rule for a transformation."""
        raise TypeError(
            "A skip rule is not a gradient transformation and cannot be chained. Pass "
            "it to the guard: `guard(optimizer, skip=rule)`."
        )

    update = init


@answers_wrong_calls
def norm_above(
    max_norm: ArrayLike | optax.Schedule | Threshold | Mapping[str, Any],
) -> SkipRule:
    """Skips steps whose global norm before clipping is above ``max_norm``.

    A threshold that adapts learns from skipped steps, too, in its own way: it could
    not follow a lasting change of scale otherwise.

    Args:
      max_norm: Largest norm taken, in units of the gradient: a positive number,
        possibly traced; a schedule, called with the number of finite steps before this
        one; or one of ``optax_guard.threshold``.

    Returns:
      A rule for ``guard(inner, skip=...)``.

    Raises:
      ValueError: If ``max_norm`` is a Python number and not positive.
      TypeError: If ``max_norm`` is none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip=og.skip.norm_above(10.0))
      >>> updates, state = tx.update(jnp.array([30.0]), tx.init(jnp.zeros(1)))
      >>> updates, og.SkipReason(int(state.skip_reason)).name
      (Array([0.], dtype=float32), 'NORM_ABOVE')
    """
    threshold = as_threshold("max_norm", max_norm)

    def limits(signals: Signals, state: Any) -> tuple[jax.Array, jax.Array]:
        return threshold.limits(signals.grad_norm, signals.grad_norm, state)

    def judge(signals: Signals, state: Any) -> jax.Array:
        trigger, _ = limits(signals, state)
        return signals.grad_norm > trigger

    def learn(signals: Signals, is_skipped: jax.Array, state: Any) -> Any:
        del is_skipped
        norm = signals.grad_norm
        trigger, target = limits(signals, state)
        return threshold.learn(norm, jnp.where(norm > trigger, target, norm), state)

    return SkipRule(
        reason=SkipReason.NORM_ABOVE,
        start=lambda: threshold.start(()),
        judge=judge,
        learn=learn,
        # Thresholds adapt by themselves; a schedule must not begin again.
        restart=lambda state: state,
    )


class SpikeWindow(NamedTuple):
    """The last values of one signal, in a ring.

    Attributes:
      window_values: float32[window], in the signal's unit; 0 after ``init``.
      window_position: int32[], how many values were added, less a multiple of the
        window once it is full: the next is entry ``window_position % window``; 0 after
        ``init``.
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
    watch: str | Sequence[str] = ("grad_norm", "value"),
    min_deviation: ArrayLike = 1e-3,
    skipped: str = "limit",
    ddof: ArrayLike = 1,
) -> SkipRule:
    r"""Skips steps whose norm or loss rises far above the last ones.

    A step is skipped if, for one of the watched signals :math:`x`,
    :math:`x - \mu > \sigma \max(s, \delta|\mu|)`, with the mean :math:`\mu` and
    deviation :math:`s` of the ``window`` values before it and
    :math:`\delta` = ``min_deviation``. The norm is the one before clipping. Values that
    are not finite are never judged and never enter the window, and a window of nothing
    but zeros skips nothing. The guard bounds the steps skipped in a row, and then
    empties the windows.

    A long row of bad but plausible batches raises the limit until they pass; a row
    longer than the guard's ``max_consecutive_skips`` ends in any case. With
    ``skipped="nothing"`` and a larger ``max_consecutive_skips`` the limit stays, at
    the price that after a lasting rise of norm or loss so many healthy steps are
    skipped. (With the defaults 10 are; `benchmarks/README.md`, "Bad batches".)

    OLMo-core and MaxText's rule is ``spike(sigma, window, min_history=max(2, window //
    2) - 1, min_deviation=0, skipped="enter")``, levanter's ``spike(sigma, window,
    min_deviation=0, skipped="enter", ddof=0)``.

    Args:
      sigma: How many standard deviations pass; positive.
      window: How many values make up mean and deviation; at least 2. Not traced.
      min_history: How many must have been seen before a step is skipped;
        ``max(2, window // 2)`` if ``None``. Until then a spike is taken, and enters.
      watch: ``"grad_norm"``, ``"value"`` or both: the loss counts where it is given to
        ``update`` as ``value=``.
      min_deviation: Smallest standard deviation assumed, as a share of the mean's
        magnitude; at least 0.
      skipped: What a skipped step's values enter the window as: ``"limit"``, at most
        the largest that would have passed, so that one spike hardly makes the rule
        blind to the next; ``"enter"``, as they are; ``"nothing"``, not at all.
      ddof: What is subtracted from the number of values in the variance's divisor: 1,
        or 0 for the population's variance.

    Returns:
      A rule for ``guard(inner, skip=...)``, of ``8 * window`` bytes.

    Raises:
      ValueError: If a Python number is out of range or a string unknown.
      TypeError: If ``window`` is traced; when a step is taken, if only the loss is
        watched and ``value=`` was not given.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip=og.skip.spike(3.0, window=4))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 0.9, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates, og.SkipReason(int(state.skip_reason)).name
      (Array([0.], dtype=float32), 'SPIKE')

    References:
      OLMo-core's `SkipStepOptimizer <https://github.com/allenai/OLMo-core>`_
    """
    check_positive("sigma", sigma)
    check_static("window", window)
    check_count("window", window)
    if window < 2:
        raise ValueError(f"`window` must be at least 2, got {window}.")
    if min_history is None:
        min_history = max(2, window // 2)
    check_count("min_history", min_history)
    check_range("min_history", min_history, 1, window)
    check_kind("watch", watch, Sequence, "a name or a list of names")
    watched = (watch,) if isinstance(watch, str) else tuple(watch)
    for signal in watched:
        check_choice("watch", signal, ("grad_norm", "value"))
    if not watched:
        raise ValueError("`watch` must name a signal, got none.")
    check_range("min_deviation", min_deviation, 0, math.inf)
    check_choice("skipped", skipped, ("limit", "enter", "nothing"))
    check_range("ddof", ddof, 0, 1)

    def start() -> SpikeState:
        return SpikeState(_empty_window(window), _empty_window(window))

    def watched_in(signals: Signals) -> dict[str, jax.Array]:
        """What is watched and given, by the name of its window."""
        found = {f"{name}_window": getattr(signals, name) for name in watched}
        found = {name: x for name, x in found.items() if x is not None}
        if not found:
            raise TypeError(
                '`spike` with `watch="value"` needs the loss: pass `value=` to '
                "`update` or `apply_gradients`."
            )
        return {name: x.astype(jnp.float32) for name, x in found.items()}

    def limit(past: SpikeWindow) -> jax.Array:
        """The largest value that passes; infinite without enough history."""
        length = jnp.minimum(past.window_position, window)
        is_seen = jnp.arange(window, dtype=jnp.int32) < length
        number = jnp.maximum(length, 1).astype(jnp.float32)
        mean = jnp.sum(past.window_values) / number
        squares = jnp.where(is_seen, (past.window_values - mean) ** 2, 0.0)
        var = jnp.sum(squares) / jnp.maximum(number - float32(ddof), 1.0)
        deviation = jnp.maximum(jnp.sqrt(var), float32(min_deviation) * jnp.abs(mean))
        # Nothing but zeros has no scale by which anything could be large.
        is_known = (length >= min_history) & ((deviation > 0) | (mean != 0))
        return jnp.where(is_known, mean + float32(sigma) * deviation, jnp.inf)

    def judge(signals: Signals, state: SpikeState) -> jax.Array:
        found = watched_in(signals).items()
        return jnp.any(
            jnp.stack([x > limit(getattr(state, name)) for name, x in found])
        )

    def add(x: jax.Array, past: SpikeWindow, is_skipped: jax.Array) -> SpikeWindow:
        if skipped == "limit":
            x = jnp.where(is_skipped, jnp.minimum(x, limit(past)), x)
        enters = jnp.isfinite(x)
        if skipped == "nothing":
            enters &= ~is_skipped
        position = past.window_position
        is_next = (jnp.arange(window, dtype=jnp.int32) == position % window) & enters
        # Bounded, so that it never overflows.
        following = jnp.where(position + 1 == 2 * window, window, position + 1)
        return SpikeWindow(
            jnp.where(is_next, x, past.window_values),
            jnp.where(enters, following, position),
        )

    def learn(signals: Signals, is_skipped: jax.Array, state: SpikeState) -> SpikeState:
        found = watched_in(signals).items()
        new = {name: add(x, getattr(state, name), is_skipped) for name, x in found}
        return state._replace(**new)

    return SkipRule(reason=SkipReason.SPIKE, start=start, judge=judge, learn=learn)


def _empty_window(size: int) -> SpikeWindow:
    return SpikeWindow(jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.int32))


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
