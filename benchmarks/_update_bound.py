"""Bounds on the update relative to the parameters, to be chained after an optimizer.

The ratio of a leaf of n entries is r = |u| / max(|theta|, RMS(theta) * sqrt(n)), RMS
over all parameters, so that leaves of zeros can still move. At each step, t from 1,
tau = max(floor, start / sqrt(t)), and what is bounded is, by scope,

* leaf: each ratio, by a factor for each leaf;
* tree: |u| / |theta| of the whole tree;
* joint: the root of the sum of all ratios squared;
* sum: the sum of all ratios, which is about how much all layers together can change
  what a network computes (Bernstein et al., "On the distance between two neural
  networks and the stability of learning", 2020).

All but the first scale the whole update by one factor.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Scope = Literal["leaf", "tree", "joint", "sum"]
# Start and floor of each.
NUMBERS: dict[Scope, tuple[float, float]] = {
    "leaf": (0.1, 0.01),
    "tree": (0.1, 0.01),
    "joint": (0.2, 0.01),
    "sum": (0.5, 0.025),
}


class UpdateBoundState(NamedTuple):
    updates_seen: jax.Array


def bound_update(
    scope: Scope = "leaf", start: Any = None, floor: Any = None
) -> optax.GradientTransformation:
    """Scales updates down to the bound; those that are not finite pass."""
    start = NUMBERS[scope][0] if start is None else start
    floor = NUMBERS[scope][1] if floor is None else floor

    def init(params: Any) -> UpdateBoundState:
        del params
        return UpdateBoundState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen = state.updates_seen + 1
        tau = jnp.maximum(floor, start / jnp.sqrt(seen.astype(jnp.float32)))
        whole = optax.tree.norm(params)
        size = sum(x.size for x in jax.tree.leaves(params))

        def ratio(u: jax.Array, p: jax.Array) -> jax.Array:
            least = whole * math.sqrt(p.size / size)
            return optax.tree.norm(u) / jnp.maximum(optax.tree.norm(p), least)

        if scope == "tree":
            ratios = optax.tree.norm(updates) / whole
        else:
            ratios = jax.tree.map(ratio, updates, params)
        if scope == "leaf":
            scaled = jax.tree.map(lambda u, r: u * _factor(r, tau), updates, ratios)
        else:
            order = 1 if scope == "sum" else 2
            factor = _factor(optax.tree.norm(ratios, ord=order), tau)
            scaled = jax.tree.map(lambda u: u * factor, updates)
        return scaled, UpdateBoundState(seen)

    return optax.GradientTransformation(init, update)


def _factor(ratio: jax.Array, tau: jax.Array) -> jax.Array:
    is_above = ratio > tau
    return jnp.where(is_above, tau / jnp.where(is_above, ratio, 1.0), 1.0)
