"""Norms of whole trees: right in any float dtype and at any size, in one read."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Sums of squares are kept twice, of entries scaled up and of entries scaled down, so
# that one read of the gradients is right for small and for huge ones (the idea of
# Blue, "A portable Fortran program to find the Euclidean norm", ACM TOMS 1978). Both
# scales are powers of two: on ordinary values the bits are those of the plain sum.
_SCALES = {
    np.dtype("float32"): (2.0**32, 2.0**-64),
    np.dtype("float64"): (2.0**256, 2.0**-512),
}
# Below this, squares in the plain sum may have been flushed to zero.
_SMALLEST_PLAIN_SUM = 2.0**-60
# The name of a bad leaf needs its own sum across devices. Up to this many sums travel
# in one all-reduce; trees with more leaves name a run of neighbouring leaves.
_MAX_PARTS = 128

AxisName = Hashable | Sequence[Hashable] | None


class TreeNorm(NamedTuple):
    """A norm of a tree, and where it stopped being finite.

    Attributes:
      value: float[], the norm; float32, or float64 if a leaf is.
      bad_leaf: int32[], index among ``jax.tree.leaves`` of the first leaf with a
        non-finite entry; -1 if there is none. In a tree of more than 128 floating
        leaves, of the first leaf in the run of neighbours that holds it.
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
    dtypes = [jnp.finfo(dtype_of(leaf)).dtype for leaf in leaves]
    return jnp.result_type(jnp.float32, *dtypes)


def tree_norm(tree: Any, ord: Any = None, axis_name: AxisName = None) -> TreeNorm:
    """Norm of all floating entries of ``tree``.

    Args:
      tree: Any pytree; leaves that are not floating do not count.
      ord: ``None`` or 2, 1, ``inf`` or another positive number.
      axis_name: Mesh axes over which ``tree`` is split under ``shard_map`` or ``pmap``.

    Returns:
      The norm, 0 for a tree without floating entries.
    """
    all_leaves = jax.tree.leaves(tree)
    indices = [i for i, leaf in enumerate(all_leaves) if is_inexact(leaf)]
    leaves = [jnp.asarray(all_leaves[i]) for i in indices]
    if not leaves:
        return TreeNorm(jnp.zeros((), jnp.float32), jnp.full((), -1, jnp.int32))
    if ord is None or ord == 2:
        value, parts = _euclidean(leaves, axis_name)
    elif ord == 1:
        value, parts = _sum_norm(leaves, axis_name)
    elif ord == np.inf:
        value, parts = _max_norm(leaves, axis_name)
    else:
        value, parts = _power_norm(leaves, ord, axis_name)
    bad_leaf = jnp.full((), -1, jnp.int32)
    firsts = indices[:: _part_size(len(indices))]
    for first, part in reversed(list(zip(firsts, parts, strict=True))):
        bad_leaf = jnp.where(jnp.isfinite(part), bad_leaf, jnp.int32(first))
    return TreeNorm(value, bad_leaf)


def leaves_of_part(tree: Any, first: int) -> list[int]:
    """Indices of the leaves that a ``bad_leaf`` of ``first`` stands for."""
    indices = [i for i, leaf in enumerate(jax.tree.leaves(tree)) if is_inexact(leaf)]
    start = indices.index(first)
    return indices[start : start + _part_size(len(indices))]


def _euclidean(leaves: list[Any], axis_name: AxisName) -> tuple[jax.Array, Any]:
    dtype = accumulator_dtype(leaves)
    up, down = _SCALES[np.dtype(dtype)]
    small, *parts = _across(
        lax.psum,
        # Two reductions over one operand are one fusion on TPU and GPU, but cost many
        # times one on CPU, where a rare second look is cheap instead.
        lax.platform_dependent(*leaves, cpu=_squares_cpu, default=_squares),
        axis_name,
    )
    big = add_pairwise(parts)
    # A sum that underflowed or overflowed is never the one selected; both square
    # roots need a finite derivative all the same.
    value = jnp.where(
        jnp.isfinite(small), _sqrt(small) * (1 / up), _sqrt(big) * (1 / down)
    )
    return value, parts


