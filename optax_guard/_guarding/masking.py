"""Clips that leave out some leaves: of the norm, of the verdict and of clipping."""

from typing import Any

import jax
import numpy as np
import optax

from optax_guard._checks import is_flag
from optax_guard._clipping.parts import ClipParts, Measurement
from optax_guard._trees import is_function

# A tree of bools, a tree prefix of the parameters; or a function that returns one.
Mask = Any


def counting_only(mask: Mask, parts: ClipParts) -> ClipParts:
    """The parts of a clip, for the leaves where ``mask`` is true."""

    def init(params: optax.Params) -> Any:
        return parts.init(hide(mask, params))

    def measure(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, Any]:
        params = None if params is None else hide(mask, params)
        return parts.measure(hide(mask, updates), state, params, **extra_args)

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        rescaled = jax.tree.leaves(parts.rescale(hide(mask, updates), measured))
        leaves, structure = jax.tree.flatten(updates)
        counts = _counts(mask, updates)
        chosen = zip(counts, rescaled, leaves, strict=True)
        return structure.unflatten([new if c else old for c, new, old in chosen])

    return ClipParts(init, measure, rescale, parts.axis_name)


def hide(mask: Mask, tree: Any) -> Any:
    """The tree, with a leaf that is not floating in place of each that does not count.

    The other leaves keep their index, and settings that are trees still fit.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        # Such as the placeholder that `optax.tree_map_params` gives to `init`.
        return tree
    hidden = [
        x if counts else jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.float0)
        for x, counts in zip(leaves, _counts(mask, tree), strict=True)
    ]
    return structure.unflatten(hidden)


def _counts(mask: Mask, tree: Any) -> list[bool]:
    """For each leaf whether it counts."""
    is_pair = isinstance(tree, optax.LookaheadParams)
    if is_pair and not isinstance(mask, optax.LookaheadParams):
        return [counts for part in tree for counts in _counts(mask, part)]
    choose: Any = mask
    found = choose(tree) if is_function(mask) else mask
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
