"""The host loop: evaluation, early stopping and logs, without a stall."""

import contextlib
import functools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard import _interval
from optax_guard._base import check_count
from optax_guard._early_stopping import EarlyStopping, EarlyStoppingState
from optax_guard._guarding import GuardState
from optax_guard._progress import Progress
from optax_guard._readout import (
    GuardExhaustedError,
    metrics,
    raise_if_exhausted,
    rejections,
)
from optax_guard._states import find_states
from optax_guard._stop_plateau import PlateauState, apply_plateau

@runtime_checkable
class MetricWriter(Protocol):
    """What CLU's metric writers have."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], /) -> None:
        """Writes scalars of one step."""
        ...


Logger = Callable[[int, dict[str, float]], Any] | MetricWriter


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: The state after the last step that ran. After an early stop that is up to
        one interval of evaluation beyond it; the best parameters are not affected.
      best_params: Parameters of the best evaluation, or of `state` if none was finite;
        ``None`` without a stopper.
      stop: The `EarlyStoppingState`, for `explain`; ``None`` without a stopper. If the
        state has `batch_stats`, its ``best_params`` is a dict of both trees.
      history: One dict of Python numbers an evaluation, as the loggers got them.
      best_batch_stats: `batch_stats` of the best evaluation, as `best_params`; ``None``
        if the state has none.
      interrupted: Whether the run was ended by Ctrl-C.
    """

    state: Any
    best_params: Any
    stop: EarlyStoppingState | None
    history: list[dict[str, float]]
    best_batch_stats: Any = None
    interrupted: bool = False


