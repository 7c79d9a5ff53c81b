"""How the leaves of a tree form groups that share a norm."""

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
    """The floating leaves of a tree, each in one part or more, and the parts' groups.

    Attributes:
      indices: For each floating leaf its index among all leaves of the tree.
      axes: For each of them the axes that the norms of its parts reduce.
      members: For each of them the groups of its parts, in the shape of their norms:
        one group, or consecutive ones.
      dims: For each of them, for each of its axes, the mesh axes over which its parts
        lie on different devices.
    """

    indices: list[int]
    axes: tuple[tuple[int, ...], ...]
    members: list[np.ndarray]
    dims: list[tuple[Names, ...]]

    def floating(self, tree: Any) -> list[jax.Array]:
        """The floating leaves of ``tree``."""
        leaves = jax.tree.leaves(tree)
        return [jnp.asarray(leaves[i]) for i in self.indices]

    def norms(self, leaves: list[jax.Array], over: list[Names]) -> jax.Array:
        """The norms of all parts of floating leaves, split over some mesh axes."""
        splits = tuple(map(Split, over, self.dims))
        return stacked_norms(leaves, self.axes, splits)

    @property
    def group_of_part(self) -> np.ndarray:
        """For each part of all leaves its group."""
        return np.concatenate([m.ravel() for m in self.members] or [np.zeros(0, int)])

    @property
    def leaf_of_part(self) -> np.ndarray:
        """For each part of all leaves the index of its leaf among all leaves."""
        return np.repeat(self.indices, [m.size for m in self.members]).astype(int)


def each_part(
    tree: Any, axes: Sequence[tuple[int, ...]], layouts: Sequence[Layout]
) -> Groups:
    """A group for each part that is left when ``axes`` of each leaf are reduced."""
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
    """For each leaf all axes, but for that along which its layers lie."""
    along = for_each_leaf("layer_axis", layer_axis, tree)
    axes = []
    for i, (x, axis) in enumerate(zip(jax.tree.leaves(tree), along, strict=True)):
        rank = np.ndim(x)
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
    """A tree like ``tree`` with a ``None`` for each part."""

    def name(layout: Layout, reduced: tuple[int, ...]) -> Any:
        kept = [n for a, n in enumerate(layout.shape) if a not in reduced]
        return (None,) * math.prod(kept) if kept else None

    return _named(tree, list(map(name, layouts, axes)))


def names_of_leaves(tree: Any) -> Any:
    """A tree like ``tree`` with a ``None`` for each floating leaf."""
    return _named(tree, [None] * len(jax.tree.leaves(tree)))


def _named(tree: Any, names: list[Any]) -> Any:
    """``names`` in the places of the floating leaves, and ``()`` elsewhere."""
    remaining = iter(names)

    def place(x: Any) -> Any:
        # A tree's own `None` is no leaf, and must not be taken for a name.
        if x is None:
            return ()
        found = next(remaining)
        return found if is_inexact(x) else ()

    return jax.tree.map(place, tree, is_leaf=lambda x: x is None)


def by_label(tree: Any, labels: Any, known: list[str]) -> Groups:
    """A group for each label, numbered as in ``known``."""
    leaves = jax.tree.leaves(tree)
    given = for_each_leaf("labels", labels, tree)
    indices = [i for i, x in enumerate(leaves) if is_inexact(x)]
    for i in indices:
        check_kind("labels", given[i], str, "a string for each leaf")
        if given[i] not in known:
            raise ValueError(
                "`max_norms` must have every label of `labels`, got none for "
                f"{given[i]!r} of {path_names(tree)[i]!r}. An infinite threshold only "
                "watches."
            )
    if unused := [label for label in known if label not in given]:
        raise ValueError(
            f"`labels` must use every label of `max_norms`, got no leaf for {unused}."
        )
    ranks = [np.ndim(leaves[i]) for i in indices]
    numbers = [known.index(given[i]) for i in indices]
    return Groups(
        indices,
        tuple(tuple(range(rank)) for rank in ranks),
        [np.full((1,) * rank, n) for rank, n in zip(ranks, numbers, strict=True)],
        [((),) * rank for rank in ranks],
    )


# The axes along which a unit lies, by the rank of a leaf: inputs come before outputs.
AXES_BY_RANK = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}


def unit_axes(
    tree: Any, axis: Any, axis_name: AxisName = None
) -> list[tuple[int, ...]]:
    """For each leaf the axes along which its units lie."""
    rules = for_each_leaf("axis", axis if callable(axis) else lambda _: axis, tree)
    axes = []
    for i, (layout, rule) in enumerate(
        zip(layouts(tree, axis_name), rules, strict=True)
    ):
        shape = layout.shape
        if rule is not None:
            try:
                axes.append(_normalized(rule, len(shape)))
            except (TypeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"`axis` must name axes of each leaf, got {rule} for "
                    f"{path_names(tree)[i]!r} of shape {shape}."
                ) from error
        elif not layout.is_whole and len(shape) > 1 >= sum(n != 1 for n in shape):
            raise ValueError(
                "`axis` must be given with `axis_name` for a leaf of which a device "
                f"has one row or column, got None for {path_names(tree)[i]!r} of local "
                f"shape {shape}. Its rank alone does not tell its units."
            )
        elif sum(n != 1 for n in shape) <= 1:
            axes.append(tuple(range(len(shape))))
        elif len(shape) in AXES_BY_RANK:
            axes.append(AXES_BY_RANK[len(shape)])
        else:
            raise ValueError(
                f"`axis` must be given for a leaf of more than 5 axes, got None for "
                f"{path_names(tree)[i]!r} of shape {shape}."
            )
    return axes


def _normalized(axis: Any, ndim: int) -> tuple[int, ...]:
    named = axis if isinstance(axis, tuple | list) else (axis,)
    axes = tuple(range(ndim)[operator.index(a)] for a in named)
    if len(set(axes)) < len(axes):
        raise ValueError("an axis is named twice")
    return axes
