"""The host loop: evaluation, early stopping and logs, without a stall."""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._base import check_count
from optax_guard._early_stopping import EarlyStopping, EarlyStoppingState
from optax_guard._guarding import GuardState
from optax_guard._host import (
    END,
    Interrupt,
    Logger,
    MetricWriter,
    Record,
    agree,
    open_display,
    open_source,
)
from optax_guard._interval import close, first_interval, run_step
from optax_guard._progress import Progress
from optax_guard._readout import (
    GuardExhaustedError,
    metrics,
    raise_if_exhausted,
    rejections,
)
from optax_guard._states import find_states
from optax_guard._stop_plateau import PlateauState, apply_plateau

# The key of a row for what `evaluate` returned, if it was no dict.
_VALUE = "value"
# What `raise_if_exhausted` reads.
_FLAGS = ("guard_exhausted", "skip_reason", "skip_streak")


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
    _check_arguments(state, evaluate, stopper, loggers)
    draw = open_source(batches)
    state = _own(state)
    step = int(state.step)
    if step >= num_steps:
        raise ValueError(
            f"`num_steps` must be above the steps done, {step}, got {num_steps}: it is "
            "the step to train to, not the number of further steps."
        )
    stop = None
    if stopper is not None:
        stop = stopper.init(_tracked(state))
        state = _with_plateau(state, stop)
    is_guarded = bool(find_states(state, GuardState))
    interval: Any = None
    evaluated_at = step
    clock = time.monotonic()

    with (
        open_display(progress, num_steps - step) as display,
        Interrupt() as interrupt,
        Record(loggers, display) as record,
    ):
        while True:
            until = min(num_steps, (step // eval_every + 1) * eval_every)
            while step < until and not interrupt.requested:
                batch = draw(step)
                if batch is END:
                    _warn_of_end(step, num_steps, is_empty=interval is None)
                    num_steps = until = step
                    break
                if interval is None:
                    interval = first_interval(train_step, state, batch)
                state, interval = run_step(train_step, state, interval, batch)
                step += 1
                display.advance(1)

            # The device is at work on these steps. Only now is read what the
            # evaluation before them found.
            flags = record.read()
            if interrupt.requested or _is_over(flags, state) or step == evaluated_at:
                break

            found = {} if evaluate is None else evaluate(state)
            values = _values(found)
            row, interval = close(interval)
            flags = {}
            if stopper is not None:
                now = time.monotonic()
                facts = {"step": np.int32(step), "train_value": row["train_loss"]}
                if "seconds" in stopper.needs:
                    facts["seconds"] = np.float32(agree(now - clock))
                if "opt_state" in stopper.needs:
                    facts["opt_state"] = state.opt_state
                clock = now
                judged = values if isinstance(found, Mapping) else values[_VALUE]
                stop, flags["should_stop"] = _judge(
                    stopper, stop, judged, _tracked(state), facts
                )
                state = _with_plateau(state, stop)
            if is_guarded:
                totals = metrics(state)
                row["num_skipped"] = totals["num_skipped"]
                flags |= {k: v for k, v in totals.items() if k.startswith(_FLAGS)}
            _check_apart(row, values)
            record.put(step, {**row, **values}, flags)
            evaluated_at = step
            if step == num_steps:
                _is_over(record.read(), state)
                break

    best: Any = None
    if stopper is not None and stop is not None:
        best = stopper.best(stop, _tracked(state))
    best_params, best_batch_stats = best, None
    if best is not None and _batch_stats(state) is not None:
        best_params, best_batch_stats = best["params"], best["batch_stats"]
    return FitResult(
        state=state,
        best_params=best_params,
        stop=stop,
        history=record.history,
        best_batch_stats=best_batch_stats,
        interrupted=interrupt.requested,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _judge(
    stopper: EarlyStopping,
    stop: EarlyStoppingState,
    value: Any,
    params: Any,
    facts: dict[str, Any],
) -> tuple[EarlyStoppingState, jax.Array]:
    stop = stopper.update(value, stop, params, **facts)
    # A copy: the state is donated before the host reads the flag.
    return stop, jnp.copy(stop.should_stop)


def _check_arguments(state: Any, evaluate: Any, stopper: Any, loggers: Any) -> None:
    for name in ("step", "params", "opt_state"):
        if not hasattr(state, name):
            raise TypeError(
                f"`state` must have `{name}`, as a Flax `TrainState` has, got a "
                f"`{type(state).__name__}`."
            )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(
            f"`evaluate` must be a function of the state, got {evaluate!r}."
        )
    if stopper is not None and not isinstance(stopper, EarlyStopping):
        raise TypeError(
            "`stopper` must be made by `early_stopping`, as in "
            f"`early_stopping(stop.patience(5))`, got {stopper!r}."
        )
    if stopper is not None and evaluate is None:
        raise ValueError("`stopper` needs `evaluate`: it judges what that returns.")
    if not isinstance(loggers, Sequence):
        raise TypeError(f"`loggers` must be a list of loggers, got {loggers!r}.")
    for logger in loggers:
        if not (callable(logger) or isinstance(logger, MetricWriter)):
            raise TypeError(
                "`loggers` must hold callables `(step, row)` or objects with "
                f"`write_scalars`, got {logger!r}."
            )


def _own(state: Any) -> Any:
    """A copy that may be donated, without weak types, which would be traced again."""
    return jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), state
    )


def _batch_stats(state: Any) -> Any:
    return getattr(state, "batch_stats", None)


def _tracked(state: Any) -> Any:
    """What belongs to the best evaluation: averages of other weights would not do."""
    stats = _batch_stats(state)
    if stats is None:
        return state.params
    return {"params": state.params, "batch_stats": stats}


def _values(found: Any) -> dict[str, Any]:
    """What `evaluate` returned, by the names of a row."""
    values = dict(found) if isinstance(found, Mapping) else {_VALUE: found}
    for name, value in values.items():
        where = "" if name == _VALUE else f" for {name!r}"
        if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(
                "`evaluate` must return a number or a dict of numbers, got a "
                f"`{type(value).__name__}`{where}."
            )
        if np.shape(value):
            raise ValueError(
                "`evaluate` must return scalars, got an array of shape "
                f"{np.shape(value)}{where}. Take the mean over the data."
            )
        # One dtype for numbers of the host, so that the machine is not traced again;
        # a copy of an array, which may be a part of the state that is donated next.
        if isinstance(value, jax.Array):
            values[name] = jnp.copy(value)
        else:
            with np.errstate(over="ignore"):
                values[name] = np.float32(value)
    return values


def _with_plateau(state: Any, stop: EarlyStoppingState) -> Any:
    """Hands the factor that a `stop.plateau` has come to on to the optimizer."""
    if not find_states(stop.rule_state, PlateauState):
        return state
    return state.replace(opt_state=apply_plateau(state.opt_state, stop))


def _check_apart(row: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    if taken := sorted(values.keys() & {"step", *row}):
        raise ValueError(
            f"`evaluate` must not return {taken}: `fit` itself writes these into the "
            "row. Call them, say, `val_loss`."
        )


def _is_over(flags: Mapping[str, Any], state: Any) -> bool:
    """Whether the machine stops the run. If it does not, an exhausted guard raises."""
    if flags.get("should_stop", False):
        return True
    exhaustion = {k: v for k, v in flags.items() if k.startswith(_FLAGS)}
    if not exhaustion:
        return False
    try:
        raise_if_exhausted(exhaustion)
    except GuardExhaustedError as error:
        guards = find_states(state, GuardState)
        # Among several guards, each may have seen a part of the parameters only.
        params = state.params if len(guards) == 1 else None
        lines = [
            f"  update {r.update}: {r.reason.name}, norm {r.grad_norm:.4g}, loss "
            f"{r.value:.4g}" + (f", first in {r.leaf}" if r.leaf is not None else "")
            for guard in guards
            for r in rejections(guard, params)
        ]
        raise GuardExhaustedError(
            "\n".join([str(error), "Rejected last:", *lines])
        ) from None
    return False


def _warn_of_end(step: int, num_steps: int, is_empty: bool) -> None:
    if is_empty:
        raise ValueError("`batches` is empty.")
    warnings.warn(
        f"`batches` ended after step {step} of {num_steps}, and the run with it. Pass "
        "a function `step -> batch`, or an iterable that repeats the data.",
        stacklevel=3,
    )
