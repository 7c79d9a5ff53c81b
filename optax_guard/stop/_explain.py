"""The state of a run in words."""

from typing import Any

import jax
import numpy as np

from optax_guard._checks import check_kind
from optax_guard.stop._rule import StopReason
from optax_guard.stop._state import EarlyStoppingState


def explain(state: Any) -> str:
    """Says in words how the run stands, or why it stopped, with advice.

    Reads the state on the host, so it waits for the device.

    Args:
      state: `EarlyStoppingState` of one run; of a population, index its leaves first.
        Or the `FitResult` of `fit`, of which it also says whether it came to its end.

    Returns:
      One line of text. Evaluations are counted from 1, as steps are; the indices
      ``best_eval`` and ``stopped_at`` of the state are one less.

    Raises:
      TypeError: If ``state`` is neither, or the result of a run without a stopper.
      ValueError: If the state is that of a population.

    Examples:
      >>> from optax_guard import early_stopping, explain, stop
      >>> stopper = early_stopping(stop.target(0.5))
      >>> explain(stopper.update(0.7, stopper.init()))
      'running, best 0.7 at evaluation 1'
      >>> explain(stopper.update(0.4, stopper.init()))
      'stopped at evaluation 1 (TARGET), best 0.4 at evaluation 1. ...'
    """
    rows = getattr(state, "history", None)
    if rows is not None and hasattr(state, "stop"):
        # A `FitResult`, which is of a room above this one.
        was_cut = state.interrupted or state.preempted
        told = explain(state.stop)
        if not told.startswith("running") or not rows:
            return told
        how = "was ended from outside after" if was_cut else "took all of its"
        return f"{how} {rows[-1]['step']} steps{told.removeprefix('running')}"
    check_kind("state", state, EarlyStoppingState, "an `EarlyStoppingState`")
    if np.shape(state.should_stop):
        raise ValueError(
            "`explain` takes the state of one run, got a population of shape "
            f"{np.shape(state.should_stop)}. Take one member with "
            "`jax.tree.map(lambda leaf: leaf[i], state)`."
        )
    # The parameters may be large and say nothing here.
    now = jax.device_get(state._replace(best_params=None, recent_params=()))
    if int(now.best_eval) < 0:
        best = "no finite value yet"
    else:
        value, number = float(now.best_value), int(now.best_eval) + 1
        best = f"best {value:.6g} at evaluation {number}"
        if int(now.best_step) >= 0:
            best += f" (step {int(now.best_step)})"
    if not bool(now.should_stop):
        since = int(now.num_evals) - 1 - int(now.best_eval)
        waiting = f", {since} without a better one" if since > 0 else ""
        return f"running, {best}{waiting}"
    reason = StopReason(int(now.stop_reason))
    return (
        f"stopped at evaluation {int(now.stopped_at) + 1} ({reason.name}), {best}. "
        f"{reason.message}"
    )
