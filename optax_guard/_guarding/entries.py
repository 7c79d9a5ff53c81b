"""The finite law: an entry that a step would make non-finite keeps its old value.

The guard judges gradients and loss, not the optimizer. An optimizer can make a NaN of
finite gradients: by a division by zero in float16, by a schedule, by a square that
overflows. So the parameters and the state after the step are looked at, entry by entry.
A parameter and its moments belong together: if one of them would not be finite, all of
them keep their old values. Otherwise an infinite moment would be set back alone, and
the next step would divide by it.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._models import trained
from optax_guard._norms.mesh_axes import varying_axes
from optax_guard._trees import is_inexact

# The share of the entries that is looked at to tell whether a step was lost.
_LOOKED_AT = 1024
# At most so many entries of a leaf, if the smallest leaf is larger than that share.
_MOST_ENTRIES = 1024


class Kept(NamedTuple):
    """The entries that keep their old values, a bool array or ``None`` for each leaf.

    Attributes:
      of_params: For the leaves of the parameters, or of the updates.
      of_state: For the leaves of the optimizer's state.
    """

    of_params: list[jax.Array | None]
    of_state: list[jax.Array | None]


class Told(NamedTuple):
    """What the smallest leaves, at most 1/1024 of all entries, tell of a step.

    Attributes:
      is_lost: bool[], whether all of their entries kept their old values.
      is_partial: bool[], whether some did.
      were_bad: bool[], whether a parameter was not finite before the step.
    """

    is_lost: jax.Array
    is_partial: jax.Array
    were_bad: jax.Array


def kept_entries(params: Any, state: Any, old_state: Any) -> Kept:
    """Finds the entries that a step must not change.

    Args:
      params: The parameters as they would be after the step; or the updates.
      state: The optimizer's state after the step.
      old_state: The state before it. Where a number that belongs to no parameter was
        not finite, as line searches start, the optimizer knows best.
    """
    values = jax.tree.leaves(params)
    together = [[x] if _is_looked_at(x) else [] for x in values]
    news, olds = jax.tree.leaves(state), jax.tree.leaves(old_state)
    owners = _owners(params, state)
    for owner, new in zip(owners, news, strict=True):
        if owner is not None and together[owner] and _is_looked_at(new):
            together[owner].append(new)
    of_params = [_is_any_bad(arrays) if arrays else None for arrays in together]
    of_state: list[jax.Array | None] = []
    for owner, new, old in zip(owners, news, olds, strict=True):
        if not _is_looked_at(new):
            of_state.append(None)
        elif owner is None or of_params[owner] is None:
            of_state.append(_is_bad(new, old))
        else:
            of_state.append(of_params[owner])
    return Kept(of_params, of_state)


def with_old_entries(
    new: Any, old: Any, kept: Sequence[jax.Array | None], is_taken: Any
) -> Any:
    """The new tree, with old entries where they are kept or the step is not taken."""
    news, treedef = jax.tree.flatten(new)
    chosen = [
        _chosen(a, b, bad, is_taken)
        for a, b, bad in zip(news, jax.tree.leaves(old), kept, strict=True)
    ]
    return treedef.unflatten(chosen)


def is_any(kept: Kept) -> jax.Array:
    """Whether any entry of any leaf is kept."""
    found = [
        jnp.any(bad) for bad in (*kept.of_params, *kept.of_state) if bad is not None
    ]
    return jnp.any(jnp.stack(found)) if found else jnp.zeros((), jnp.bool_)


def told_by(
    kept: Kept | None,
    params: Any,
    norm: jax.Array,
    unchecked: frozenset[Hashable] = frozenset(),
) -> Told:
    """Looks at the smallest leaves. To look at all would be another read of all.

    Devices that share the ``norm`` share what is told: those along axes over which the
    types of leaves vary, and along the ``unchecked`` ones.

    Args:
      kept: The entries that keep their old values; ``None`` if the step is skipped.
      params: The parameters before the step; ``None`` if they are not known.
      norm: The global norm.
      unchecked: Mesh axes.
    """
    found = [] if kept is None else [x for x in kept.of_params if x is not None]
    olds = [x for x in jax.tree.leaves(params) if _is_looked_at(x)]
    bad = _smallest(found)
    # Two reductions for each leaf: XLA for GPUs fuses them with others, and would make
    # a kernel of one that counts both.
    num_kept = _sum_all(bad)
    num_bad = _sum_all([~jnp.isfinite(x) for x in _smallest(olds)])
    num_all: Any = sum(x.size for x in bad)
    vary = varying_axes(num_kept) | varying_axes(num_bad)
    if axes := tuple(vary - varying_axes(norm) | unchecked):
        counts = num_kept, num_bad, num_all
        num_kept, num_bad, num_all = jax.lax.psum(counts, axes)
    return Told((num_kept == num_all) & (num_all > 0), num_kept > 0, num_bad > 0)


def _smallest(leaves: list[jax.Array]) -> list[jax.Array]:
    """The smallest of the leaves, or a part of one."""
    leaves = sorted(leaves, key=lambda x: x.size)
    most = max(sum(x.size for x in leaves) // _LOOKED_AT, _MOST_ENTRIES)
    chosen, total = [], 0
    for x in leaves:
        total += x.size
        if total > most:
            break
        chosen.append(x)
    return chosen or [_few(x) for x in leaves[:1]]


def _sum_all(arrays: list[jax.Array]) -> jax.Array:
    sums = [jnp.sum(x, dtype=jnp.int32) for x in arrays]
    return sum(sums[1:], sums[0]) if sums else jnp.zeros((), jnp.int32)


def _few(x: jax.Array) -> jax.Array:
    """Some neighbours along the last axis, without a reshape that would move them."""
    sizes = [1] * x.ndim
    sizes[-1] = min(x.shape[-1], _MOST_ENTRIES)
    return jax.lax.slice(x, [0] * x.ndim, sizes)


def _is_looked_at(x: Any) -> bool:
    """Whether it is a floating array in the memory of the device.

    The host's memory is where `jit` can put moments that are offloaded. To look at them
    there would move them; they are chosen between by the verdict alone.
    """
    space = str(getattr(jax.typeof(x), "memory_space", ""))
    return is_inexact(x) and x.size > 0 and not space.endswith("Host")


def _is_any_bad(arrays: Sequence[jax.Array]) -> jax.Array:
    """Where an entry of one of these arrays is not finite."""
    # One comparison: XLA on CPU is slow with several. A NaN or infinity minus itself is
    # not finite, even if the compiler fuses a product into it. A factor of 0 would not
    # do: XLA joins constants, and of x * 1e20 * 0 makes x * 0, which is finite.
    parts = [part for x in arrays for part in _real_parts(x)]
    differences = [(part - part).astype(jnp.float32) for part in parts]
    return ~jnp.isfinite(sum(differences[1:], differences[0]))


def _real_parts(x: jax.Array) -> tuple[jax.Array, ...]:
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _is_bad(new: jax.Array, old: jax.Array) -> jax.Array:
    """Where a number of the state is not finite that was."""
    return ~jnp.isfinite(new) & jnp.isfinite(old)


def _chosen(new: Any, old: Any, bad: jax.Array | None, is_taken: Any) -> Any:
    if bad is None:
        return new if is_taken is True else jnp.where(is_taken, new, old)
    return jnp.where(bad if is_taken is True else bad | ~is_taken, old, new)


def _owners(params: Any, state: Any) -> list[int | None]:
    """For each leaf of the state, which parameter it belongs to, if any.

    It is the parameter of that shape with whose path the leaf's path ends: a moment of
    ``layer/kernel`` is at ``0/mu/layer/kernel``, also under a mask or a partition.
    """
    # Of a pair of parameters those come first that have moments.
    leaves = jax.tree.leaves_with_path(trained(params))
    by_path = {tuple(map(str, p)): (i, jnp.shape(x)) for i, (p, x) in enumerate(leaves)}
    longest = max(map(len, by_path), default=0)
    owners: list[int | None] = []
    for path, leaf in jax.tree.leaves_with_path(state):
        names = tuple(map(str, path))
        found = None
        for length in range(min(longest, len(names)), -1, -1):
            i, shape = by_path.get(names[len(names) - length :], (None, None))
            if shape == jnp.shape(leaf):
                found = i
                break
        owners.append(found)
    return owners
