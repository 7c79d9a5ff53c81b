"""Norms along some axes of each leaf, right at any size, in one read."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._norms import _SCALES as SCALES
from optax_guard._norms import AxisName, accumulator_dtype, not_folded

Axes = tuple[tuple[int, ...], ...]


def stacked_norms(
    leaves: Sequence[jax.Array], axes: Axes, axis_name: AxisName = None
) -> jax.Array:
    """Euclidean norms along ``axes[i]`` of each leaf ``i``, one after another.

    Args:
      leaves: Floating arrays.
      axes: For each leaf the axes to reduce.
      axis_name: Mesh axes over which those axes are split, under ``shard_map`` or
        ``pmap``.

    Returns:
      A vector of float32, or of float64 if a leaf is; infinite or NaN where entries
      are. Its derivatives are unit vectors, and zero at zero.
    """
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    return _norms(list(leaves), axes, axis_name)


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
def _norms(leaves: list[jax.Array], axes: Axes, axis_name: AxisName) -> jax.Array:
    up, down = SCALES[accumulator_dtype(leaves)]
    small, big = lax.platform_dependent(
        *leaves,
        cpu=functools.partial(_squares_cpu, axes),
        default=functools.partial(_squares, axes),
    )
    if axis_name is not None:
        small, big = lax.psum((small, big), axis_name)
    scaled_back = jnp.sqrt(small) * (1 / up), jnp.sqrt(big) * (1 / down)
    return jnp.where(jnp.isfinite(small), *scaled_back)


@_norms.defjvp
def _norms_jvp(axes: Axes, axis_name: AxisName, primals: Any, tangents: Any) -> Any:
    (leaves,), (dots,) = primals, tangents
    norms = _norms(leaves, axes, axis_name)

    def along(x: jax.Array, dot: jax.Array, length: jax.Array, over: Any) -> jax.Array:
        if jnp.iscomplexobj(x):
            real = along(x.real, dot.real, length, over)
            return real + along(x.imag, dot.imag, length, over)
        usable = jnp.isfinite(length) & (length > 0)
        entries = x.astype(length.dtype)
        unit = jnp.where(usable, ratio(entries, jnp.where(usable, length, 1.0)), 0.0)
        return jnp.sum(unit * dot.astype(length.dtype), axis=over, keepdims=True)

    lengths = _split(norms, leaves, axes)
    slopes = _stack(list(map(along, leaves, dots, lengths, axes)))
    if axis_name is not None:
        slopes = lax.psum(slopes, axis_name)
    return norms, slopes


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


def _split(vector: jax.Array, leaves: list[jax.Array], axes: Axes) -> list[jax.Array]:
    """What `_stack` joined, each part with the rank of its leaf."""
    parts, start = [], 0
    for x, over in zip(leaves, axes, strict=True):
        shape = [1 if i in over else n for i, n in enumerate(x.shape)]
        end = start + math.prod(shape)
        parts.append(vector[start:end].reshape(shape))
        start = end
    return parts
