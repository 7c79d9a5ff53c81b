"""Norms along some axes of each leaf, right at any size, in one read."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._mesh_axes import Names, by_axes, own, place, whole_shape
from optax_guard._norms import _SCALES as SCALES
from optax_guard._norms import accumulator_dtype, not_folded

Axes = tuple[tuple[int, ...], ...]


class Split(NamedTuple):
    """How a leaf is split over devices, in manual SPMD.

    Attributes:
      axes: The mesh axes over which its sums are added up.
      dims: For each of its axes that is not reduced the mesh axes over which that is
        split; () for one that is reduced.
    """

    axes: Names
    dims: tuple[Names, ...]


Splits = tuple[Split, ...]


def stacked_norms(leaves: Sequence[jax.Array], axes: Axes, splits: Splits) -> jax.Array:
    """Euclidean norms along ``axes[i]`` of each leaf ``i``, one after another.

    Args:
      leaves: Floating arrays.
      axes: For each leaf the axes to reduce.
      splits: For each leaf how it is split over devices.

    Returns:
      A vector of float32, or of float64 if a leaf is; infinite or NaN where entries
      are. All devices have the norms of all parts. Its derivatives are unit vectors,
      and zero at zero.
    """
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    return _norms(list(leaves), axes, splits)


def norm_of_norms(norms: jax.Array, axis: int | None = None) -> jax.Array:
    """The norm of a vector that is given by the norms of its parts."""
    largest = jnp.max(norms, axis=axis, keepdims=True, initial=0.0)
    largest = lax.stop_gradient(largest)
    usable = jnp.isfinite(largest) & (largest > 0)
    shares = jnp.where(usable, ratio(norms, jnp.where(usable, largest, 1.0)), 0.0)
    squares = jnp.sum(shares * shares, axis=axis, keepdims=True)
    root = jnp.sqrt(jnp.where(usable, squares, 1.0))
    # Without a usable unit the norms are zeros, or their sum is as bad as the worst.
    plain = jnp.sum(norms, axis=axis, keepdims=True)
    return jnp.squeeze(jnp.where(usable, largest * root, plain), axis)


def ratio(x: jax.Array, length: jax.Array) -> jax.Array:
    """``x / length`` for a positive length, however large."""
    # XLA may divide by multiplying with the inverse, which vanishes for a huge length.
    scale = jnp.where(length > 1, 2.0**-64, 1.0).astype(length.dtype)
    return divide(x * scale, length * scale)


@jax.custom_jvp
def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, with derivatives wherever it is finite."""
    return numerator / denominator


@divide.defjvp
def _divide_jvp(primals: Any, tangents: Any) -> Any:
    # The plain derivative squares the denominator, which may overflow or vanish.
    (_, denominator), (dot, denominator_dot) = primals, tangents
    quotient = divide(*primals)
    return quotient, dot / denominator - quotient * (denominator_dot / denominator)


# Jitted for callers outside of `jit`: there, every call would compile its branches.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _norms(leaves: list[jax.Array], axes: Axes, splits: Splits) -> jax.Array:
    up, down = SCALES[accumulator_dtype(leaves)]
    sums = lax.platform_dependent(
        *leaves,
        cpu=functools.partial(_squares_cpu, axes),
        default=functools.partial(_squares, axes),
    )
    small, big = _over_devices(sums, leaves, axes, splits)
    scaled_back = jnp.sqrt(small) * (1 / up), jnp.sqrt(big) * (1 / down)
    return jnp.where(jnp.isfinite(small), *scaled_back)


@_norms.defjvp
def _norms_jvp(axes: Axes, splits: Splits, primals: Any, tangents: Any) -> Any:
    (leaves,), (dots,) = primals, tangents
    norms = _norms(leaves, axes, splits)

    def along(
        x: jax.Array, dot: jax.Array, lengths: jax.Array, over: Any, split: Split
    ) -> jax.Array:
        if jnp.iscomplexobj(x):
            real = along(x.real, dot.real, lengths, over, split)
            return real + along(x.imag, dot.imag, lengths, over, split)
        length = own(lengths, split.dims)
        usable = jnp.isfinite(length) & (length > 0)
        entries = x.astype(length.dtype)
        unit = jnp.where(usable, ratio(entries, jnp.where(usable, length, 1.0)), 0.0)
        return jnp.sum(unit * dot.astype(length.dtype), axis=over, keepdims=True)

    shapes = [
        whole_shape(shape, split.dims)
        for shape, split in zip(_shapes(leaves, axes), splits, strict=True)
    ]
    lengths = _split(norms, shapes)
    slopes = _stack(list(map(along, leaves, dots, lengths, axes, splits)))
    return norms, _over_devices((slopes,), leaves, axes, splits)[0]


def _over_devices(
    vectors: Sequence[jax.Array], leaves: list[jax.Array], axes: Axes, splits: Splits
) -> Sequence[jax.Array]:
    """Sums over all devices, of vectors that have the parts of each leaf in turn."""
    sets = by_axes([split.axes for split in splits])
    if not any(dim for split in splits for dim in split.dims) and len(sets) == 1:
        ((names, _),) = sets
        return lax.psum(tuple(vectors), names) if names else vectors
    shapes = _shapes(leaves, axes)
    parts = [
        [place(x, s.dims) for x, s in zip(_split(vector, shapes), splits, strict=True)]
        for vector in vectors
    ]
    for names, members in sets:
        if names:
            own_parts = [_stack([each[i] for i in members]) for each in parts]
            summed = lax.psum(tuple(own_parts), names)
            for each, vector in zip(parts, summed, strict=True):
                whole = [each[i].shape for i in members]
                for i, x in zip(members, _split(vector, whole), strict=True):
                    each[i] = x
    return [_stack(each) for each in parts]


def _squares(axes: Axes, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of squares of entries scaled up, and of entries scaled down."""
    dtype = accumulator_dtype(leaves)
    up, down = not_folded(dtype, *SCALES[dtype])
    return _sums(axes, up, *leaves), _sums(axes, down, *leaves)


def _squares_cpu(axes: Axes, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same numbers; of entries scaled down only where the others overflow."""
    dtype = accumulator_dtype(leaves)
    up, down = SCALES[dtype]
    up, down, change = not_folded(dtype, up, down, down / up)
    # Zeros, as of idle units and experts, need no second look then: scaled up, every
    # norm is right that is below 4e9.
    small = _sums(axes, up, *leaves)
    overflows = jnp.any(~jnp.isfinite(small))
    big = lax.switch(
        overflows.astype(jnp.int32),
        [
            lambda *leaves: small * change * change,
            lambda *leaves: _sums(axes, down, *leaves),
        ],
        *leaves,
    )
    return small, big


def _sums(axes: Axes, scale: jax.Array, *leaves: jax.Array) -> jax.Array:
    def squares(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
        if jnp.iscomplexobj(x):
            return squares(x.real, over) + squares(x.imag, over)
        scaled = x.astype(scale.dtype) * scale
        return jnp.sum(scaled * scaled, axis=over, keepdims=True)

    return _stack(list(map(squares, leaves, axes)))


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in arrays])


def _split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """What `_stack` joined."""
    parts, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        parts.append(vector[start:end].reshape(shape))
        start = end
    return parts


def _shapes(leaves: Sequence[jax.Array], axes: Axes) -> list[tuple[int, ...]]:
    """Shapes of the sums of a device, with the rank of their leaf."""
    return [
        tuple(1 if i in over else n for i, n in enumerate(x.shape))
        for x, over in zip(leaves, axes, strict=True)
    ]
