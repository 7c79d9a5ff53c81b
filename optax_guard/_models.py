"""Trees that are more than parameters: models with functions, pairs of parameters."""

from typing import Any

import jax
import optax


def params_of(updates: Any, params: Any) -> Any:
    """The parameters to which the updates belong, with a leaf for each of them.

    Args:
      updates: Gradients, with ``None`` where a model has nothing to train.
      params: The parameters; an Equinox model with the functions in it; or
        ``optax.LookaheadParams``, of which the fast ones have gradients.

    Returns:
      A tree structured like ``updates``; ``params`` itself if it does not fit.
    """
    if not isinstance(updates, optax.LookaheadParams):
        params = trained(params)
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    if params is None or jax.tree.structure(params) == jax.tree.structure(updates):
        return params
    try:
        beside = structure.flatten_up_to(params)
    except ValueError:
        return params
    pairs = zip(leaves, beside, strict=True)
    return structure.unflatten([None if g is None else p for g, p in pairs])


def trained(params: Any) -> Any:
    """The parameters that have gradients."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def arrays_of(tree: Any) -> Any:
    """The tree with ``None`` for functions and flags, which a model may hold.

    A tree without any, or one that is no more than one, is itself the result.
    """
    has_static = any(map(_is_static, jax.tree.leaves(tree)))
    # A function alone is no model.
    if jax.tree_util.all_leaves([tree]) or not has_static:
        return tree
    return jax.tree.map(lambda x: None if _is_static(x) else x, tree)


def with_statics_of(tree: Any, arrays: Any) -> Any:
    """The arrays, with the functions and flags of ``tree`` in their places."""
    if arrays is tree or not any(map(_is_static, jax.tree.leaves(tree))):
        return arrays
    return jax.tree.map(
        lambda x, whole: whole if x is None else x, arrays, tree, is_leaf=_is_none
    )


def _is_none(x: Any) -> bool:
    return x is None


def _is_static(x: Any) -> bool:
    return isinstance(x, bool) or (callable(x) and not _is_array_like(x))


def _is_array_like(x: Any) -> bool:
    return hasattr(x, "dtype") and not isinstance(x, type)
