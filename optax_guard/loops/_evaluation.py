"""One evaluation of a run, in one order, for the loop on the host and on the device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import in_range
from optax_guard._guarding.readout import metrics
from optax_guard._guarding.state import GuardState
from optax_guard._trees import find_states
from optax_guard.loops._compiled import CompiledFor
from optax_guard.loops._ending import flags_of_guard
from optax_guard.loops._interval import Interval, close, totals
from optax_guard.loops._last_step import last_step_facts
from optax_guard.loops._learning_rate import learning_rate_item, with_plateau
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState

# The fields of the stopper's state that end a run, name its best checkpoint, send it
# back there, or tell that it must not be resumed from here.
_FLAGS = ("should_stop", "stop_reason", "best_step", "value_rise", "nonfinite_streak")

# The key of the value in a row, if `evaluate` did not return a dict.
VALUE = "value"


class Point(NamedTuple):
    """The arrays of a run at an evaluation.

    Attributes:
      state: The user's state.
      interval: Sums since the evaluation before.
      stop: The `EarlyStoppingState`, or ``None`` without a stopper.
    """

    state: Any
    interval: Interval
    stop: EarlyStoppingState | None


class Facts(NamedTuple):
    """The facts that the loop adds to an evaluation.

    Attributes:
      step: Steps done, int32[].
      seconds: Time since the evaluation before, float32[]; ``None`` if no rule needs it
        or there is no clock.
      scheduled_rate: The learning rate by the user's schedule; ``None`` without one.
      last_step: The parameters before and after the last step, or ``None``.
    """

    step: ArrayLike
    seconds: ArrayLike | None = None
    scheduled_rate: jax.Array | None = None
    last_step: tuple[Any, Any] | None = None


class Judged(NamedTuple):
    """The results of an evaluation.

    Attributes:
      interval: An empty interval.
      stop: The new state of the stopper, or ``None`` without one.
      row: The items of the row that come from the interval and the guard.
      rate: The learning rate as an item of the row, or an empty dict.
      flags: Numbers that tell whether the run is over. They share no buffer with the
        states, which are donated before the host reads the flags.
    """

    interval: Interval
    stop: EarlyStoppingState | None
    row: dict[str, jax.Array]
    rate: dict[str, jax.Array]
    flags: dict[str, jax.Array]


class Evaluation(NamedTuple):
    """The configuration of the evaluations of a run.

    Attributes:
      judge: `judge` with the stopper bound, compiled or not.
      writes_rewinds: Whether a row has the number of rewinds.
    """

    judge: Callable[..., Judged]
    writes_rewinds: bool = False


def evaluate_point(
    evaluation: Evaluation,
    point: Point,
    found: Any,
    facts: Facts,
    *,
    num_rewinds: int = 0,
    lr_scale: float = 1.0,
) -> tuple[Point, dict[str, Any], dict[str, Any]]:
    """Judges the values of an evaluation: row, stopper, plateau, flags, in this order.

    Args:
      evaluation: The configuration.
      point: The run. The host's loop donates its interval and its stopper's state.
      found: The result of the user's ``evaluate``, or an empty dict.
      facts: Step, seconds and learning rate.
      num_rewinds: Rewinds so far.
      lr_scale: Factor of the rewinds on the learning rate.

    Returns:
      The point from which the run goes on, the row, and the flags.
    """
    state, interval, stop = point
    values = named_values(found)
    # Without a stopper nothing judges the values: they may be on any device.
    value = params = None
    if stop is not None:
        value = values if isinstance(found, Mapping) else values[VALUE]
        # With a checkpointer the best are on disk.
        keeps_params = stop.best_params is not None or stop.recent_params != ()
        params = tracked(state) if keeps_params else None
    judged = evaluation.judge(interval, stop, value, params, state.opt_state, facts)
    if judged.stop is not None:
        state = with_plateau(state, judged.stop, lr_scale)
    row: dict[str, Any] = dict(judged.row)
    if evaluation.writes_rewinds:
        row["rewinds"] = num_rewinds
    if "learning_rate" not in values:
        row |= judged.rate
    _check_names(row, values)
    point = Point(state, judged.interval, judged.stop)
    return point, {**row, **values}, judged.flags


def judge(
    update: Callable[..., EarlyStoppingState] | None,
    needs: frozenset[str],
    interval: Interval,
    stop: EarlyStoppingState | None,
    value: Any,
    params: Any,
    opt_state: Any,
    facts: Facts,
) -> Judged:
    """Closes the interval, updates the stopper, and reads guard and learning rate.

    Args:
      update: The stopper's ``update``, or ``None`` without a stopper.
      needs: The stopper's ``needs``.
      interval: Sums since the evaluation before.
      stop: The stopper's state.
      value: The value to judge, or the dict that holds it.
      params: The parameters of which the stopper keeps the best, or ``None``.
      opt_state: The optimizer's state.
      facts: Step, seconds and learning rate.
    """
    row, interval = close(interval)
    if facts.last_step is not None:
        # A mean over the steps, which a bound on updates knows, comes first.
        row = last_step_facts(*facts.last_step, opt_state) | row
    flags: dict[str, jax.Array] = {}
    if update is not None and stop is not None:
        told = {"step": facts.step, "train_value": row["train_loss"]}
        if "seconds" in needs:
            told["seconds"] = facts.seconds
        if "opt_state" in needs:
            told["opt_state"] = opt_state
        stop = update(value, stop, params, **told)
        flags |= {name: jnp.copy(getattr(stop, name)) for name in _FLAGS}
    if find_states(opt_state, GuardState):
        counted = metrics(opt_state)
        row |= totals(counted)
        flags |= flags_of_guard(counted)
    rate = learning_rate_item(opt_state, facts.scheduled_rate)
    return Judged(interval, stop, row, rate, flags)


def compiled_judge(stopper: EarlyStopping | None) -> Callable[..., Judged]:
    """`judge`, compiled once for each stopper: one dispatch an evaluation.

    The interval and the stopper's state are donated.
    """
    if stopper is None:
        return _judge_without_stopper
    return functools.partial(_judge_by(stopper.update), stopper.needs)


_judge_without_stopper = jax.jit(
    functools.partial(judge, None, frozenset()), donate_argnums=0
)


@CompiledFor
def _judge_by(get_update: Callable[[], Any]) -> Callable[..., Judged]:
    def judge_run(needs: frozenset[str], *inputs: Any) -> Judged:
        return judge(get_update(), needs, *inputs)

    return jax.jit(judge_run, static_argnums=0, donate_argnums=(1, 2))


def batch_stats(state: Any) -> Any:
    """The state's ``batch_stats``, or ``None`` if it has no such field."""
    return getattr(state, "batch_stats", None)


def tracked(state: Any) -> Any:
    """The parameters with the batch statistics that were computed for them."""
    stats = batch_stats(state)
    if stats is None:
        return state.params
    return {"params": state.params, "batch_stats": stats}


def named_values(found: Any) -> dict[str, Any]:
    """The result of ``evaluate`` as named values of a row."""
    values = dict(found) if isinstance(found, Mapping) else {VALUE: found}
    for name, value in values.items():
        where = "" if name == VALUE else f" for {name!r}"
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
        # Numbers of the host get one dtype, so that the stopper is not traced again.
        # An array is copied: it may be a part of the state, which is donated next.
        if isinstance(value, jax.Array):
            values[name] = jnp.copy(value)
        else:
            with np.errstate(over="ignore"):
                values[name] = np.float32(in_range(name, value))
    return values


def _check_names(row: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses values with a name that `fit` itself writes."""
    if taken := sorted(values.keys() & {"step", *row}):
        raise ValueError(
            f"`evaluate` must not return {taken}: `fit` itself writes these into the "
            "row. Call them, say, `val_loss`."
        )
