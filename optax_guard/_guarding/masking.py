"""Clips that leave some leaves out: of the norm, of the verdict and of clipping."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_guard._checks import is_flag


def counting_only(
    mask: Any,
    init: Callable[..., Any],
    measure: Callable[..., Any],
    rescale: Callable[..., Any],
) -> tuple[Callable[..., Any], ...]:
    """The three parts of a clip, for the leaves where ``mask`` is true."""

    def init_counted(params: Any) -> Any:
        return init(hide(mask, params))

    def measure_counted(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        params = None if params is None else hide(mask, params)
        return measure(hide(mask, updates), state, params, **extra_args)

    def rescale_counted(updates: Any, measured: Any) -> Any:
        rescaled = jax.tree.leaves(rescale(hide(mask, updates), measured))
        leaves, structure = jax.tree.flatten(updates)
        counts = _counts(mask, updates)
        chosen = zip(counts, rescaled, leaves, strict=True)
        return structure.unflatten([new if c else old for c, new, old in chosen])

    return init_counted, measure_counted, rescale_counted


def hide(mask: Any, tree: Any) -> Any:
    """The tree with something that is not floating in place of what does not count.

    All other leaves keep their index, and settings that are trees still fit.
    """
    leaves, structure = jax.tree.flatten(tree)
    hidden = [
        x if counts else jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.float0)
        for x, counts in zip(leaves, _counts(mask, tree), strict=True)
    ]
    return structure.unflatten(hidden)


def _counts(mask: Any, tree: Any) -> list[bool]:
    """For each leaf whether it counts."""
    found = mask(tree) if callable(mask) else mask
    try:
        counts = jax.tree.leaves(jax.tree.broadcast(found, tree))
    except ValueError as error:
        raise ValueError(
            "`mask` must be, or return, a tree that ends where the parameters' tree "
            f"ends or before: {error}"
        ) from error
    for each in counts:
        if not is_flag(each):
            raise TypeError(
                "`mask` must have a bool for each leaf, true for those that count, "
                f"got {each!r} of type {type(each).__name__}."
            )
    return counts
