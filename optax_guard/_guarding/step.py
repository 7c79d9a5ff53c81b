"""Taking a step or keeping what was: a branch where it is free, else a mask."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._checks import check_leaves, check_transformation
from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import part_of
from optax_guard._trees import map_inexact, select


def take_or_keep(
    is_taken: jax.Array,
    take: Callable[..., Any],
    keep: Callable[..., Any],
    *operands: Any,
    hides_bad: bool = False,
    use_cond: bool = False,
) -> Any:
    """``take(*operands)`` where ``is_taken``, else ``keep``.

    On CPU a masked result is a second copy of everything, and a branch is free; on TPU
    and GPU the mask fuses into the optimizer and a branch is what costs. There,
    ``hides_bad`` makes the first operand zeros where ``take`` does not count. With
    ``use_cond`` it is a branch everywhere.
    """
    # Under jit it is traced once for its shapes and for both platforms.
    take = jax.jit(take, inline=True)
    like = jax.eval_shape(take, *operands)

    def branch(*operands: Any) -> Any:
        return lax.switch(
            is_taken.astype(jnp.int32), [lambda *x: keep(like, *x), take], *operands
        )

    def mask(updates: Any, *others: Any) -> Any:
        seen = updates
        if hides_bad:
            # What is masked out must not have been NaN: its derivative is 0 * NaN.
            seen = map_inexact(
                lambda x: jnp.where(is_taken, x, jnp.zeros_like(x)), seen
            )
        return select(is_taken, take(seen, *others), keep(like, updates, *others))

    if use_cond:
        return branch(*operands)
    return lax.platform_dependent(*operands, cpu=branch, default=mask)


def cast_like(tree: Any, like: Any) -> Any:
    """``tree`` with the dtypes of ``like``, as both sides of a choice must have."""
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise ValueError(
            "`inner` must not change the structure of its state in `update`, but "
            f"turned {jax.tree.structure(tree)} into {jax.tree.structure(like)}: a "
            "step that is skipped could not give the old state back."
        )

    def leaf(x: Any, y: Any) -> Any:
        if x.shape != y.shape:
            raise ValueError(
                "`inner` must not change shapes of its state in `update`, but turned "
                f"{x.shape} into {y.shape}. Is it a state of other parameters?"
            )
        return x if x.dtype == y.dtype else x.astype(y.dtype)

    return jax.tree.map(leaf, tree, like)


@answers_wrong_calls
def apply_gradients(
    tx: optax.GradientTransformation,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
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
      grads: Gradients, structured like ``params``. By keyword, because a tree of
        parameters in its place would have the same structure.
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
      ...     return og.apply_gradients(tx, params, opt_state, grads=grads, value=loss)
      >>> step(jnp.zeros(1), tx.init(jnp.zeros(1)))[0]
      Array([-0.5], dtype=float32)
    """
    check_transformation("tx", tx)
    check_leaves("params", params)
    check_leaves("grads", grads)
    whole_step = part_of(tx, "apply_gradients")
    if whole_step is not None:
        check_leaves("opt_state", opt_state)
        return whole_step(params, opt_state, grads=grads, **extra_args)
    check_same_tree(params, grads)
    warn_if_nested(opt_state)
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
