"""Sums of squares at two scales: one read is right for small and for huge entries.

Squares are summed twice, of entries scaled up and of entries scaled down. This is the
idea of Blue, "A portable Fortran program to find the Euclidean norm", ACM TOMS 1978.
Both scales are powers of two, so on ordinary values the bits are those of a plain sum.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._trees import dtype_of

# For each dtype of sums: the factor up, and the factor down.
SCALES = {
    jnp.dtype("float32"): (2.0**32, 2.0**-64),
    jnp.dtype("float64"): (2.0**256, 2.0**-512),
}


def accumulator_dtype(leaves: Sequence[Any]) -> jnp.dtype:
    """Float32, or float64 if a leaf is a double."""
    is_double = any(jnp.finfo(dtype_of(leaf)).bits == 64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def not_folded(dtype: jnp.dtype, *factors: float) -> tuple[jax.Array, ...]:
    """Constants that XLA does not multiply with each other.

    XLA turns ``(x * c) * (x * c)`` into ``(x * x) * (c * c)``. Scaling must avoid this:
    the square of a small factor is zero in float32.
    """
    return lax.optimization_barrier(tuple(jnp.array(c, dtype) for c in factors))


def root_of_sums(small: jax.Array, big: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The norm, from the sums of squares of entries scaled up and scaled down."""
    up, down = SCALES[dtype]
    scaled_back = jnp.sqrt(small) * (1 / up), jnp.sqrt(big) * (1 / down)
    return jnp.where(jnp.isfinite(small), *scaled_back)
