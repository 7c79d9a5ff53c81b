"""One optimizer step, whole: from gradients to new parameters."""

from typing import Any

import jax
import optax

from optax_guard._base import check_leaves, check_transformation, part_of


def apply_gradients(
    tx: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState,
    grads: optax.Updates,
    **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
    """One optimizer step: ``tx.update`` and ``optax.apply_updates`` in one.

    With a guard outermost the parameters are changed inside the branch that takes the
    step, so that on CPU, too, nothing is copied for the sake of the bad steps. With any
    other transformation it is those two calls.

    Args:
      tx: Any optax transformation.
      params: Parameters.
      opt_state: State of ``tx``.
      grads: Gradients, structured like ``params``.
      **extra_args: Extra arguments of ``tx.update``, such as ``value=loss``.

    Returns:
      New parameters and new state. In a jitted step donate both, and keep them in this
      order among arguments and results.

    Raises:
      TypeError: If ``tx`` is no transformation, or a leaf no array.
      ValueError: If ``grads`` are not structured like ``params``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.5), clip=1.0)
      >>> @jax.jit
      ... def step(params, opt_state):
      ...     loss, grads = jax.value_and_grad(jnp.sum)(params)
      ...     return og.apply_gradients(tx, params, opt_state, grads, value=loss)
      >>> step(jnp.zeros(1), tx.init(jnp.zeros(1)))[0]
      Array([-0.5], dtype=float32)
    """
    check_transformation("tx", tx)
    check_leaves("params", params)
    check_leaves("grads", grads)
    whole_step = part_of(tx, "apply_gradients")
    if whole_step is not None:
        check_leaves("opt_state", opt_state)
        return whole_step(params, opt_state, grads, **extra_args)
    check_same_tree(params, grads)
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def check_same_tree(params: Any, grads: Any) -> None:
    """Raises if there is not a gradient for each parameter."""
    if jax.tree.structure(params) == jax.tree.structure(grads):
        return
    # To Optax a parameter may be none, whatever its gradient is.
    (olds, wanted), (news, got) = (
        jax.tree.flatten(tree, is_leaf=lambda x: x is None) for tree in (params, grads)
    )
    if params is None or wanted != got or not _has_each(olds, news):
        raise ValueError(
            f"`grads` must have the structure of `params`, {wanted}, got {got}."
        )


def _has_each(params: list[Any], grads: list[Any]) -> bool:
    pairs = zip(params, grads, strict=True)
    return all(p is None or g is not None for p, g in pairs)
