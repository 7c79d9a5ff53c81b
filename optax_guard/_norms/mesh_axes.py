"""The mesh axes over which the leaves of a tree are split, in manual SPMD."""

import contextlib
import numbers
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_guard._trees import for_each_leaf, is_inexact, path_names

# Names of mesh axes for all leaves; or a function from a leaf's path, or a tree prefix,
# that gives names or a `PartitionSpec` for each leaf.
AxisName = Any
Names = tuple[Hashable, ...]


class Layout(NamedTuple):
    """The split of a leaf over devices, as far as it is known.

    Attributes:
      shape: The shape of the whole leaf; outside of a manual region the shape as given.
      dims: For each of its axes the mesh axes over which it is known to be split.
      is_whole: Whether no other axis splits the leaf, so that ``shape`` is right.
    """

    shape: tuple[int, ...]
    dims: tuple[Names, ...]
    is_whole: bool


def layouts(tree: Any, axis_name: AxisName) -> list[Layout]:
    """Reads from a ``PartitionSpec`` how each leaf is split."""
    found = []
    for i, (leaf, entry) in enumerate(
        zip(jax.tree.leaves(tree), _entries_by_leaf(axis_name, tree), strict=True)
    ):
        shape = np.shape(leaf)
        dims = tuple(map(_names, entry)) if isinstance(entry, PartitionSpec) else ()
        if len(dims) > len(shape):
            raise ValueError(
                "`axis_name` must have at most one entry for each axis of a leaf, "
                f"got {entry} for {path_names(tree)[i]!r} of shape {shape}."
            )
        dims += ((),) * (len(shape) - len(dims))
        # Outside of the manual region no name is known, and arrays are whole.
        with contextlib.suppress(NameError):
            shape = whole_shape(shape, dims)
        is_whole = isinstance(entry, PartitionSpec) or not _names(entry)
        found.append(Layout(shape, dims, is_whole))
    return found


def mesh_axes(tree: Any, axis_name: AxisName) -> list[Names]:
    """Lists for each floating leaf the mesh axes over which its sums are added up.

    If names are given for all leaves, ``shard_map`` with vma checks narrows them: a
    leaf is added up only over the axes over which its type varies. Along the other axes
    it is replicated and counts once. A setting for a single leaf is taken as it is.

    Raises:
      ValueError: If the type of a leaf varies over an axis that is not named.
    """
    found = []
    is_for_all = not _is_by_leaf(axis_name)
    is_local = isinstance(axis_name, (tuple, list)) and not axis_name
    leaves, paths = jax.tree.leaves(tree), path_names(tree)
    entries = _entries_by_leaf(axis_name, tree)
    for leaf, path, entry in zip(leaves, paths, entries, strict=True):
        if not is_inexact(leaf):
            continue
        names, varying = _names(entry), varying_axes(leaf)
        missing = sorted(map(str, varying - set(names)))
        if missing and not is_local:
            raise ValueError(_message_of_missing_axes(path, entry, missing))
        if is_for_all:
            names = tuple(n for n in names if n in varying or not _is_checked(n))
        found.append(tuple(sorted(set(names), key=str)))
    return found


def unchecked_axes(tree: Any, axis_name: AxisName) -> frozenset[Hashable]:
    """The mesh axes that split the floating leaves without a word in their types."""
    named = {name for names in mesh_axes(tree, axis_name) for name in names}
    return frozenset(name for name in named if not _is_checked(name))


def by_axes(axes: Sequence[Names]) -> tuple[tuple[Names, tuple[int, ...]], ...]:
    """Maps each distinct set of mesh axes to the leaves that are split over it."""
    members: dict[Names, tuple[int, ...]] = {}
    for i, names in enumerate(axes):
        members[names] = (*members.get(names, ()), i)
    return tuple(members.items())


def varying_axes(x: Any) -> frozenset[Hashable]:
    """Returns the mesh axes over which the type of ``x`` varies."""
    aval: Any = jax.typeof(x)
    # Before JAX 0.10 this attribute was called `vma`.
    found = getattr(aval, "vma", None)
    return aval.manual_axis_type.varying if found is None else found


def whole_shape(shape: Sequence[int], dims: tuple[Names, ...]) -> tuple[int, ...]:
    """Computes the shape of a whole array from the shape of a device's part of it."""
    return tuple(n * lax.axis_size(d) for n, d in zip(shape, dims, strict=True))


def place(part: jax.Array, dims: tuple[Names, ...]) -> jax.Array:
    """Puts a device's part of an array in its place, with zeros around it."""
    if not any(dims):
        return part
    zeros = jnp.zeros(whole_shape(part.shape, dims), part.dtype)
    return lax.dynamic_update_slice(zeros, part, _offset_of_part(part.shape, dims))


def local_part(whole: jax.Array, dims: tuple[Names, ...]) -> jax.Array:
    """Cuts this device's part out of a replicated array: the inverse of ``place``."""
    if not any(dims):
        return whole
    shape = [n // lax.axis_size(d) for n, d in zip(whole.shape, dims, strict=True)]
    return lax.dynamic_slice(whole, _offset_of_part(shape, dims), shape)


def _offset_of_part(shape: Sequence[int], dims: tuple[Names, ...]) -> list[Any]:
    return [
        jnp.asarray(lax.axis_index(d) * n, jnp.int32)
        for n, d in zip(shape, dims, strict=True)
    ]


def _is_by_leaf(axis_name: AxisName) -> bool:
    return callable(axis_name) or any(
        isinstance(x, PartitionSpec) for x in jax.tree.leaves(axis_name)
    )


def _entries_by_leaf(axis_name: AxisName, tree: Any) -> list[Any]:
    """Lists for each leaf the names or the ``PartitionSpec`` that hold for it."""
    if _is_by_leaf(axis_name):
        return for_each_leaf("axis_name", axis_name, tree)
    names = axis_name if isinstance(axis_name, (tuple, list)) else [axis_name]
    # JAX takes numbers for axes of the array itself.
    is_number = [isinstance(name, (numbers.Number, np.generic)) for name in names]
    if any(is_number) or not all(isinstance(name, Hashable) for name in names):
        raise TypeError(
            "`axis_name` must be a name or names of mesh axes, a function from the "
            "path of a leaf to them, or a tree of `jax.sharding.PartitionSpec`, got "
            f"{axis_name!r}."
        )
    return [axis_name] * len(jax.tree.leaves(tree))


def _names(entry: Any) -> Names:
    if entry is None:
        return ()
    if isinstance(entry, PartitionSpec):
        return tuple(name for dim in entry for name in _names(dim))
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _is_checked(name: Hashable) -> bool:
    """Whether types say which arrays vary over this axis."""
    return name in varying_axes(lax.axis_index(name))


def _message_of_missing_axes(path: str, entry: Any, missing: list[str]) -> str:
    names = repr(missing[0]) if len(missing) == 1 else repr(tuple(missing))
    where = f"leaf {path!r}" if path else "the leaf"
    return (
        f"`axis_name` must name every mesh axis over which updates vary, but {where} "
        f"varies over {names}, got {entry!r}. Each device would judge the norm of its "
        "own part, and some might skip a step that others take. Pass "
        f"`axis_name={names}` to the clip, in a guard "
        f"`clip=clip_by_global_norm(max_norm, axis_name={names})` or, to only watch, "
        f"`clip=record_norm(axis_name={names})`. If all devices have the same "
        "parameters, average the gradients first, with `jax.lax.pmean`. If each device "
        "trains alone, pass `axis_name=()`."
    )
