"""One guarded step: a branch where a branch is free, else a mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._checks import check_leaves, check_transformation
from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._models import trained
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import parts_of, with_extra_args
from optax_guard._trees import map_inexact


class StepParts(NamedTuple):
    """The parts of a guard and of an accumulation, as ``update.parts``.

    Attributes:
      apply_gradients: ``apply_gradients(params, state, *, grads, **extra_args)`` gives
        new parameters and the new state.
      wrap_state: ``wrap_state(params, inner_state)`` gives the first state around the
        state of the optimizer inside.
      judge: Of a guard: ``judge(updates, state, params, extra_args, is_usable)`` gives
        the state with the verdict. ``None`` for an accumulation.
      mask: Of a guard: the leaves that count.
    """

    apply_gradients: Callable[..., tuple[optax.Params, Any]]
    wrap_state: Callable[[optax.Params, Any], Any]
    judge: Callable[..., Any] | None = None
    mask: Any = True


def take_or_keep(
    is_taken: jax.Array,
    take: Callable[..., tuple[Any, ...]],
    grads: Any,
    kept: tuple[Any, ...],
    *,
    hides_bad: bool = False,
    use_cond: bool = False,
) -> tuple[Any, ...]:
    """``take(grads, *kept)`` where ``is_taken``, else ``kept``.

    On CPU a masked result is a second copy of everything, and a branch is free. On TPU
    and GPU the mask fuses into the optimizer, and a branch costs.

    Args:
      is_taken: bool[].
      take: The step. Its last results are the trees of ``kept`` after the step. If a
        step is not taken, results before those are zeros.
      grads: The gradients.
      kept: The trees before the step.
      hides_bad: Whether ``take`` sees zeros for gradients where its result is masked.
      use_cond: Whether to branch on every platform.
    """
    # Under jit it is traced once for its shapes and for both platforms.
    take = jax.jit(take, inline=True)
    keep = keeping(jax.eval_shape(take, grads, *kept), len(kept))

    def branch(grads: Any, *kept: Any) -> tuple[Any, ...]:
        return lax.switch(is_taken.astype(jnp.int32), [keep, take], grads, *kept)

    def mask(grads: Any, *kept: Any) -> tuple[Any, ...]:
        # A masked result must not have been NaN: its derivative would be 0 * NaN.
        seen = zeros_unless(is_taken, grads) if hides_bad else grads
        return optax.tree.where(is_taken, take(seen, *kept), keep(grads, *kept))

    if use_cond:
        return branch(grads, *kept)
    return lax.platform_dependent(grads, *kept, cpu=branch, default=mask)


def keeping(like: tuple[Any, ...], num_kept: int) -> Callable[..., tuple[Any, ...]]:
    """The step that is not taken, with results like those of the one that is."""
    first = len(like) - num_kept

    def keep(grads: Any, *kept: Any) -> tuple[Any, ...]:
        del grads
        zeros = jax.tree.map(jnp.zeros_like, like[:first])
        return (*zeros, *map(cast_like, kept, like[first:]))

    return keep


def zeros_unless(condition: jax.Array, tree: Any) -> Any:
    return map_inexact(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """``tree`` with the dtypes of ``like``, for both sides of a choice must agree."""
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
                f"{x.shape} into {y.shape}. Is it a state of other parameters? Under "
                "`shard_map`, moments need the specs of their parameters."
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
    parts = parts_of(tx, StepParts)
    if parts is not None:
        check_leaves("opt_state", opt_state)
        return parts.apply_gradients(params, opt_state, grads=grads, **extra_args)
    check_same_tree(params, grads)
    warn_if_nested(opt_state, is_of_one=True)
    update = with_extra_args(tx).update
    updates, opt_state = update(grads, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def check_same_tree(params: Any, grads: Any) -> None:
    """Raises if there is not a gradient for each parameter."""
    params = trained(params)
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
