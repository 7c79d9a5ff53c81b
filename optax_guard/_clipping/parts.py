"""The parts of a clip, the decision by a threshold, and the factors of scaling.

``measure`` reads the updates once and decides. Its results are scalars. ``rescale`` is
elementwise and fuses into the operation that consumes the updates. Without a guard, a
clip runs ``measure``, then ``rescale``. A guard rescales only inside the branch that
takes the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_guard._checks import check_part
from optax_guard._models import params_of
from optax_guard._norms.axis_norms import divide
from optax_guard._norms.mesh_axes import AxisName
from optax_guard._norms.tree_norm import TreeNorm
from optax_guard._norms.two_scales import accumulator_dtype
from optax_guard._transformation import cached, transformation
from optax_guard._trees import dtype_of, is_inexact
from optax_guard.threshold._base import Threshold


class Measurement(NamedTuple):
    """The results of ``measure``, before any update is changed.

    Attributes:
      norm: The global norm before clipping, and its first non-finite leaf.
      is_finite: bool[], whether every floating entry is finite.
      factors: The input of ``rescale``. Each clip has its own; all are scalars.
    """

    norm: TreeNorm
    is_finite: jax.Array
    factors: Any


class ClipParts(NamedTuple):
    """The parts of a clip, as ``update.parts``.

    Attributes:
      init: ``init(params) -> state``.
      measure: ``measure(updates, state, params=None, **extra_args)`` gives a
        ``Measurement`` and the new state.
      rescale: ``rescale(updates, measurement)`` gives the clipped updates.
      axis_name: The mesh axes over which the updates are split, as for
        ``clip_by_global_norm``.
    """

    init: Callable[[optax.Params], Any]
    measure: Callable[..., tuple[Measurement, Any]]
    rescale: Callable[[optax.Updates, Measurement], optax.Updates]
    axis_name: AxisName


class Decision(NamedTuple):
    """The verdict of a threshold on some norms, all of one shape.

    Attributes:
      trigger: float[...], the norm above which one clips; not negative.
      target: float[...], the norm to clip to; not negative.
      is_clipped: bool[...], whether a norm is finite and above its trigger.
      clipped: float[...], the norms after clipping.
      state: The threshold's new state; the old one if the global norm is not finite.
    """

    trigger: jax.Array
    target: jax.Array
    is_clipped: jax.Array
    clipped: jax.Array
    state: Any


class Factors(NamedTuple):
    """The coefficient of clipping as two factors; their shapes broadcast to entries.

    Attributes:
      is_clipped: bool[...], whether to multiply at all.
      first: float[...], a power of two.
      second: float[...]. The coefficient is the product of both, which may be too
        small for float32.
    """

    is_clipped: jax.Array
    first: jax.Array
    second: jax.Array


def clip(parts: ClipParts) -> optax.GradientTransformationExtraArgs:
    """The transformation that measures, then rescales."""

    @cached
    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        params = params_of(updates, params)
        measured, state = parts.measure(updates, state, params, **extra_args)
        return parts.rescale(_read_again(updates), measured), state

    return transformation(parts.init, update, parts)


def decide(
    factory: str,
    threshold: Threshold,
    norms: jax.Array,
    global_norm: jax.Array,
    state: Any,
    *,
    is_excluded: np.ndarray | None = None,
    unit: jax.Array | None = None,
) -> Decision:
    """Asks the threshold, and lets it learn from updates that are finite.

    Args:
      factory: Name of the clip, for the error.
      threshold: The threshold.
      norms: float[...], the norms to judge.
      global_norm: float[], the norm of all updates.
      state: The threshold's state.
      is_excluded: bool[...], norms that are never clipped; ``None`` if there are none.
      unit: float[...], the unit of the threshold's limits; ``None`` for 1.

    Raises:
      ValueError: If ``state`` is not like that of the threshold for these norms.
    """
    check_part(
        factory,
        "threshold",
        state,
        lambda: threshold.start(norms.shape),
        "It was made for another threshold, or for parameters of other shapes.",
    )
    trigger, target = threshold.limits(norms, global_norm, state)
    if unit is not None:
        unit = unit.astype(norms.dtype)
        trigger, target = trigger * unit, target * unit
    # A traced number could be negative, and would turn the step around.
    trigger, target = jnp.maximum(trigger, 0.0), jnp.maximum(target, 0.0)
    trigger = jnp.broadcast_to(trigger, norms.shape)
    if is_excluded is not None:
        trigger = jnp.where(is_excluded, jnp.inf, trigger)
    is_clipped = jnp.isfinite(norms) & (norms > trigger)
    clipped = jnp.where(is_clipped, target, norms)
    learned = threshold.learn(norms, clipped, state)
    state = optax.tree.where(jnp.isfinite(global_norm), learned, state)
    return Decision(trigger, target, is_clipped, clipped, state)


def _read_again(updates: optax.Updates) -> optax.Updates:
    """The same updates; XLA on CPU does not see that they are those measured.

    XLA would widen half precision once, for the norm and for the rescaling, and keep a
    copy of all updates in float32 between them. In a guard, the branch prevents this.
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
    # Float32 ends at 2**-126. The first factor leaves room for a norm of up to 2**128,
    # and for a norm so small that it cannot be made smaller itself.
    underflows = target < norm * 2.0**-100
    first = jnp.where(underflows, jnp.where(norm > 1, 2.0**-120, 2.0**-96), 1.0)
    first = first.astype(norm.dtype)
    return Factors(is_clipped, first, divide(target, norm * first))


def rescaled(x: jax.Array, factors: Factors) -> jax.Array:
    """``x`` times the factors where clipped; else ``x``, bit for bit."""
    dtype = x.dtype if jnp.iscomplexobj(x) else accumulator_dtype([x])
    scaled = x.astype(dtype) * factors.first.astype(dtype)
    scaled = scaled * factors.second.astype(dtype)
    # A selection, not a factor of one: some backends flush denormals whenever they
    # multiply, and entries that are not clipped must keep their bits.
    return jnp.where(factors.is_clipped, scaled.astype(x.dtype), x)
