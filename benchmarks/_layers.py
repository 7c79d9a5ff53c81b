"""Rules by leaf on models whose layers are stacked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def by_layer(tx: Any, layer_axis: Callable[[str], int | None]) -> Any:
    """Shows a transformation each layer of a stack as a leaf of its own."""
    tx = optax.with_extra_args_support(tx)

    def apart(tree: Any) -> Any:
        def leaf(path: Any, x: jax.Array) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x if layer_axis(name) is None else tuple(x)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def together(like: Any, tree: Any) -> Any:
        def leaf(_: Any, x: Any) -> jax.Array:
            return jnp.stack(x) if isinstance(x, tuple) else x

        return jax.tree.map(leaf, like, tree)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        new, state = tx.update(apart(updates), state, apart(params), **extra)
        return together(updates, new), state

    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(apart(params)), update
    )
