"""Thresholds of several groups, each with a state of its own, as one threshold."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard.threshold._base import Limits, ParamNorms, Threshold


def side_by_side(thresholds: Mapping[str, Threshold]) -> Threshold:
    """One threshold for the vector of the groups' norms."""

    def start(shape: tuple[int, ...]) -> dict[str, Any]:
        del shape
        return {label: each.start(()) for label, each in thresholds.items()}

    def limits(norm: jax.Array, global_norm: jax.Array, state: Any) -> Limits:
        both = [
            each.limits(norm[i], global_norm, state[label])
            for i, (label, each) in enumerate(thresholds.items())
        ]
        triggers, targets = zip(*both, strict=True)
        return jnp.stack(triggers), jnp.stack(targets)

    def learn(norm: jax.Array, clipped_norm: jax.Array, state: Any) -> dict[str, Any]:
        return {
            label: each.learn(norm[i], clipped_norm[i], state[label])
            for i, (label, each) in enumerate(thresholds.items())
        }

    def unit(params: ParamNorms) -> jax.Array:
        units = []
        for i, each in enumerate(thresholds.values()):
            one = jnp.ones((), params.norms.dtype)
            own = params._replace(norms=params.norms[i], counts=params.counts[i])
            units.append(one if each.unit is None else each.unit(own))
        return jnp.stack(units)

    has_unit = any(each.unit is not None for each in thresholds.values())
    return Threshold(start, limits, learn, unit if has_unit else None)
