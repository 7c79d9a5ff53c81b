"""One evaluation, in one order, for host and device."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._guarding.guard import GuardState
from optax_guard._trees import find_states
from optax_guard.stop._plateau import (
    PlateauScaleState,
    PlateauState,
    apply_plateau,
    set_lr_scale,
)
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState

# Of the stopper, for the host to read.
_FLAGS = ("should_stop", "stop_reason", "best_step")

# The key of a row for what `evaluate` returned, if it was no dict.
VALUE = "value"

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def learning_rate_item(
    state: Any, step: Any, schedule: optax.Schedule | None = None
) -> dict[str, jax.Array]:
    """The learning rate of the last update, as an item of a row.

    Args:
      state: A state with ``opt_state``.
      step: Steps done, at least 1.
      schedule: A function of the updates done, as the optimizer was given it; the
        hyperparameter ``learning_rate`` of ``optax.inject_hyperparams`` if ``None``.

    Returns:
      ``{"learning_rate": float[]}``, times the factor of a `stop.scale_by_plateau`;
      empty if nothing tells it.
    """
    if schedule is not None:
        guards = find_states(state, GuardState)
        # A schedule does not advance at a step that is skipped.
        skipped = guards[0].num_skipped if guards else 0
        rates = [schedule(jnp.maximum(step - 1 - skipped, 0))]
    else:
        settings = [s.hyperparams for s in find_states(state, _INJECTED)]
        rates = [x["learning_rate"] for x in settings if "learning_rate" in x]
    if not rates:
        return {}
    # A copy, for the state is donated to the next step.
    rate = jnp.array(rates[0], copy=True)
    for scale in find_states(state, PlateauScaleState):
        rate = rate * scale.lr_scale
    return {"learning_rate": rate}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _judge(
    stopper: EarlyStopping,
    stop: EarlyStoppingState,
    value: Any,
    params: Any,
    facts: dict[str, Any],
) -> tuple[EarlyStoppingState, dict[str, jax.Array]]:
    stop = stopper.update(value, stop, params, **facts)
    # Copies: the state is donated before the host reads the flags.
    flags = {name: getattr(stop, name) for name in _FLAGS}
    return stop, jax.tree.map(jnp.copy, flags)


def batch_stats(state: Any) -> Any:
    """The field of Flax, if there is one."""
    return getattr(state, "batch_stats", None)


def tracked(state: Any) -> Any:
    """What belongs to the best evaluation: averages of other weights would not do."""
    stats = batch_stats(state)
    if stats is None:
        return state.params
    return {"params": state.params, "batch_stats": stats}


def named_values(found: Any) -> dict[str, Any]:
    """What `evaluate` returned, by the names of a row."""
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
        # One dtype for numbers of the host, so that the stopper is not traced again;
        # a copy of an array, which may be a part of the state that is donated next.
        if isinstance(value, jax.Array):
            values[name] = jnp.copy(value)
        else:
            with np.errstate(over="ignore"):
                values[name] = np.float32(value)
    return values


def check_apart(row: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses values with a name that `fit` itself uses."""
    if taken := sorted(values.keys() & {"step", *row}):
        raise ValueError(
            f"`evaluate` must not return {taken}: `fit` itself writes these into the "
            "row. Call them, say, `val_loss`."
        )


def with_plateau(state: Any, stop: EarlyStoppingState, lr_scale: float = 1.0) -> Any:
    """Hands the factor that a `stop.plateau` has come to on to the optimizer."""
    if not find_states(stop.rule_state, PlateauState):
        return state
    opt_state = apply_plateau(state.opt_state, stop)
    if lr_scale != 1.0:
        scale = optax.tree.get_all_with_path(opt_state, "lr_scale")[0][1]
        opt_state = set_lr_scale(opt_state, scale * lr_scale)
    return state.replace(opt_state=opt_state)


def _lr_scales(state: Any) -> list[Any]:
    return [x for _, x in optax.tree.get_all_with_path(state.opt_state, "lr_scale")]
