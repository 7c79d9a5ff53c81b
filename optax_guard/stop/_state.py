"""What early stopping is made of, its state, and what that says to people."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import check_kind
from optax_guard.stop._rule import StopReason


class EarlyStoppingState(NamedTuple):
    """State of `early_stopping`; all of it belongs in a checkpoint.

    Evaluations are counted from 0. Every field but the last three has shape ().

    Attributes:
      num_evals: Evaluations seen, int32; 0 at first. Updates after the stop are not
        counted.
      best_value: Best value so far in the user's own sign, float32; at first the
        worst there is: +inf, or -inf for ``mode="max"``.
      best_eval: Evaluation that gave it, int32; -1 at first.
      best_step: ``step`` at that evaluation, int32; -1 at first and if not given.
      is_best: Whether the last update set a new best, bool; False at first.
      is_significant: Whether the value of the last update improved by enough to
        count for the rules (as ``is_best`` if they do not say), bool; False at first.
      nonfinite_streak: Non-finite values in a row, int32; 0 at first.
      train_seconds: Sum of the ``seconds`` given, float32; 0 at first.
      should_stop: Whether a rule has fired, bool; stays True until `reset`.
      stop_reason: `StopReason` of the stop, int32; 0 (RUNNING) until then.
      stopped_at: Evaluation at which it fired, int32; -1 until then.
      best_params: Parameters of the best evaluation, a copy of the tree given to
        `init` until there is one, or None if `init` was given none.
      rule_state: State of the rule.
      smooth_state: State of the smoother, or ``()``.
    """

    num_evals: jax.Array
    best_value: jax.Array
    best_eval: jax.Array
    best_step: jax.Array
    is_best: jax.Array
    is_significant: jax.Array
    nonfinite_streak: jax.Array
    train_seconds: jax.Array
    should_stop: jax.Array
    stop_reason: jax.Array
    stopped_at: jax.Array
    best_params: Any
    rule_state: Any
    smooth_state: Any


class _Update(Protocol):
    def __call__(
        self,
        value: ArrayLike | Mapping[str, ArrayLike],
        state: EarlyStoppingState,
        params: Any = None,
        *,
        step: ArrayLike | None = None,
        seconds: ArrayLike | None = None,
        train_value: ArrayLike | None = None,
        opt_state: Any = None,
    ) -> EarlyStoppingState: ...


class _Reset(Protocol):
    def __call__(
        self, state: EarlyStoppingState, *, keep_best: bool = True
    ) -> EarlyStoppingState: ...


class EarlyStopping(NamedTuple):
    """Pure functions that decide when to stop and keep the best parameters.

    Attributes:
      init: ``init(params=None) -> state``. With parameters (any tree of arrays) the
        state carries copies of the best ones.
      update: ``update(value, state, params=None, *, step=None, seconds=None,
        train_value=None, opt_state=None) -> state``: tells the stopper the value of
        an evaluation, and the parameters it was computed with. ``step`` counts steps,
        below 2**31; ``seconds`` is the training time since the update before;
        ``train_value`` is a number, or an array of those since then. What is no number
        raises a ``TypeError``, what is none of these a ``ValueError``.
      best: ``best(state, default) -> params``: the best parameters, or ``default``
        if there was no finite value.
      reset: ``reset(state, *, keep_best=True) -> state``: lets a stopped run go on.
        Rules start afresh; totals and, unless ``keep_best=False``, the best stay.
      needs: Those of ``step``, ``seconds``, ``train_value`` and ``opt_state`` that
        `update` cannot do without.
    """

    init: Callable[..., EarlyStoppingState]
    update: _Update
    best: Callable[[EarlyStoppingState, Any], Any]
    reset: _Reset
    needs: frozenset[str]


def explain(state: EarlyStoppingState) -> str:
    """Says in words how the run stands, or why it stopped and what to try.

    Reads the state on the host, so it waits for the device.

    Args:
      state: State of one run; of a population, index its leaves first.

    Returns:
      One line of text. Evaluations are counted from 0.

    Raises:
      TypeError: If the state is no `EarlyStoppingState`.
      ValueError: If the state is that of a population.

    Examples:
      >>> from optax_guard import early_stopping, explain, stop
      >>> stopper = early_stopping(stop.target(0.5))
      >>> explain(stopper.update(0.7, stopper.init()))
      'running, best 0.7 at evaluation 0'
      >>> explain(stopper.update(0.4, stopper.init()))
      'stopped at evaluation 0 (TARGET), best 0.4 at evaluation 0. ...'
    """
    check_kind("state", state, EarlyStoppingState, "an `EarlyStoppingState`")
    if np.shape(state.should_stop):
        raise ValueError(
            "`explain` takes the state of one run, got a population of shape "
            f"{np.shape(state.should_stop)}. Take one member with "
            "`jax.tree.map(lambda leaf: leaf[i], state)`."
        )
    # The parameters may be large and say nothing here.
    now = jax.device_get(state._replace(best_params=None))
    if int(now.best_eval) < 0:
        best = "no finite value yet"
    else:
        best = f"best {float(now.best_value):.6g} at evaluation {int(now.best_eval)}"
        if int(now.best_step) >= 0:
            best += f" (step {int(now.best_step)})"
    if not bool(now.should_stop):
        since = int(now.num_evals) - 1 - int(now.best_eval)
        waiting = f", {since} without a better one" if since > 0 else ""
        return f"running, {best}{waiting}"
    reason = StopReason(int(now.stop_reason))
    return (
        f"stopped at evaluation {int(now.stopped_at)} ({reason.name}), {best}. "
        f"{reason.message}"
    )
