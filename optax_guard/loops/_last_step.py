"""What a row tells of one step, the last before the evaluation: how far it moved."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._trees import is_inexact, states_with

# Where optimizers keep a mean of past gradients.
_MEANS = ("mu", "trace")


def last_step_facts(before: Any, params: Any, opt_state: Any) -> dict[str, jax.Array]:
    """How far the last step moved the parameters, and how unequal layers are.

    Args:
      before: The parameters before the step.
      params: Those after it.
      opt_state: The optimizer's state after it.

    Returns:
      ``update_ratio``, float32[]: the norm of the step in units of that of the
      parameters before it; 0 if nothing moved, as in a step that was skipped.
      ``leaf_norm_ratio``, float32[], if there are two matrices or more: of these, the
      smallest norm of a leaf's gradients in units of the largest. The gradients are the
      optimizer's mean of past ones (``mu``, ``trace``) if it keeps one, else the step.
      A leaf that is exactly zero is frozen, and does not count.
    """
    pairs = [
        (x, y)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)
        if is_inexact(x)
    ]
    steps = [y - x for x, y in pairs]
    moved, size = _norm(_norms(steps)), _norm(_norms([x for x, _ in pairs]))
    facts = {"update_ratio": moved / jnp.where(size > 0, size, 1)}
    matrices = [x for x in _gradients(opt_state) or steps if jnp.ndim(x) >= 2]
    if len(matrices) >= 2:
        norms = _norms(matrices)
        smallest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
        largest = jnp.max(norms)
        ratio = smallest / jnp.where(largest > 0, largest, 1)
        facts["leaf_norm_ratio"] = jnp.where(largest > 0, ratio, jnp.nan)
    return facts


def _gradients(opt_state: Any) -> list[jax.Array]:
    """The optimizer's means of past gradients, by leaf; none if it keeps none."""
    for name in _MEANS:
        for state in states_with(opt_state, name):
            return [x for x in jax.tree.leaves(getattr(state, name)) if is_inexact(x)]
    return []


def _norms(leaves: list[jax.Array]) -> jax.Array:
    """The norm of each leaf, float32[leaves]."""
    norms = [jnp.linalg.norm(jnp.ravel(x).astype(_wide(x))) for x in leaves]
    return jnp.stack(norms or [jnp.zeros(())]).astype(jnp.float32)


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _norm(norms: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(norms**2))