def fit(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[int], Any] | Iterable[Any],
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[Any], Any] | None = None,
    stopper: EarlyStopping | None = None,
    loggers: Sequence[Logger] = (),
    progress: bool | Progress = False,
) -> FitResult:
    """Trains on the host's loop, with evaluation, early stopping and logging.

    The device never waits for the host: what an evaluation found, the stop flag
    included, is read after the next ``eval_every`` steps have been dispatched. So an
    early stop comes up to one interval late, always at the same step, and the best
    parameters are those of the machine, which has not moved since. An exhausted guard
    is found out at the same time.

    At an evaluation, in this order: these parameters are evaluated, the machine is
    updated with them, and the loop goes on. There is one at every multiple of
    ``eval_every`` and one at the end.

    The first Ctrl-C ends the run after the step at hand, and `fit` returns what there
    is; the second raises ``KeyboardInterrupt``. Whatever is raised, loggers have got
    every row first.

    Args:
      state: A `TrainState` of Flax or of this library, or any tree of arrays with
        ``step``, ``params`` and ``opt_state``. It is copied, not donated.
      train_step: ``train_step(state, batch) -> (state, metrics)`` with ``metrics`` a
        dict of scalars, ``"loss"`` among them, or the loss alone. It is jitted here,
        with the state donated, and traced once as long as batches have one shape.
      batches: A function ``step -> batch``, or an iterable of batches. Only the
        function lets a resumed run go on with the right data.
      num_steps: Value of ``state.step`` to train to, as in ``range(state.step,
        num_steps)``. An iterable that ends earlier ends the run, with a warning.
      eval_every: Steps between evaluations.
      evaluate: ``evaluate(state) -> scalar or dict of scalars``. Called as it is: jit
        it, or what it calls, and return arrays without converting them to Python's
        numbers, which would wait for the device.
      stopper: An `early_stopping`. It is told the value, the parameters, the steps,
        the mean training loss since the evaluation before, the optimizer's state and
        the seconds on the host's clock. If its rule holds a `stop.plateau`, its factor
        is written into the optimizer's state.
      loggers: Callables ``(step, row)``, or objects with CLU's
        ``write_scalars(step, row)``.
      progress: Whether to show a progress bar and a table; or a display of one's own.

    Returns:
      A `FitResult`. A row of the history has, as Python numbers:

      * ``step``: steps done;
      * ``train_loss`` and other ``train_*``: means of the metrics of ``train_step``
        over the finite values since the row before, NaN if there were none. Metrics
        with a name that `optax_guard.metrics` uses are left out here;
      * ``grad_norm``, ``clipped_norm``, ``clip_threshold``: of the worst step since the
        row before, the one with the largest finite norm; NaN if there was none; and
        ``grad_norm_mean``, the mean norm over the same steps;
      * ``clip_rate``, ``nonfinite_rate``, ``skip_rate``: shares of the steps since the
        row before, in [0, 1]; ``num_skipped``: total of the run;
      * ``value``, or the keys of the dict that ``evaluate`` returned.

      Those of norms are there if something of this library measures them, those of
      skips if there is a guard; with several, the first counts.

    Raises:
      ValueError: If an argument is out of range, or a function returns a wrong shape.
      TypeError: If an argument or what a function returns is of the wrong kind.
      GuardExhaustedError: If the guard withheld too many steps in a row and the stopper
        did not stop; the message names the last rejections.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.flax import TrainState, fit
      >>> tx = og.guard(optax.sgd(0.1), clip=1.0)
      >>> state = TrainState.create(apply_fn=None, params=jnp.array(0.5), tx=tx)
      >>> def train_step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p - x) ** 2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> result = fit(state, train_step, lambda step: 0.0, num_steps=4, eval_every=2)
      >>> [(row["step"], round(row["train_loss"], 4)) for row in result.history]
      [(2, 0.205), (4, 0.084)]
    """
    check_count("num_steps", num_steps)
    check_count("eval_every", eval_every)
    _check_fit(state, evaluate, stopper, loggers)
    draw = _source(batches)
    state = _own(state)
    step = int(state.step)
    if step >= num_steps:
        raise ValueError(
            f"`num_steps` must be above the steps done, {step}, got {num_steps}: it is "
            "the step to train to, not the number of further steps."
        )
    stop = None if stopper is None else stopper.init(_tracked(state))
    is_guarded = bool(find_states(state, GuardState))
    interval: Any = None
    judged_at = step
    clock = time.monotonic()

    with _display(progress, num_steps - step) as display, _Interrupt() as interrupt:
        record = _Record(loggers, display)
        try:
            while step < num_steps:
                until = min(num_steps, (step // eval_every + 1) * eval_every)
                while step < until and not interrupt.requested:
                    batch = draw(step)
                    if batch is _END:
                        _warn_of_end(step, num_steps)
                        num_steps = until = step
                        break
                    if interval is None:
                        interval = _first_interval(train_step, state, batch)
                    state, interval = _train(train_step, state, interval, batch)
                    step += 1
                    display.advance(1)

                # The device is at work on these steps: time to read what the
                # evaluation before them has found.
                flags = record.read()
                if flags.pop("should_stop", False) or interrupt.requested:
                    break
                _check_exhausted(flags, state)
                if step == judged_at:
                    break

                values = {} if evaluate is None else _values(evaluate(state))
                row, interval = _close(interval)
                flags = {}
                if stopper is not None:
                    now = time.monotonic()
                    facts = {
                        "step": np.int32(step),
                        "seconds": np.float32(_agreed(stopper, now - clock)),
                        "train_value": row["train_loss"],
                        "opt_state": state.opt_state,
                    }
                    clock = now
                    stop, flags["should_stop"] = _judge(
                        stopper,
                        stop,
                        values.get(_VALUE, values),
                        _tracked(state),
                        {name: facts[name] for name in {"step", *stopper.needs}},
                    )
                    if find_states(stop.rule_state, PlateauState):
                        opt_state = apply_plateau(state.opt_state, stop)
                        state = state.replace(opt_state=opt_state)
                if is_guarded:
                    totals = metrics(state)
                    row["num_skipped"] = totals["num_skipped"]
                    flags |= {k: totals[k] for k in totals if k.startswith(_FLAGS)}
                _check_apart(row, values)
                record.put(step, {**row, **values}, flags)
                judged_at = step
            flags = record.read()
            if not flags.pop("should_stop", False) and not interrupt.requested:
                _check_exhausted(flags, state)
        except BaseException:
            record.read()
            raise

    best: Any = None
    if stopper is not None and stop is not None:
        best = stopper.best(stop, _tracked(state))
    has_stats = _batch_stats(state) is not None and best is not None
    return FitResult(
        state=state,
        best_params=best["params"] if has_stats else best,
        stop=stop,
        history=record.history,
        best_batch_stats=best["batch_stats"] if has_stats else None,
        interrupted=interrupt.requested,
    )


