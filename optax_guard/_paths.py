"""Names of leaves, and settings that differ from leaf to leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def path_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Names of the leaves, as ``encoder/layers/0/kernel``."""
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its name."""
    leaves = jax.tree.leaves(tree)
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in zip(path_names(tree), leaves, strict=True)
    }


def first_difference(old: Any, expected: Any) -> str:
    """Where a tree is not like another one, in words; empty if it is."""
    was, now = described(old), described(expected)
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            return (
                f"`{name}` is {was.get(name, 'not there')}, and should be "
                f"{now.get(name, 'left out')}"
            )
    structures = jax.tree.structure(old), jax.tree.structure(expected)
    return (
        "" if structures[0] == structures[1] else "it is {}, not {}".format(*structures)
    )


def for_each_leaf(name: str, setting: Any, tree: Any) -> list[Any]:
    """The value of a setting for each leaf of ``tree``.

    Args:
      name: The argument's name, for the error.
      setting: A function from the name of a leaf to its value, or a tree of values of
        which ``tree`` is a continuation; a single value is one such.
      tree: Parameters or updates.

    Returns:
      A list with as many values as there are leaves.

    Raises:
      ValueError: If ``setting`` is a tree that does not fit.
    """
    if callable(setting):
        return [setting(path) for path in path_names(tree)]
    if setting is None:
        return [None] * len(jax.tree.leaves(tree))
    try:
        return jax.tree.leaves(jax.tree.broadcast(setting, tree))
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a function of a leaf's path, or a tree that ends where "
            f"the parameters' tree ends or before: {error}"
        ) from error