def _squares(*leaves: jax.Array) -> tuple[jax.Array, ...]:
    """The up-scaled sum of squares, then the down-scaled sum of each part."""
    dtype = accumulator_dtype(leaves)
    up, down = _SCALES[np.dtype(dtype)]
    small = add_pairwise([_sum_squares(x, dtype, up) for x in leaves])
    big = [_sum_squares(x, dtype, down) for x in leaves]
    return (small, *_parts(jnp.add, big))


def _squares_cpu(*leaves: jax.Array) -> tuple[jax.Array, ...]:
    """The same numbers from a plain sum, and from a second look where that fails."""
    dtype = accumulator_dtype(leaves)
    up, down = _SCALES[np.dtype(dtype)]
    plain = _parts(jnp.add, [_sum_squares(x, dtype, 1.0) for x in leaves])
    total = add_pairwise(plain)
    too_small = total < _SMALLEST_PLAIN_SUM
    scale = jnp.where(too_small, jnp.array(up, dtype), jnp.array(down, dtype))

    def enough(*_: jax.Array) -> tuple[jax.Array, ...]:
        # `scale` is `down` here. As a constant, XLA would square it, to zero.
        return (total * up**2, *(part * scale * scale for part in plain))

    def rescaled(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        parts = _parts(jnp.add, [_sum_squares(x, dtype, scale) for x in leaves])
        small = jnp.where(too_small, add_pairwise(parts), jnp.inf)
        return (small, *(jnp.where(too_small, 0.0, part) for part in parts))

    second_look = too_small | ~jnp.isfinite(total)
    return lax.switch(second_look.astype(jnp.int32), [enough, rescaled], *leaves)


def _sum_norm(leaves: list[Any], axis_name: AxisName) -> tuple[jax.Array, Any]:
    dtype = accumulator_dtype(leaves)
    sums = [jnp.sum(jnp.abs(x).astype(dtype)) for x in leaves]
    parts = _across(lax.psum, _parts(jnp.add, sums), axis_name)
    return add_pairwise(parts), parts


def _max_norm(leaves: list[Any], axis_name: AxisName) -> tuple[jax.Array, Any]:
    dtype = accumulator_dtype(leaves)
    largest = [jnp.max(jnp.abs(x).astype(dtype), initial=0.0) for x in leaves]
    parts = _across(lax.pmax, _parts(jnp.maximum, largest), axis_name)
    return _combine(jnp.maximum, parts), parts


def _power_norm(
    leaves: list[Any], ord: Any, axis_name: AxisName
) -> tuple[jax.Array, Any]:
    # Any other power needs the largest entry first: a second read, for few users.
    dtype = accumulator_dtype(leaves)
    largest, parts = _max_norm(leaves, axis_name)
    usable = jnp.isfinite(largest) & (largest > 0)
    unit = jnp.where(usable, largest, 1.0)
    sums = [jnp.sum((jnp.abs(x).astype(dtype) / unit) ** ord) for x in leaves]
    (total,) = _across(lax.psum, (add_pairwise(sums),), axis_name)
    root = jnp.where(usable, total, 1.0) ** (1 / ord)
    return jnp.where(usable, largest * root, largest), parts


def _sum_squares(x: jax.Array, dtype: Any, scale: Any) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _sum_squares(x.real, dtype, scale) + _sum_squares(x.imag, dtype, scale)
    scaled = x.astype(dtype) * scale
    return jnp.sum(scaled * scaled)


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at zero is zero; NaN stays NaN."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


def _part_size(num_leaves: int) -> int:
    return -(-num_leaves // _MAX_PARTS)


def _parts(add: Callable[..., Any], values: list[Any]) -> tuple[jax.Array, ...]:
    size = _part_size(len(values))
    return tuple(
        _combine(add, values[i : i + size]) for i in range(0, len(values), size)
    )


def add_pairwise(values: Sequence[jax.Array]) -> jax.Array:
    """Sum of scalars; its rounding grows with the logarithm of their number."""
    return _combine(jnp.add, values)


def _combine(add: Callable[..., Any], values: Sequence[Any]) -> jax.Array:
    values = list(values)
    while len(values) > 1:
        odd = values[len(values) // 2 * 2 :]
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [add(a, b) for a, b in pairs] + odd
    return values[0]


def _across(
    collective: Callable[..., Any], values: tuple[Any, ...], axis_name: AxisName
) -> tuple[Any, ...]:
    return values if axis_name is None else collective(values, axis_name)
