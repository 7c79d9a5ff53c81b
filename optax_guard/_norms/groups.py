"""Groups of entries that share a norm: whole leaves, layers, labels and units."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_kind
from optax_guard._norms.axis_norms import Split, stacked_norms
from optax_guard._norms.mesh_axes import AxisName, Layout, Names, layouts
from optax_guard._trees import for_each_leaf, is_inexact, path_names


class Groups(NamedTuple):
    """The floating leaves of a tree, their parts, and the group of each part.

    A part is a whole leaf, a layer of a stacked leaf or a unit. Every list has one item
    for each floating leaf.

    Attributes:
      indices: The leaf's index among all leaves of the tree.
      axes: The axes that the norms of its parts reduce.
      members: The groups of its parts, in the shape of their norms: one group, or
        consecutive ones.
      dims: For each of its axes the mesh axes over which its parts lie on different
        devices.
    """

    indices: list[int]
    axes: tuple[tuple[int, ...], ...]
    members: list[np.ndarray]
    dims: list[tuple[Names, ...]]

    def floating(self, tree: Any) -> list[jax.Array]:
        """Lists the floating leaves of ``tree``."""
        leaves = jax.tree.leaves(tree)
        return [jnp.asarray(leaves[i]) for i in self.indices]

    def norms(self, leaves: list[jax.Array], over: list[Names]) -> jax.Array:
        """Computes the norms of all parts of leaves that are split over mesh axes."""
        splits = tuple(map(Split, over, self.dims))
        return stacked_norms(leaves, self.axes, splits)

    @property
    def group_of_part(self) -> np.ndarray:
        """The group of each part of all leaves, as a vector."""
        return np.concatenate([m.ravel() for m in self.members] or [np.zeros(0, int)])

    @property
    def leaf_of_part(self) -> np.ndarray:
        """The index of each part's leaf among all leaves, as a vector."""
        return np.repeat(self.indices, [m.size for m in self.members]).astype(int)


def each_part(
    tree: Any, axes: Sequence[tuple[int, ...]], layouts: Sequence[Layout]
) -> Groups:
    """Makes a group of each part that is left when ``axes`` of a leaf are reduced."""
    leaves = jax.tree.leaves(tree)
    indices = [i for i, x in enumerate(leaves) if is_inexact(x)]
    members, dims, start = [], [], 0
    for i in indices:
        shape = [1 if a in axes[i] else n for a, n in enumerate(layouts[i].shape)]
        size = math.prod(shape)
        members.append(np.arange(start, start + size).reshape(shape))
        dims.append(
            tuple(() if a in axes[i] else d for a, d in enumerate(layouts[i].dims))
        )
        start += size
    return Groups(indices, tuple(axes[i] for i in indices), members, dims)


def axes_without(tree: Any, layer_axis: Any) -> list[tuple[int, ...]]:
    """Lists for each leaf all of its axes except the one along which layers lie."""
    along = for_each_leaf("layer_axis", layer_axis, tree)
    axes = []
    for i, (x, axis) in enumerate(zip(jax.tree.leaves(tree), along, strict=True)):
        rank = len(np.shape(x))  # Not all that has a shape has a rank.
        is_whole = isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
        if axis is not None and not (is_whole and -rank <= axis < rank):
            raise ValueError(
                f"`layer_axis` must be an axis of each leaf, got {axis} for "
                f"{path_names(tree)[i]!r} of shape {np.shape(x)}. Pass a function of "
                "the path that returns None for leaves that are not stacked."
            )
        kept = None if axis is None else axis % rank
        axes.append(tuple(a for a in range(rank) if a != kept))
    return axes


def names_of_parts(
    tree: Any, axes: Sequence[tuple[int, ...]], layouts: Sequence[Layout]
) -> Any:
    """Builds a tree like ``tree`` with a ``None`` for each part."""

    def names_of_leaf(layout: Layout, reduced: tuple[int, ...]) -> Any:
        kept = [n for a, n in enumerate(layout.shape) if a not in reduced]
        return (None,) * math.prod(kept) if kept else None

    return _at_floating_leaves(tree, list(map(names_of_leaf, layouts, axes)))


