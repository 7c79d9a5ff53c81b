"""The effect of clipping by value: norm after it, share of entries, cosine."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._norms.alike import roles_of
from optax_guard._norms.leaf_runs import Part, add_pairwise, parts_of
from optax_guard._norms.mesh_axes import AxisName, mesh_axes
from optax_guard._norms.sums_at_once import Sums, sums_at_once
from optax_guard._norms.two_scales import (
    SCALES,
    accumulator_dtype,
    not_folded,
    root_of_sums,
)
from optax_guard._trees import is_inexact, path_names

Bounds = Callable[[Any], tuple[jax.Array, jax.Array]]
# Scales for two sums of products of a raw entry with a clipped one. The clipped one is
# the smaller: a large product has a large raw entry.
_PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN = 2.0**64, 2.0**-100, 2.0**-28
# The scale for the excess over a bound, so that 1e9 entries of 1e38 can be added.
_EXCESS_DOWN = 2.0**-16
# Entries to a first sum on CPU. With more, LLVM does not unroll the loop over them.
_DEPTH, _DEPTH_ABOUT_ZERO = 8, 16


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
    updates: optax.Updates,
    bounds: Bounds,
    norm: jax.Array,
    axis_name: AxisName,
    is_symmetric: bool,
) -> Effect:
    """Norm after clipping, share of entries changed, cosine between before and after.

    Right to rounding from 1e-25 to 3e38, before and after, like the norm.

    Args:
      updates: The updates before clipping.
      bounds: The lower and the upper bound for entries of a dtype.
      norm: float[], the norm before clipping.
      axis_name: As for ``clip_by_value``.
      is_symmetric: Whether the lower bound is minus the upper one.
    """
    all_leaves = jax.tree.leaves(updates)
    indices = [i for i, x in enumerate(all_leaves) if is_inexact(x)]
    leaves = [_real(all_leaves[i]) for i in indices]
    # A record has no derivative.
    leaves, norm = lax.stop_gradient((leaves, norm))
    if not leaves:
        return Effect(norm, jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))
    dtype = accumulator_dtype(leaves)
    limits = {x.dtype: bounds(x.dtype) for x in leaves} | {dtype: bounds(dtype)}
    limits = lax.stop_gradient(limits)
    paths = path_names(updates)
    parts = parts_of(mesh_axes(updates, axis_name), indices, len(all_leaves))
    sums, size = [], 0
    for part in parts:
        own = part.of(leaves)
        roles = tuple(part.of(roles_of(paths[i] for i in indices)))
        of_part = _sums(own, limits, part, roles, dtype, is_symmetric)
        sums.append(lax.psum(of_part, part.axes) if part.axes else of_part)
        size += sum(x.size for x in own) * lax.axis_size(part.axes)
    *measures, num_clipped = map(add_pairwise, zip(*sums, strict=True))
    if is_symmetric:
        after, cosine = _effect_about_zero(measures, norm, _unit(limits[dtype][1]))
    else:
        after, cosine = _effect(measures, norm)
    is_clipped = num_clipped > 0
    cosine = jnp.where(is_clipped, jnp.clip(cosine, -1.0, 1.0), 1.0)
    # NaN where the norm is not finite. As a constant it would look like a fault to
    # `jax_debug_nans`.
    cosine = jnp.where(jnp.isfinite(norm), cosine, norm - norm)
    return Effect(
        norm=jnp.where(is_clipped, after, norm),
        entries_clipped=(num_clipped / float(max(size, 1))).astype(jnp.float32),
        cosine=cosine.astype(jnp.float32),
    )


# Jitted for callers outside of `jit`: there, every call would compile it anew.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _sums(
    leaves: list[jax.Array],
    limits: dict[Any, Any],
    part: Part,
    roles: tuple[str, ...],
    dtype: Any,
    is_symmetric: bool,
) -> Sums:
    """Sums of the terms of one part; the last one counts the entries clipped."""
    if is_symmetric:
        scales = 1 / _unit(limits[dtype][1]), jnp.array(_EXCESS_DOWN, dtype)
        scales = lax.optimization_barrier(scales)
        of_entries, depth = _terms_about_zero, _DEPTH_ABOUT_ZERO
    else:
        scales = SCALES[dtype]
        scales = not_folded(dtype, *scales, _PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN)
        of_entries, depth = _terms, _DEPTH

    def terms(x: jax.Array) -> Sums:
        low, high = (bound.astype(dtype) for bound in limits[x.dtype])
        return of_entries(x.astype(dtype), low, high, scales)

    return sums_at_once(leaves, part, roles, terms, depth)


def _terms(raw: jax.Array, low: jax.Array, high: jax.Array, scales: Sums) -> Sums:
    """For each entry: square of the clipped one and its product with the raw one.

    Each at two scales, and then 1 where clipping changes the entry.
    """
    up, down, product_up, raw_down, clipped_down = scales
    # Not the selection of `_clip`, which makes XLA for GPUs spill partial sums.
    after = jnp.minimum(jnp.maximum(raw, low), high)
    return (
        (after * up) * (after * up),
        (after * down) * (after * down),
        raw * (after * product_up),
        (raw * raw_down) * (after * clipped_down),
        ((after < raw) | (after > raw)).astype(raw.dtype),
    )


def _effect(sums: Sequence[jax.Array], norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norm after clipping and the cosine, from sums of `_terms`."""
    small, big, product, big_product = sums
    after = root_of_sums(small, big, norm.dtype)
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
    return after, jnp.where(has_direction, cosine, 0.0)


def _terms_about_zero(
    raw: jax.Array, low: jax.Array, high: jax.Array, scales: Sums
) -> Sums:
    """For each entry, with the bounds ``-high`` and ``high``, three terms.

    The square of the clipped one, in units of the bound; its product with the excess of
    the raw one; and 1 where clipping changes the entry. One scale is enough. If no
    entry is clipped, only the last term counts. Otherwise some squares are 1, and those
    too small for the scale count for nothing beside them.
    """
    del low
    per_unit, excess_down = scales
    size = jnp.abs(raw)
    after = jnp.minimum(size, high)
    scaled = after * per_unit
    return (
        scaled * scaled,
        scaled * ((size - after) * excess_down),
        (size > high).astype(raw.dtype),
    )


def _effect_about_zero(
    sums: Sequence[jax.Array], norm: jax.Array, unit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The norm after clipping and the cosine, from sums of `_terms_about_zero`."""
    squares, excess = sums
    has_direction = (norm > 0) & (squares > 0)
    before = jnp.where(has_direction, norm, 1.0)
    length = jnp.where(has_direction, jnp.sqrt(squares), 1.0)
    after = jnp.sqrt(squares) * unit
    # The raw entry is the clipped one and the excess.
    by_norm = lax.optimization_barrier(excess / before)
    cosine = after / before + by_norm / length * (1 / _EXCESS_DOWN)
    return after, jnp.where(has_direction, cosine, 0.0)


def _unit(high: jax.Array) -> jax.Array:
    """The bound, or a number near it that has a reciprocal."""
    least = 16 * float(jnp.finfo(high.dtype).tiny)
    return jnp.clip(high, least, 1 / least)


def _real(x: Any) -> jax.Array:
    """The entries as reals: a complex array gains an axis of length two."""
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
