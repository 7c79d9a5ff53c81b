"""Clipping by value, and how far it turns a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from optax_guard._base import check_number, check_positive, check_state
from optax_guard._clipping import Measurement, clip, map_inexact
from optax_guard._norms import (
    AxisName,
    add_pairwise,
    is_inexact,
    tree_norm,
)
from optax_guard._statistics import NormStats, init_stats, update_stats


class ClipByValueState(NamedTuple):
    """State of ``clip_by_value``.

    Attributes:
      stats: What was seen of the norm, a ``NormStats``.
      entries_clipped: float32[], share of the floating entries that the last update
        changed, in [0, 1]; 0 after ``init``.
      update_cosine: float32[], cosine of the angle between the last updates before and
        after clipping: 1 is no turn; NaN if they were not finite; 1 after ``init``.
      threshold: Always ().
    """

    stats: NormStats
    entries_clipped: jax.Array
    update_cosine: jax.Array
    threshold: Any


def clip_by_value(
    max_value: ArrayLike,
    *,
    min_value: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every entry of the updates, and records how far that turned them.

    Each floating entry :math:`x` becomes :math:`\min(\max(x, l), u)`. This bounds
    single entries but changes the direction of the step, unlike
    ``clip_by_global_norm``: the state shows by how much, as the cosine between the
    updates before and after. An infinite entry becomes the bound; NaN stays NaN; both
    count as non-finite. The parts of a complex entry are clipped separately.

    Args:
      max_value: Upper bound :math:`u`, in units of the gradient; positive unless
        ``min_value`` is given; may be traced.
      min_value: Lower bound :math:`l`, less than ``max_value``; ``-max_value`` if
        ``None``.
      axis_name: Mesh axis or axes over which the updates are split, under
        ``jax.shard_map`` or ``jax.pmap``.

    Returns:
      A transformation whose state is a ``ClipByValueState``.

    Raises:
      ValueError: If the bounds are Python numbers and empty or the wrong way round.
      TypeError: If a bound is not a number.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_value(1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([3.0, -0.5]), state)
      >>> updates, state.entries_clipped.item()
      (Array([ 1. , -0.5], dtype=float32), 0.5)

    References:
      Goodfellow et al., `Deep Learning <https://www.deeplearningbook.org>`_, 2016,
      section 10.11.1
    """
    if min_value is None:
        check_positive("max_value", max_value)
        high = jnp.asarray(max_value)
        low = -high
    else:
        check_number("max_value", max_value)
        check_number("min_value", min_value)
        if (
            not isinstance(min_value, jax.Array)
            and not isinstance(max_value, jax.Array)
            and (not np.all(np.asarray(min_value) < np.asarray(max_value)))
        ):
            raise ValueError(
                "`min_value` must be less than `max_value`, got "
                f"{min_value} and {max_value}."
            )
        high = jnp.asarray(max_value)
        low = jnp.asarray(min_value)

    def init(params: optax.Params) -> ClipByValueState:
        del params
        return ClipByValueState(
            stats=init_stats(),
            entries_clipped=jnp.zeros((), jnp.float32),
            update_cosine=jnp.ones((), jnp.float32),
            threshold=(),
        )

    def measure(
        updates: optax.Updates,
        state: ClipByValueState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Measurement, ClipByValueState]:
        del params, extra_args
        check_state("clip_by_value", state, ClipByValueState)
        norm = tree_norm(updates, None, axis_name)
        effect = _effect_of_clipping(updates, low, high, norm.value, axis_name)
        is_finite = jnp.isfinite(norm.value)
        stats = update_stats(
            state.stats, norm.value, effect.norm, high, effect.entries_clipped > 0
        )
        return Measurement(norm, is_finite, ()), ClipByValueState(
            stats, effect.entries_clipped, effect.cosine, ()
        )

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        del measured
        return map_inexact(lambda x: _clip(x, low, high), updates)

    return clip(init, measure, rescale)


class _Effect(NamedTuple):
    norm: jax.Array
    entries_clipped: jax.Array
    cosine: jax.Array


def _effect_of_clipping(
    updates: optax.Updates,
    low: jax.Array,
    high: jax.Array,
    norm: jax.Array,
    axis_name: AxisName,
) -> _Effect:
    """Norm after clipping, share of entries changed, cosine between before and after.

    Entries are measured in units of the bound, so that squares of clipped ones neither
    overflow nor vanish. Raw ones may be larger by any factor and get a smaller unit.
    """
    leaves = [_real(x) for x in jax.tree.leaves(updates) if is_inexact(x)]
    if not leaves:
        return _Effect(norm, jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))
    dtype = norm.dtype
    bound = jnp.maximum(jnp.abs(low), jnp.abs(high)).astype(dtype)
    unit = jnp.where(bound > 0, 1 / jnp.where(bound > 0, bound, 1), 0)
    small_unit = unit * 2.0**-40

    def sums(x: jax.Array) -> tuple[jax.Array, ...]:
        after = _clip(x, low, high).astype(dtype) * unit
        is_clipped = (x > high.astype(x.dtype)) | (x < low.astype(x.dtype))
        return (
            jnp.sum(after * after),
            jnp.sum(x.astype(dtype) * small_unit * after),
            jnp.sum(is_clipped.astype(dtype)),
            jnp.array(x.size, dtype),
        )

    totals = tuple(map(add_pairwise, zip(*map(sums, leaves), strict=True)))
    if axis_name is not None:
        totals = lax.psum(totals, axis_name)
    squares, product, num_clipped, size = totals
    length = jnp.sqrt(squares)
    cosine = jnp.minimum(product / (norm * small_unit * length), 1.0)
    is_clipped = num_clipped > 0
    cosine = jnp.where(is_clipped, cosine, 1.0)
    return _Effect(
        norm=jnp.where(is_clipped, bound * length, norm),
        entries_clipped=(num_clipped / jnp.maximum(size, 1)).astype(jnp.float32),
        cosine=jnp.where(jnp.isfinite(norm), cosine, jnp.nan).astype(jnp.float32),
    )


def _clip(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return lax.complex(_clip(x.real, low, high), _clip(x.imag, low, high))
    lowest, highest = low.astype(x.dtype), high.astype(x.dtype)
    # Comparisons that NaN fails, and no arithmetic: entries within keep their bits.
    return jnp.where(x > highest, highest, jnp.where(x < lowest, lowest, x))


def _real(x: Any) -> jax.Array:
    """The entries as reals: a complex array gains an axis of length two."""
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
