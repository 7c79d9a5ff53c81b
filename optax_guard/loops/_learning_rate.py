"""The learning rate of a run: its item in a row, and the factor of a plateau."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._guarding.guard import GuardState
from optax_guard._trees import find_states
from optax_guard.stop._plateau import (
    PlateauScaleState,
    PlateauState,
    apply_plateau,
    set_lr_scale,
)
from optax_guard.stop._state import EarlyStoppingState

_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def scheduled_rate(
    schedule: optax.Schedule | None, opt_state: Any, step: int
) -> jax.Array | None:
    """The learning rate of the last update by a schedule of the updates done."""
    if schedule is None:
        return None
    guards = find_states(opt_state, GuardState)
    # A schedule does not advance at a step that is skipped.
    skipped = guards[0].num_skipped if guards else 0
    return jnp.array(schedule(jnp.maximum(step - 1 - skipped, 0)), copy=True)


def learning_rate_item(
    opt_state: Any, scheduled_rate: jax.Array | None
) -> dict[str, jax.Array]:
    """The learning rate of the last update, as an item of a row.

    Args:
      opt_state: The optimizer's state.
      scheduled_rate: The rate by the user's schedule. If it is ``None``, the rate is
        the hyperparameter ``learning_rate`` of ``optax.inject_hyperparams``.

    Returns:
      ``{"learning_rate": float[]}``, times the factor of a `stop.scale_by_plateau`;
      empty if neither tells the rate.
    """
    if scheduled_rate is not None:
        rates = [scheduled_rate]
    else:
        settings = [s.hyperparams for s in find_states(opt_state, _INJECTED)]
        rates = [x["learning_rate"] for x in settings if "learning_rate" in x]
    if not rates:
        return {}
    # A copy, because the state is donated to the next step.
    rate = jnp.array(rates[0], copy=True)
    for scale in find_states(opt_state, PlateauScaleState):
        rate = rate * scale.lr_scale
    return {"learning_rate": rate}


def with_plateau(state: Any, stop: EarlyStoppingState, lr_scale: float = 1.0) -> Any:
    """Writes the factor of a `stop.plateau` into the optimizer's state, if any."""
    if not find_states(stop.rule_state, PlateauState):
        return state
    opt_state = apply_plateau(state.opt_state, stop)
    if lr_scale != 1.0:
        scale = optax.tree.get_all_with_path(opt_state, "lr_scale")[0][1]
        opt_state = set_lr_scale(opt_state, scale * lr_scale)
    return state.replace(opt_state=opt_state)


def lr_scales(state: Any) -> list[Any]:
    """The factors on the learning rate in the optimizer's state."""
    return [x for _, x in optax.tree.get_all_with_path(state.opt_state, "lr_scale")]
