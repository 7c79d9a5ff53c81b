"""The learning rate of a run, for its record."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._guarding import GuardState
from optax_guard._states import find_states
from optax_guard._stop_plateau import PlateauScaleState

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
        # A schedule does not advance at a step that is withheld.
        withheld = guards[0].num_skipped if guards else 0
        rates = [schedule(jnp.maximum(step - 1 - withheld, 0))]
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
