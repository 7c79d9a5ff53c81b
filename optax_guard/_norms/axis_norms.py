"""Norms along some axes of each leaf, right at any size, in one read."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_guard._norms.mesh_axes import Names, by_axes, local_part, place, whole_shape
from optax_guard._norms.two_scales import (
    SCALES,
    accumulator_dtype,
    not_folded,
    root_of_sums,
)

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


def stacked_norms(
    leaves: Sequence[jax.Array], axes: Axes, splits: Splits | None = None
) -> jax.Array:
    """Euclidean norms along ``axes[i]`` of each leaf ``i``, one after another.

    Args:
      leaves: Floating arrays.
      axes: For each leaf the axes to reduce.
      splits: For each leaf how it is split over devices; ``None`` if none is.

    Returns:
      A vector of float32, or of float64 if a leaf is; infinite or NaN where entries
      are. All devices have the norms of all parts. Its derivatives are unit vectors,
      and zero at zero.
    """
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    if splits is None:
        splits = tuple(Split((), ((),) * x.ndim) for x in leaves)
    return _norms(list(leaves), axes, splits)


def norm_of_norms(norms: jax.Array, axis: int | None = None) -> jax.Array:
    """The norm of a vector that is given by the norms of its parts."""
    largest = jnp.max(norms, axis=axis, keepdims=True, initial=0.0)
    largest = lax.stop_gradient(largest)
    usable = jnp.isfinite(largest) & (largest > 0)
    shares = jnp.where(usable, ratio(norms, jnp.where(usable, largest, 1.0)), 0.0)
    squares = jnp.sum(shares * shares, axis=axis, keepdims=True)
    root = jnp.sqrt(jnp.where(usable, squares, 1.0))
    # Otherwise all norms are zero, or one is not finite and so is their sum.
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
    dtype = accumulator_dtype(leaves)

    def squares(members: tuple[int, ...]) -> tuple[jax.Array, ...]:
        own_axes = tuple(axes[i] for i in members)
        return lax.platform_dependent(
            *[leaves[i] for i in members],
            cpu=functools.partial(_squares_cpu, dtype, own_axes),
            default=functools.partial(_squares, dtype, own_axes),
        )

    small, big = _of_all_devices(squares, _shapes(leaves, axes), splits)
    return root_of_sums(small, big, dtype)


@_norms.defjvp
def _norms_jvp(axes: Axes, splits: Splits, primals: Any, tangents: Any) -> Any:
    (leaves,), (dots,) = primals, tangents
    norms = _norms(leaves, axes, splits)

    shapes = _shapes(leaves, axes)
    whole = [
        whole_shape(shape, split.dims)
        for shape, split in zip(shapes, splits, strict=True)
    ]
    lengths = _split(norms, whole)

    def along(x: jax.Array, dot: jax.Array, length: jax.Array, over: Any) -> jax.Array:
        if jnp.iscomplexobj(x):
            real = along(x.real, dot.real, length, over)
            return real + along(x.imag, dot.imag, length, over)
        usable = jnp.isfinite(length) & (length > 0)
        entries = x.astype(length.dtype)
        unit = jnp.where(usable, ratio(entries, jnp.where(usable, length, 1.0)), 0.0)
        return jnp.sum(unit * dot.astype(length.dtype), axis=over, keepdims=True)

    def slopes(members: tuple[int, ...]) -> tuple[jax.Array, ...]:
        each = [
            along(leaves[i], dots[i], local_part(lengths[i], splits[i].dims), axes[i])
            for i in members
        ]
        return (_stack(each),)

    return norms, _of_all_devices(slopes, shapes, splits)[0]


def _of_all_devices(
    local: Callable[[tuple[int, ...]], tuple[jax.Array, ...]],
    shapes: Sequence[tuple[int, ...]],
    splits: Splits,
) -> tuple[jax.Array, ...]:
    """Sums over all devices, of vectors with the parts of each leaf in turn.

    Args:
      local: From the indices of some leaves to a device's own sums.
      shapes: For each leaf the shape of these.
      splits: For each leaf how it is split.
    """
    sets = by_axes([split.axes for split in splits])
    parts: list[Any] = [None] * len(splits)
    for names, members in sets:
        vectors, dims = local(members), [splits[i].dims for i in members]
        if any(map(any, dims)):
            own_shapes = [shapes[i] for i in members]
            vectors = tuple(
                _stack(list(map(place, _split(vector, own_shapes), dims)))
                for vector in vectors
            )
        if names:
            vectors = lax.psum(vectors, names)
        if len(sets) == 1:
            return vectors
        whole = [whole_shape(shapes[i], splits[i].dims) for i in members]
        each = zip(*(_split(vector, whole) for vector in vectors), strict=True)
        for i, of_leaf in zip(members, each, strict=True):
            parts[i] = of_leaf
    return tuple(_stack(vector) for vector in zip(*parts, strict=True))


def _squares(dtype: Any, axes: Axes, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of squares of entries scaled up, and of entries scaled down."""
    up, down = not_folded(dtype, *SCALES[dtype])
    return _sums(axes, up, *leaves), _sums(axes, down, *leaves)


def _squares_cpu(
    dtype: Any, axes: Axes, *leaves: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same numbers; entries are scaled down only if the other sums overflow."""
    up, down = SCALES[dtype]
    up, down, change = not_folded(dtype, up, down, down / up)
    # Scaled up, every norm below 4e9 is right. So zeros, as of idle units and experts,
    # need no second look.
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
    return jnp.concatenate([_whole(x).reshape(-1) for x in arrays])


def _whole(x: jax.Array) -> jax.Array:
    """The array on all devices, if its type says that it is split over them."""
    # With different shardings in their types, arrays cannot be joined.
    return jax.sharding.reshard(x, P()) if any(jax.typeof(x).sharding.spec) else x


def _split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The arrays that `_stack` has joined."""
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
