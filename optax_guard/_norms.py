"""Norms of whole trees: right in any float dtype and at any size, in one read."""

import functools
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._leaf_runs import (
    add_pairwise,
    combine,
    first_bad,
    first_true,
    mark_of,
    part_size,
    split,
)
from optax_guard._paths import path_names

# Sums of squares are kept twice, of entries scaled up and of entries scaled down, so
# that one read of the gradients is right for small and for huge ones (the idea of
# Blue, "A portable Fortran program to find the Euclidean norm", ACM TOMS 1978). Both
# scales are powers of two: on ordinary values the bits are those of the plain sum.
_SCALES = {
    jnp.dtype("float32"): (2.0**32, 2.0**-64),
    jnp.dtype("float64"): (2.0**256, 2.0**-512),
}
# Below this, squares in the plain sum may have been flushed to zero.
_SMALLEST_PLAIN_SUM = 2.0**-60

AxisName = Hashable | Sequence[Hashable] | None


class TreeNorm(NamedTuple):
    """A norm of a tree, and where it stopped being finite.

    Attributes:
      value: float[], the norm; float32, or float64 if a leaf is.
      bad_leaf: int32[], index among ``jax.tree.leaves`` of the first leaf whose own
        norm is not finite, because an entry is not or because it overflows; -1 if there
        is none. In a tree of more than 128 floating leaves, index of the first leaf in
        the run of neighbours that holds it: 32 of them, or 1/128 of a larger tree.
    """

    value: jax.Array
    bad_leaf: jax.Array


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` is real or complex floating: what has a gradient."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a tracer, a ``float0`` array or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def accumulator_dtype(leaves: Sequence[Any]) -> Any:
    """Float32, or float64 if a leaf is a double."""
    is_double = any(jnp.finfo(dtype_of(leaf)).bits == 64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def tree_norm(tree: Any, ord: Any = None, axis_name: AxisName = None) -> TreeNorm:
    """Norm of all floating entries of ``tree``.

    Args:
      tree: Any pytree; leaves that are not floating do not count.
      ord: ``None`` or 2, 1, ``inf`` or another positive number.
      axis_name: Mesh axes over which ``tree`` is split under ``shard_map`` or ``pmap``.

    Returns:
      The norm, 0 for a tree without floating entries.
    """
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    all_leaves = jax.tree.leaves(tree)
    indices = [i for i, leaf in enumerate(all_leaves) if is_inexact(leaf)]
    leaves = [jnp.asarray(all_leaves[i]) for i in indices]
    paths = path_names(tree)
    if not leaves:
        return TreeNorm(jnp.zeros((), jnp.float32), jnp.full((), -1, jnp.int32))
    if ord is None or ord == 2:
        value, bad = _euclidean(leaves, axis_name, _roles([paths[i] for i in indices]))
    elif ord == 1:
        value, bad = _sum_norm(leaves, axis_name)
    elif ord == np.inf:
        value, bad = _max_norm(leaves, axis_name)
    else:
        value, bad = _power_norm(leaves, ord, axis_name)
    if len(leaves) < len(all_leaves):
        bad = jnp.where(bad < 0, -1, jnp.array(indices, jnp.int32)[bad])
    return TreeNorm(value, bad)


def leaves_of_part(tree: Any, first: int) -> list[int]:
    """Indices of the leaves that a ``bad_leaf`` of ``first`` stands for."""
    indices = [i for i, leaf in enumerate(jax.tree.leaves(tree)) if is_inexact(leaf)]
    start = indices.index(first)
    return indices[start : start + part_size(len(indices))]


# Jitted for callers outside of `jit`: there, every call would compile its branches.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _euclidean(
    leaves: list[jax.Array], axis_name: AxisName, roles: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    up, down = _SCALES[accumulator_dtype(leaves)]
    # Two reductions over one operand are one fusion on TPU and GPU, but cost many times
    # one on CPU, where a rare second look is cheap instead.
    small, big, bad = lax.platform_dependent(
        *leaves, cpu=_squares_cpu, default=functools.partial(_squares, roles)
    )
    if axis_name is not None:
        # The mark of a bad leaf travels in the same all-reduce.
        small, big, mark = lax.psum((small, big, mark_of(bad, leaves)), axis_name)
        bad = first_true(mark > 0)
    scaled_back = jnp.sqrt(small) * (1 / up), jnp.sqrt(big) * (1 / down)
    return jnp.where(jnp.isfinite(small), *scaled_back), bad


@_euclidean.defjvp
def _euclidean_jvp(
    axis_name: AxisName, roles: tuple[str, ...], primals: Any, tangents: Any
) -> Any:
    # The derivative of the sums is 0 * inf where one of them overflows or vanishes;
    # that of the norm is the unit vector, and by convention zero at zero.
    (leaves,), (dots,) = primals, tangents
    value, bad = _euclidean(leaves, axis_name, roles)
    usable = jnp.isfinite(value) & (value > 0)
    # XLA may divide by multiplying with the inverse, which vanishes for a huge norm.
    scale = jnp.where(value > 1, 2.0**-64, 1.0).astype(value.dtype)
    length = jnp.where(usable, value * scale, 1.0)

    def along(x: jax.Array, dot: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            return along(x.real, dot.real) + along(x.imag, dot.imag)
        unit = jnp.where(usable, x.astype(value.dtype) * scale / length, 0.0)
        return jnp.sum(unit * dot.astype(value.dtype))

    slope = add_pairwise([along(x, dot) for x, dot in zip(leaves, dots, strict=True)])
    if axis_name is not None:
        slope = lax.psum(slope, axis_name)
    return (value, bad), (slope, np.zeros((), jax.dtypes.float0))


def _squares(
    roles: tuple[str, ...], *leaves: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of squares of entries scaled up, and down; the first bad leaf."""
    dtype = accumulator_dtype(leaves)
    up, down = not_folded(dtype, *_SCALES[dtype])
    runs = [_alike(run) for run in split(list(zip(roles, leaves, strict=True)))]

    def sums(scale: jax.Array) -> list[jax.Array]:
        return [add_pairwise([_sum_squares(x, dtype, scale) for x in r]) for r in runs]

    parts = sums(down)
    return add_pairwise(sums(up)), add_pairwise(parts), first_bad(parts, len(leaves))


def _roles(paths: list[str]) -> tuple[str, ...]:
    """What a leaf is in its layer: its path without the number of the layer."""
    return tuple(re.sub(r"\d+", "*", path, count=1) for path in paths)


def _alike(run: list[tuple[str, jax.Array]]) -> list[list[jax.Array]]:
    """Leaves of a run that one reduction adds up.

    A GPU takes two kernels or three to reduce one leaf; with hundreds of leaves that is
    more kernels than the optimizer has. So leaves of one type are added entry by entry
    first. Under `jit` their type does not tell how they are sharded, and to add those
    that are sharded differently would move them; the same leaf of another layer is
    sharded alike. From five leaves on, XLA for GPUs begins to write the sum to memory.
    """
    groups: dict[Any, list[jax.Array]] = {}
    for role, leaf in run:
        groups.setdefault((role, jax.typeof(leaf)), []).append(leaf)
    return [g[i : i + 4] for g in groups.values() for i in range(0, len(g), 4)]


def _squares_cpu(*leaves: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same numbers from a plain sum, and from a second look where that fails."""
    dtype = accumulator_dtype(leaves)
    up, down = not_folded(dtype, *_SCALES[dtype])
    # Here one vector compiles faster than many scalars.
    total = _sum_vector(jnp.stack([_sum_squares([x], dtype, 1.0) for x in leaves]))
    too_small = total < _SMALLEST_PLAIN_SUM
    scale = jnp.where(too_small, up, down)

    def enough(*leaves: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del leaves
        # A constant would not vary over the devices of `shard_map` as `rescaled` does.
        none = jnp.where(too_small, 0, -1).astype(jnp.int32)
        return total * up * up, total * down * down, none

    def rescaled(*leaves: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums = jnp.stack([_sum_squares([x], dtype, scale) for x in leaves])
        total = _sum_vector(sums)
        size = part_size(len(leaves))
        bad = first_true(~jnp.isfinite(sums))
        return (
            jnp.where(too_small, total, jnp.inf),
            jnp.where(too_small, 0.0, total),
            jnp.where(bad < 0, -1, bad // size * size),
        )

    second_look = too_small | ~jnp.isfinite(total)
    return lax.switch(second_look.astype(jnp.int32), [enough, rescaled], *leaves)


def _sum_norm(
    leaves: list[jax.Array], axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(leaves)
    sums = [jnp.sum(jnp.abs(x).astype(dtype)) for x in leaves]
    parts = [add_pairwise(run) for run in split(sums)]
    value, bad = add_pairwise(parts), first_bad(parts, len(leaves))
    if axis_name is not None:
        value, mark = lax.psum((value, mark_of(bad, leaves)), axis_name)
        bad = first_true(mark > 0)
    return value, bad


def _max_norm(
    leaves: list[jax.Array], axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(leaves)

    def size(x: jax.Array) -> jax.Array:
        # The largest of several devices' values may leave out a NaN, but no infinity.
        return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x).astype(dtype))

    largest = [jnp.max(size(x), initial=0.0) for x in leaves]
    parts = [combine(jnp.maximum, run) for run in split(largest)]
    value, bad = combine(jnp.maximum, parts), first_bad(parts, len(leaves))
    if axis_name is not None:
        bad = first_true(lax.psum(mark_of(bad, leaves), axis_name) > 0)
        value = lax.pmax(value, axis_name)
    return value, bad


def _power_norm(
    leaves: list[jax.Array], ord: Any, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    # Any other power needs the largest entry first: a second read, for few users.
    dtype = accumulator_dtype(leaves)
    largest, bad = _max_norm(leaves, axis_name)
    usable = jnp.isfinite(largest) & (largest > 0)
    # The norm does not depend on its unit, so neither does the derivative.
    unit = lax.stop_gradient(jnp.where(usable, largest, 1.0))
    sums = [jnp.sum((jnp.abs(x).astype(dtype) / unit) ** ord) for x in leaves]
    total = add_pairwise(sums)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    root = jnp.where(usable, total, 1.0) ** (1 / ord)
    return jnp.where(usable, unit * root, largest), bad


def not_folded(dtype: Any, *factors: float) -> tuple[jax.Array, ...]:
    """Constants that XLA does not multiply with each other.

    It turns ``(x * c) * (x * c)`` into ``(x * x) * (c * c)``, which is what scaling is
    there to avoid: the square of a small factor is zero in float32.
    """
    return lax.optimization_barrier(tuple(jnp.array(c, dtype) for c in factors))


def _sum_squares(alike: Sequence[jax.Array], dtype: Any, scale: Any) -> jax.Array:
    """Sum of squares of arrays of one shape, added entry by entry."""
    pairs = [(x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in alike]
    scaled = [x.astype(dtype) * scale for pair in pairs for x in pair]
    return jnp.sum(add_pairwise([x * x for x in scaled]))


def _sum_vector(values: jax.Array) -> jax.Array:
    """Sum of a vector in two stages: rounding grows with the root of its length."""
    width = math.isqrt(values.size - 1) + 1
    padded = jnp.pad(values, (0, -values.size % width))
    return jnp.sum(jnp.sum(padded.reshape(-1, width), axis=0))