def names_of_leaves(tree: Any) -> Any:
    """Builds a tree like ``tree`` with a ``None`` for each floating leaf."""
    return _at_floating_leaves(tree, [None] * len(jax.tree.leaves(tree)))


def _at_floating_leaves(tree: Any, names: list[Any]) -> Any:
    """Puts each leaf's name in its place if it is floating, else ``()``."""
    remaining = iter(names)

    def name_or_nothing(x: Any) -> Any:
        # A `None` in the tree is no leaf and has no name, but the names are `None` too.
        if x is None:
            return ()
        name = next(remaining)
        return name if is_inexact(x) else ()

    return jax.tree.map(name_or_nothing, tree, is_leaf=lambda x: x is None)


def by_label(tree: Any, labels: Any, known: list[str]) -> Groups:
    """Makes a group of the leaves with one label; ``known`` says its number."""
    leaves = jax.tree.leaves(tree)
    given = for_each_leaf("labels", labels, tree)
    indices = [i for i, x in enumerate(leaves) if is_inexact(x)]
    for i in indices:
        check_kind("labels", given[i], str, "a string for each leaf")
        if given[i] not in known:
            raise ValueError(
                "`max_norms` must have every label of `labels`, got none for "
                f"{given[i]!r} of {path_names(tree)[i]!r}. To only watch that group, "
                "give it an infinite threshold."
            )
    unused = [label for label in known if label not in given]
    # Without leaves it may be the placeholder of `optax.tree.map_params`.
    if leaves and unused:
        raise ValueError(
            f"`labels` must use every label of `max_norms`, got no leaf for {unused}."
        )
    ranks = [len(np.shape(leaves[i])) for i in indices]
    numbers = [known.index(given[i]) for i in indices]
    return Groups(
        indices,
        tuple(tuple(range(rank)) for rank in ranks),
        [np.full((1,) * rank, n) for rank, n in zip(ranks, numbers, strict=True)],
        [((),) * rank for rank in ranks],
    )


# The axes along which a unit lies, by the rank of its leaf: Flax puts the inputs first.
AXES_BY_RANK = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}


def unit_axes(
    tree: Any, axis: Any, axis_name: AxisName = None
) -> list[tuple[int, ...]]:
    """Lists for each leaf the axes along which its units lie."""
    rules = for_each_leaf("axis", axis if callable(axis) else lambda _: axis, tree)
    return [
        _unit_axes_of_leaf(path, layout, rule)
        for path, layout, rule in zip(
            path_names(tree), layouts(tree, axis_name), rules, strict=True
        )
    ]


def _unit_axes_of_leaf(path: str, layout: Layout, rule: Any) -> tuple[int, ...]:
    shape = layout.shape
    num_long_axes = sum(n != 1 for n in shape)
    if rule is not None:
        try:
            return _as_axes(rule, len(shape))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"`axis` must name axes of each leaf, got {rule} for {path!r} of shape "
                f"{shape}."
            ) from error
    if not layout.is_whole and len(shape) > 1 >= num_long_axes:
        raise ValueError(
            "`axis` must be given with `axis_name` where a device has one row or "
            f"column of a leaf, got None for {path!r} of local shape {shape}. The rank "
            "of that leaf alone does not tell its units."
        )
    if num_long_axes <= 1:
        return tuple(range(len(shape)))
    if len(shape) not in AXES_BY_RANK:
        raise ValueError(
            f"`axis` must be given for a leaf of more than 5 axes, got None for "
            f"{path!r} of shape {shape}."
        )
    return AXES_BY_RANK[len(shape)]


def _as_axes(axis: Any, rank: int) -> tuple[int, ...]:
    """Turns one axis or several, possibly negative, into distinct numbers from 0."""
    named = axis if isinstance(axis, tuple | list) else (axis,)
    axes = tuple(range(rank)[operator.index(a)] for a in named)
    if len(set(axes)) < len(axes):
        raise ValueError("an axis is named twice")
    return axes
