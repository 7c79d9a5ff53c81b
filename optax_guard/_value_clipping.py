"""Clipping by value, and how far it turns a step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from optax_guard._base import (
    as_float,
    check_number,
    check_positive,
    check_state,
    is_inexact,
)
from optax_guard._clipping import Measurement, clip, map_inexact
from optax_guard._leaf_runs import add_pairwise
from optax_guard._mesh_axes import AxisName, by_axes, mesh_axes
from optax_guard._norms import accumulator_dtype, not_folded, tree_norm
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
    count as non-finite. The parts of a complex entry are clipped separately. Entries
    within the bounds keep their bits; given ``min_value``, but for denormals on CPU.

    Args:
      max_value: Upper bound :math:`u`, in units of the gradient; positive unless
        ``min_value`` is given; may be traced.
      min_value: Lower bound :math:`l`, less than ``max_value``; ``-max_value`` if
        ``None``.
      axis_name: As for ``clip_by_global_norm``.

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
    else:
        check_number("max_value", max_value)
        check_number("min_value", min_value)
        if (
            not isinstance(min_value, jax.Array)
            and not isinstance(max_value, jax.Array)
            and not np.less(min_value, max_value)
        ):
            raise ValueError(
                "`min_value` must be less than `max_value`, got "
                f"{min_value} and {max_value}."
            )

    def bounds(dtype: Any) -> tuple[jax.Array, jax.Array]:
        high = as_float(max_value, dtype)
        if min_value is None:
            # A traced bound could be negative.
            high = jnp.maximum(high, 0.0)
            return -high, high
        return as_float(min_value, dtype), high

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
        effect = _effect_of_clipping(updates, bounds, norm.value, axis_name)
        is_finite = jnp.isfinite(norm.value)
        stats = update_stats(
            state.stats,
            norm.value,
            effect.norm,
            bounds(norm.value.dtype)[1],
            effect.entries_clipped > 0,
        )
        return Measurement(norm, is_finite, ()), ClipByValueState(
            stats, effect.entries_clipped, effect.cosine, ()
        )

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        del measured
        is_symmetric = min_value is None
        return map_inexact(lambda x: _clip(x, bounds, is_symmetric), updates)

    return clip(init, measure, rescale)


_Bounds = Callable[[Any], tuple[jax.Array, jax.Array]]
_ROW_LENGTH = 1024
# Scales for two sums of squares, as in `_norms`, and for two sums of products of a raw
# entry with a clipped one, which is smaller: a large product has a large raw entry.
_UP, _DOWN = 2.0**32, 2.0**-64
_PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN = 2.0**64, 2.0**-100, 2.0**-28


class _Effect(NamedTuple):
    norm: jax.Array
    entries_clipped: jax.Array
    cosine: jax.Array


def _effect_of_clipping(
    updates: optax.Updates, bounds: _Bounds, norm: jax.Array, axis_name: AxisName
) -> _Effect:
    """Norm after clipping, share of entries changed, cosine between before and after.

    Right to rounding from 1e-25 to 3e38, before and after, like the norm.
    """
    leaves = [_real(x) for x in jax.tree.leaves(updates) if is_inexact(x)]
    # A record has no derivative.
    leaves, norm = lax.stop_gradient((leaves, norm))
    if not leaves:
        return _Effect(norm, jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))
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
    after = jnp.where(
        jnp.isfinite(small), jnp.sqrt(small) * (1 / _UP), jnp.sqrt(big) * (1 / _DOWN)
    )
    has_direction = (norm > 0) & (after > 0)
    before = jnp.where(has_direction, norm, 1.0)
    length = jnp.where(has_direction, after, 1.0)
    # Divided in two steps: XLA would make one of them, by a product that may overflow.
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
    return _Effect(
        norm=jnp.where(is_clipped, after, norm),
        entries_clipped=(num_clipped / float(max(size, 1))).astype(jnp.float32),
        cosine=jnp.where(jnp.isfinite(norm), cosine, jnp.nan).astype(jnp.float32),
    )


# Jitted for callers outside of `jit`: there, every call would compile it anew.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _sum_terms(
    leaves: list[jax.Array], limits: Any, dtype: Any
) -> tuple[jax.Array, ...]:
    """Totals over all entries of what `_terms` gives for each."""
    scales = not_folded(dtype, _UP, _DOWN, _PRODUCT_UP, _RAW_DOWN, _CLIPPED_DOWN)

    def total(
        reduce: Callable[..., Any], add: Callable[..., Any], *leaves: jax.Array
    ) -> tuple[jax.Array, ...]:
        pairs = zip(leaves, limits, strict=True)
        sums = [reduce(_terms(x, low, high, scales)) for x, (low, high) in pairs]
        return tuple(add(list(zip(*sums, strict=True))))

    # Reductions of one operand are one fusion on TPU and GPU. On CPU each would read
    # the operand again, several times slower in all than one reduction to many sums.
    return lax.platform_dependent(
        *leaves,
        cpu=functools.partial(total, _sum_at_once, _add_rows),
        default=functools.partial(
            total, functools.partial(map, jnp.sum), functools.partial(map, add_pairwise)
        ),
    )


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

    That loop adds one by one, so it runs over rows: rounding grows with their length.
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


def _add_rows(rows: list[tuple[jax.Array, ...]]) -> jax.Array:
    """The sum of each row, by a product with ones.

    XLA on CPU makes one kernel of a tree of additions, and of the sum of scalars put
    together too, in a time that grows with the square of their number.
    """
    # Columns first, those of one leaf: fewer, larger pieces to put together.
    columns = jnp.stack([jnp.stack(x) for x in zip(*rows, strict=True)], axis=1)
    ones = jnp.ones(columns.shape[1], columns.dtype)
    return jnp.matmul(columns, ones, precision=lax.Precision.HIGHEST)


def _clip(x: jax.Array, bounds: _Bounds, is_symmetric: bool) -> jax.Array:
    if jnp.iscomplexobj(x):
        parts = (_clip(part, bounds, is_symmetric) for part in (x.real, x.imag))
        return lax.complex(*parts)
    low, high = bounds(x.dtype)
    # Selections by comparisons that NaN fails, so that entries within keep their bits.
    if is_symmetric:
        # By size and sign, because XLA on CPU makes a minimum of a comparison with each
        # bound, and that flushes denormals.
        return jnp.where(jnp.abs(x) > high, jnp.where(x > 0, high, low), x)
    return jnp.where((x > high) | (x < low), jnp.where(x > high, high, low), x)


def _real(x: Any) -> jax.Array:
    """The entries as reals: a complex array gains an axis of length two."""
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x
