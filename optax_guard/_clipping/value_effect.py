"""The effect of clipping by value: norm after it, share of entries, cosine."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._norms.leaf_runs import add_pairwise
from optax_guard._norms.mesh_axes import AxisName, by_axes, mesh_axes
from optax_guard._norms.two_scales import (
    SCALES,
    accumulator_dtype,
    not_folded,
    root_of_sums,
)
from optax_guard._trees import is_inexact

Bounds = Callable[[Any], tuple[jax.Array, jax.Array]]
_ROW_LENGTH = 1024
# Scales for two sums of products of a raw entry with a clipped one. The clipped one is
# the smaller: a large product has a large raw entry.
_PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN = 2.0**64, 2.0**-100, 2.0**-28


class Effect(NamedTuple):
    """The effect of clipping by value on a tree.

    Attributes:
      norm: float[], the norm after clipping.
      entries_clipped: float32[], share of the entries that clipping changes.
      cosine: float32[], cosine of the angle between before and after.
    """

    norm: jax.Array
    entries_clipped: jax.Array
    cosine: jax.Array


def effect_of_clipping(
    updates: optax.Updates, bounds: Bounds, norm: jax.Array, axis_name: AxisName
) -> Effect:
    """Norm after clipping, share of entries changed, cosine between before and after.

    Right to rounding from 1e-25 to 3e38, before and after, like the norm.
    """
    leaves = [_real(x) for x in jax.tree.leaves(updates) if is_inexact(x)]
    # A record has no derivative.
    leaves, norm = lax.stop_gradient((leaves, norm))
    if not leaves:
        return Effect(norm, jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))
    limits = lax.stop_gradient([bounds(x.dtype) for x in leaves])
    dtype = accumulator_dtype(leaves)
    parts, size = [], 0
    for names, members in by_axes(mesh_axes(updates, axis_name)):
        own = [leaves[i] for i in members]
        sums = _sum_terms(own, [limits[i] for i in members], dtype)
        parts.append(lax.psum(sums, names) if names else sums)
        size += sum(x.size for x in own) * lax.axis_size(names)
    totals = map(add_pairwise, zip(*parts, strict=True))
    small, big, product, big_product, num_clipped = totals
    after = root_of_sums(small, big, dtype)
    has_direction = (norm > 0) & (after > 0)
    before = jnp.where(has_direction, norm, 1.0)
    length = jnp.where(has_direction, after, 1.0)
    # Two divisions behind a barrier: XLA would divide once, by a product that may
    # overflow.
    by_norm = lax.optimization_barrier(
        (product / before, big_product / (before * _RAW_DOWN))
    )
    cosine = jnp.where(
        jnp.isfinite(product),
        by_norm[0] / length * (1 / _PRODUCT_UP),
        by_norm[1] / (length * _CLIPPED_DOWN),
    )
    cosine = jnp.where(has_direction, jnp.clip(cosine, -1.0, 1.0), 0.0)
    is_clipped = num_clipped > 0
    cosine = jnp.where(is_clipped, cosine, 1.0)
    return Effect(
        norm=jnp.where(is_clipped, after, norm),
        entries_clipped=(num_clipped / float(max(size, 1))).astype(jnp.float32),
        cosine=jnp.where(jnp.isfinite(norm), cosine, jnp.nan).astype(jnp.float32),
    )


# Jitted for callers outside of `jit`: there, every call would compile it anew.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _sum_terms(
    leaves: list[jax.Array], limits: Any, dtype: Any
) -> tuple[jax.Array, ...]:
    """Totals of `_terms` over all entries."""
    scales = not_folded(dtype, *SCALES[dtype], _PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN)

    def terms(leaves: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
        pairs = zip(leaves, limits, strict=True)
        return [_terms(x, low, high, scales) for x, (low, high) in pairs]

    # Reductions of one operand are one fusion on TPU and GPU. On CPU each would read
    # the operand again, which is several times slower than one reduction to many sums.
    def on_cpu(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_add_leaves(list(map(_sum_at_once, terms(leaves)))))

    def elsewhere(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        sums = [map(jnp.sum, of_leaf) for of_leaf in terms(leaves)]
        return tuple(map(add_pairwise, zip(*sums, strict=True)))

    return lax.platform_dependent(*leaves, cpu=on_cpu, default=elsewhere)


def _terms(
    x: jax.Array, low: jax.Array, high: jax.Array, scales: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """For each entry: square of the clipped one and its product with the raw one.

    Each at two scales, and then 1 where clipping changes the entry.
    """
    up, down, product_up, raw_down, clipped_down = scales
    dtype = up.dtype
    raw = x.astype(dtype)
    # Not the selection of `_clip`, which makes XLA for GPUs spill partial sums.
    after = jnp.minimum(jnp.maximum(raw, low.astype(dtype)), high.astype(dtype))
    return (
        (after * up) * (after * up),
        (after * down) * (after * down),
        raw * (after * product_up),
        (raw * raw_down) * (after * clipped_down),
        ((after < raw) | (after > raw)).astype(dtype),
    )


def _sum_at_once(terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums of several arrays of one shape in one loop.

    The loop adds one by one, so it runs over rows: rounding grows with their length.
    """
    if any(jax.typeof(terms[0]).sharding.spec):
        # With a sharding in its type an array cannot be made flat without moving it.
        return tuple(map(jnp.sum, terms))
    zeros = tuple(jnp.zeros((), x.dtype) for x in terms)

    def add(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    size = terms[0].size
    rows = size // _ROW_LENGTH
    flat = [x.reshape(-1) for x in terms]
    tail = [x[rows * _ROW_LENGTH :] for x in flat]
    sums = lax.reduce(tuple(tail), zeros, add, (0,))
    if rows:
        main = [x[: rows * _ROW_LENGTH].reshape(rows, -1) for x in flat]
        by_row = lax.reduce(tuple(main), zeros, add, (1,))
        sums = add(sums, tuple(map(jnp.sum, by_row)))
    return sums


def _add_leaves(sums: list[tuple[jax.Array, ...]]) -> jax.Array:
    """Totals of the sums of each leaf, by a product with ones.

    XLA on CPU makes one kernel of a tree of additions, and of the sum of scalars put
    together too, in a time that grows with the square of their number.
    """
    columns = jnp.stack([jnp.stack(of_leaf) for of_leaf in sums], axis=1)
    ones = jnp.ones(len(sums), columns.dtype)
    return jnp.matmul(columns, ones, precision=lax.Precision.HIGHEST)


def _real(x: Any) -> jax.Array:
    """The entries as reals: a complex array gains an axis of length two."""
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
