"""Init, measure, rescale; the factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_guard._norms.axis_norms import divide
from optax_guard._norms.tree_norm import TreeNorm
from optax_guard._norms.two_scales import accumulator_dtype
from optax_guard._transformation import transformation
from optax_guard._trees import dtype_of, is_inexact


class Measurement(NamedTuple):
    """What ``measure`` found out about some updates, before any of them is changed.

    Attributes:
      norm: The global norm before clipping, and its first non-finite leaf.
      is_finite: bool[], whether every floating entry is finite.
      factors: What ``rescale`` needs, of the clip's own making; scalars.
    """

    norm: TreeNorm
    is_finite: jax.Array
    factors: Any


class Factors(NamedTuple):
    """What to multiply entries by, as two factors; of shapes that broadcast to theirs.

    Attributes:
      is_clipped: bool[...], whether to multiply at all.
      first: float[...]
      second: float[...], the product of both is the coefficient of clipping, which may
        itself underflow.
    """

    is_clipped: jax.Array
    first: jax.Array
    second: jax.Array


def clip(
    init: Callable[..., Any],
    measure: Callable[..., tuple[Measurement, Any]],
    rescale: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
    """The transformation that measures, then rescales."""

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        measured, state = measure(updates, state, params, **extra_args)
        return rescale(_read_again(updates), measured), state

    return transformation(init, update, measure=measure, rescale=rescale)


def _read_again(updates: optax.Updates) -> optax.Updates:
    """The updates, for XLA on CPU not those that were measured.

    It would widen half precision once for the norm and for what follows, and keep a
    copy of all in float32 between them. In a guard they are apart by its branch.
    """
    leaves, treedef = jax.tree.flatten(updates)
    half = [i for i, x in enumerate(leaves) if is_inexact(x) and _is_half(x)]
    if half:
        again = lax.platform_dependent(
            *(leaves[i] for i in half),
            cpu=lambda *x: lax.optimization_barrier(x),
            default=lambda *x: x,
        )
        for i, x in zip(half, again, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


def _is_half(x: Any) -> bool:
    return jnp.finfo(dtype_of(x)).bits < 32


def factors_for(is_clipped: jax.Array, target: jax.Array, norm: jax.Array) -> Factors:
    """Factors that bring ``norm`` to ``target`` where ``is_clipped``."""
    target, norm = jnp.where(is_clipped, target, 1.0), jnp.where(is_clipped, norm, 1.0)
    # Float32 ends at 2**-126. The first factor leaves room on both sides for a norm of
    # up to 2**128, and for one so small that it could not be made smaller itself.
    underflows = target < norm * 2.0**-100
    first = jnp.where(underflows, jnp.where(norm > 1, 2.0**-120, 2.0**-96), 1.0)
    first = first.astype(norm.dtype)
    return Factors(is_clipped, first, divide(target, norm * first))


def rescaled(x: jax.Array, factors: Factors) -> jax.Array:
    """``x`` times the factors where clipped; else ``x``, bit for bit."""
    dtype = x.dtype if jnp.iscomplexobj(x) else accumulator_dtype([x])
    scaled = x.astype(dtype) * factors.first.astype(dtype)
    scaled = scaled * factors.second.astype(dtype)
    # A selection, not a factor of one, so that what is not clipped keeps its bits: some
    # backends flush denormals whenever they multiply.
    return jnp.where(factors.is_clipped, scaled.astype(x.dtype), x)
