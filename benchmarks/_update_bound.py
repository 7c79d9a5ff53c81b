"""A bound on the update relative to the parameters, to be chained after an optimizer.

    |u| <= tau_t * max(|theta|, RMS(theta) * sqrt(n)),
    tau_t = max(floor, start / sqrt(t)), t from 1,

for each leaf of n entries, or for the whole tree; RMS over all parameters, so that
leaves of zeros can still move.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class UpdateBoundState(NamedTuple):
    updates_seen: jax.Array


def bound_update(
    start: Any = 0.1, floor: Any = 0.01, *, by_leaf: bool = True
) -> optax.GradientTransformation:
    """Scales updates down to the bound; those that are not finite pass."""

    def init(params: Any) -> UpdateBoundState:
        del params
        return UpdateBoundState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen = state.updates_seen + 1
        tau = jnp.maximum(floor, start / jnp.sqrt(seen.astype(jnp.float32)))
        whole = optax.tree.norm(params)
        size = sum(x.size for x in jax.tree.leaves(params))

        def leaf(u: jax.Array, p: jax.Array) -> jax.Array:
            share = math.sqrt(p.size / size)
            limit = tau * jnp.maximum(optax.tree.norm(p), whole * share)
            return u * _factor(optax.tree.norm(u), limit)

        if by_leaf:
            updates = jax.tree.map(leaf, updates, params)
        else:
            factor = _factor(optax.tree.norm(updates), tau * whole)
            updates = jax.tree.map(lambda u: u * factor, updates)
        return updates, UpdateBoundState(seen)

    return optax.GradientTransformation(init, update)


def _factor(norm: jax.Array, limit: jax.Array) -> jax.Array:
    is_above = norm > limit
    return jnp.where(is_above, limit / jnp.where(is_above, norm, 1.0), 1.0)
