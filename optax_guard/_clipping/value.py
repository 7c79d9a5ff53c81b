"""Clipping by value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_number,
    check_positive,
    check_state,
    is_concrete,
    python_number,
)
from optax_guard._clipping.parts import ClipParts, Measurement, clip
from optax_guard._clipping.value_effect import Bounds, effect_of_clipping
from optax_guard._norms.mesh_axes import AxisName
from optax_guard._norms.statistics import NormStats, init_stats, update_stats
from optax_guard._norms.tree_norm import tree_norm
from optax_guard._public import answers_wrong_calls
from optax_guard._rows import Entry, rows_of
from optax_guard._trees import as_float, map_inexact


def _entry(index: int) -> Entry:
    return Entry("effect_values", index, jnp.float32, codes="effect_codes")


class ClipByValueState(NamedTuple):
    """State of ``clip_by_value``.

    Share and cosine are attributes, and share two arrays.

    Attributes:
      stats: Statistics of the norm, a ``NormStats``.
      effect_codes: int32[8], a row of codes.
      effect_values: float32[8], the row of share and cosine. Where one is not finite,
        it holds the last one that was, and ``effect_codes`` says so.
      threshold: Always ().
      entries_clipped: float32[], share of the floating entries that the last update
        changed, in [0, 1]; 0 after ``init``.
      update_cosine: float32[], cosine of the angle between the last updates before and
        after clipping: 1 is no turn; NaN if they were not finite; 1 after ``init``.
    """

    stats: NormStats
    effect_codes: jax.Array
    effect_values: jax.Array
    threshold: Any

    entries_clipped = _entry(0)
    update_cosine = _entry(1)


@answers_wrong_calls
def clip_by_value(
    max_value: ArrayLike,
    *,
    min_value: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every entry of the updates, and records the turn of the step.

    Each floating entry :math:`x` becomes :math:`\min(\max(x, l), u)`. This bounds
    single entries but changes the direction of the step, unlike
    ``clip_by_global_norm``. The state shows the change as the cosine between the
    updates before and after. An infinite entry becomes the bound; NaN stays NaN; both
    count as non-finite. The parts of a complex entry are clipped separately. Entries
    within the bounds keep their bits (with ``min_value``, except denormals on CPU).

    Args:
      max_value: Upper bound :math:`u`, in units of the gradient; positive unless
        ``min_value`` is given; may be traced.
      min_value: Lower bound :math:`l`, less than ``max_value``; ``-max_value`` if
        ``None``.
      axis_name: As for ``clip_by_global_norm``.

    Returns:
      A transformation whose state is a ``ClipByValueState``.

    Raises:
      ValueError: If the bounds are concrete and out of order.
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
    _check_bounds(max_value, min_value)
    is_symmetric = min_value is None

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
            **rows_of(ClipByValueState, {"entries_clipped": 0.0, "update_cosine": 1.0}),
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
        effect = effect_of_clipping(
            updates, bounds, norm.value, axis_name, is_symmetric
        )
        stats = update_stats(
            state.stats,
            norm.value,
            effect.norm,
            bounds(norm.value.dtype)[1],
            effect.entries_clipped > 0,
        )
        numbers = {
            "entries_clipped": effect.entries_clipped,
            "update_cosine": effect.cosine,
        }
        rows = rows_of(ClipByValueState, numbers, state)
        return Measurement(norm, jnp.isfinite(norm.value), ()), ClipByValueState(
            stats, **rows, threshold=()
        )

    def rescale(updates: optax.Updates, measured: Measurement) -> optax.Updates:
        del measured
        return map_inexact(lambda x: _clip(x, bounds, is_symmetric), updates)

    return clip(ClipParts(init, measure, rescale, axis_name))


def _check_bounds(max_value: ArrayLike, min_value: ArrayLike | None) -> None:
    if min_value is None:
        check_positive("max_value", max_value)
        return
    check_number("max_value", max_value)
    check_number("min_value", min_value)
    if (
        is_concrete(min_value)
        and is_concrete(max_value)
        and not python_number(min_value) < python_number(max_value)
    ):
        raise ValueError(
            "`min_value` must be less than `max_value`, got "
            f"{min_value} and {max_value}."
        )


def _clip(x: jax.Array, bounds: Bounds, is_symmetric: bool) -> jax.Array:
    if jnp.iscomplexobj(x):
        parts = (_clip(part, bounds, is_symmetric) for part in (x.real, x.imag))
        return lax.complex(*parts)
    low, high = bounds(x.dtype)
    # NaN fails each comparison, and entries within the bounds keep their bits.
    if is_symmetric:
        # By size and sign: XLA on CPU turns a comparison with each bound into a
        # minimum, which flushes denormals.
        return jnp.where(jnp.abs(x) > high, jnp.where(x > 0, high, low), x)
    return jnp.where((x > high) | (x < low), jnp.where(x > high, high, low), x)
