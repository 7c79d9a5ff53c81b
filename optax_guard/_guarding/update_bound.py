"""The bound on updates: the second place at which a guard acts, after the optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_guard._clipping.parts import ClipParts
from optax_guard._guarding.masking import hide
from optax_guard._norms.statistics import as_float32
from optax_guard._norms.tree_norm import tree_norm
from optax_guard._rows import Entry, empty_rows, rows_of
from optax_guard._trees import dtype_of, is_inexact
from optax_guard.skip import SkipReason
from optax_guard.threshold._params import RelativeToParamsState


class UpdateBoundState(NamedTuple):
    """State of the bound on updates, ``max_update`` of ``guard``.

    It is that of the last step taken. The two numbers are attributes, and share one
    array.

    Attributes:
      bound_values: float32[8], the row of the two numbers.
      bound_clip_state: State of the clip that bounds the updates. Its statistics are
        those of the updates' norm: ``stats.grad_norm`` is the norm before the bound,
        ``stats.clipped_norm`` the norm after it.
      params_norm: float32[], norm of the parameters before the step; 0 after ``init``.
      update_ratio: float32[], norm of the bounded updates in units of ``params_norm``;
        0 after ``init``, and where ``params_norm`` is 0.
    """

    bound_values: jax.Array
    bound_clip_state: Any

    params_norm = Entry("bound_values", 0, jnp.float32)
    update_ratio = Entry("bound_values", 1, jnp.float32)


def first_bound(
    parts: ClipParts, params: optax.Params, inner_state: Any
) -> UpdateBoundState:
    """The state after ``init``, around an optimizer that may have taken steps."""
    state = UpdateBoundState(**empty_rows(UpdateBoundState), bound_clip_state=())
    return state._replace(
        bound_clip_state=_counting_from(inner_state, parts.init(params))
    )


def _counting_from(inner_state: Any, clip_state: Any) -> Any:
    """The state of a clip whose thresholds count on from the optimizer's count."""
    counts = [
        jnp.asarray(x, jnp.int32)
        for path, x in jax.tree.leaves_with_path(inner_state)
        if path and getattr(path[-1], "name", None) == "count" and jnp.shape(x) == ()
    ]

    def is_relative(x: Any) -> bool:
        return isinstance(x, RelativeToParamsState)

    def count_on(x: Any) -> Any:
        if not is_relative(x) or not counts:
            return x
        return RelativeToParamsState(jnp.max(jnp.stack(counts)))

    return jax.tree.map(count_on, clip_state, is_leaf=is_relative)


def bound_updates(
    config: Any,
    updates: optax.Updates,
    params: optax.Params | None,
    state: Any,
) -> tuple[optax.Updates, UpdateBoundState]:
    """Bounds the updates of a step, which are finite.

    Args:
      config: The ``GuardConfig``.
      updates: The updates of the optimizer; zeros if the step is skipped.
      params: The parameters before the step.
      state: The ``GuardState`` after it, but for the bound.

    Returns:
      The updates, and the state of the bound; the old one if the step is skipped.
    """
    if params is None:
        raise ValueError(
            "`params` of `guard` with `max_update` must be given: "
            "`tx.update(updates, state, params)`."
        )
    old: UpdateBoundState = state.bound_state
    updates = _rounded(updates)
    of_params = params if config.mask is True else hide(config.mask, params)
    measured, clip_state = config.bound.measure(updates, old.bound_clip_state, params)
    norm = as_float32(tree_norm(of_params, None, config.bound.axis_name).value)
    is_known = jnp.isfinite(norm) & (norm > 0) & measured.is_finite
    ratio = clip_state.stats.clipped_norm / jnp.where(is_known, norm, 1)
    numbers = {
        # All of the state is finite, also if the parameters are not.
        "params_norm": jnp.where(jnp.isfinite(norm), norm, old.params_norm),
        "update_ratio": jnp.where(is_known, ratio, 0),
    }
    new = UpdateBoundState(
        **rows_of(UpdateBoundState, numbers), bound_clip_state=clip_state
    )
    # All entries are finite. If float32 cannot hold their norm, no factor is known.
    rescaled = config.bound.rescale(updates, measured)
    bounded = jax.tree.map(
        functools.partial(_if_finite, measured.is_finite), rescaled, params
    )
    is_skipped = state.skip_reason != SkipReason.NONE
    return bounded, optax.tree.where(is_skipped, old, new)


def _rounded(updates: optax.Updates) -> optax.Updates:
    """The same updates; XLA must keep those in half precision in half precision.

    It would leave out the rounding, and write and read them in float32.
    """
    is_half = any(
        jnp.finfo(dtype_of(x)).bits < 32
        for x in jax.tree.leaves(updates)
        if is_inexact(x)
    )
    return jax.lax.optimization_barrier(updates) if is_half else updates


def _if_finite(is_known: jax.Array, update: Any, param: Any) -> Any:
    """The update; zero where the parameter would not be finite after it."""
    if not is_inexact(update):
        return update
    is_applied = is_known & jnp.isfinite(added(update, param))
    return jnp.where(is_applied, update, jnp.zeros_like(update))


def added(update: Any, param: Any) -> Any:
    """The parameter after the update, in its dtype; a leaf without one is let be."""
    if not is_inexact(update):
        return update
    return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)
