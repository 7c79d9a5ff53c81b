"""Thresholds by quantile of all norms so far: AutoClip in fixed memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_count,
    check_flag,
    check_fraction,
    check_range,
    static_number,
)
from optax_guard._norms.sketch import (
    SMALLEST_IN_SKETCH,
    factor_to_end,
    sketch_add,
    sketch_init,
    sketch_quantile,
)
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import increment
from optax_guard.threshold._base import (
    Limits,
    Threshold,
    capped,
    is_informative,
    where_norm,
)


class QuantileState(NamedTuple):
    """State of ``quantile``; S is the shape of the norms, () for the global norm.

    Attributes:
      limit_sketch: int32[S, bins], float32 with a ``decay``: how many norms before
        clipping fell into each bin; 0 after ``init``.
      norms_seen: int32[S], how many norms were added; zeros and non-finite norms are
        not; 0 after ``init``.
    """

    limit_sketch: jax.Array
    norms_seen: jax.Array


@answers_wrong_calls
def quantile(
    q: ArrayLike,
    *,
    decay: ArrayLike | None = None,
    warmup: ArrayLike = 25,
    include_current: bool = False,
    relative_error: float = 0.01,
    max_norm: ArrayLike | None = None,
) -> Threshold:
    """Clips norms above the ``q``-quantile of the norms seen so far.

    This is AutoClip without its unbounded history. A sketch counts norms in bins that
    grow geometrically. The threshold is at least the exact quantile of all norms before
    clipping, and at most ``relative_error`` above (and 3e-5, for rounding), for norms
    from 1e-12 to 1e12. Larger norms count as 1e12; norms of at most 1e-12 always pass.
    Zero and non-finite norms do not enter, so the threshold cannot fall to zero. Norms
    enter unclipped and count once, however large they are. After a lasting rise the
    threshold is at the new scale once a share ``1 - q`` of all (weighted) norms is:
    without ``decay`` after ``(1 - q) / q`` times as many updates as there were before,
    with it after about ``log(q) / log(decay)`` updates.

    Args:
      q: Which quantile, in [0, 1]: about the share of updates that pass.
      decay: Weight of a norm relative to the next one, in (0, 1), to forget the distant
        past; ``None`` to weigh all alike.
      warmup: How many norms must have been seen before anything but ``max_norm``
        clips.
      include_current: Whether a norm enters before it is judged, as in AutoClip, so
        that it counts against itself.
      relative_error: Of the quantile, in (0, 1). Not traced: it decides the size of
        the state.
      max_norm: Largest norm that passes in any case, in units of the gradient; ``None``
        for none. All other numbers may be traced.

    Returns:
      A threshold with a ``QuantileState``: about ``220 / relative_error`` bytes for
      each norm, 23 kB at 0.01.

    Raises:
      ValueError: If a concrete number is out of range.
      TypeError: If ``relative_error`` is traced.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_global_norm(og.threshold.quantile(0.5, warmup=3))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 3.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> 2.0 <= updates.item() <= 1.01 * 2.0
      True

    References:
      Seetharaman et al., `AutoClip: Adaptive gradient clipping for source separation
      networks <https://arxiv.org/abs/2007.14469>`_, 2020

      Masson et al., `DDSketch: A fast and fully-mergeable quantile sketch with
      relative-error guarantees <https://arxiv.org/abs/1908.10693>`_, 2019
    """
    check_range("q", q, 0, 1)
    if decay is not None:
        check_fraction("decay", decay)
    check_count("warmup", warmup, least=0)
    check_flag("include_current", include_current)
    check_fraction("relative_error", relative_error)
    relative_error = static_number(
        "relative_error", relative_error, "it decides the size of the state"
    )

    settings = _Settings(q, decay, warmup, include_current, relative_error)
    limits = functools.partial(_limits, settings)
    return Threshold(
        functools.partial(_start, settings),
        capped(limits, max_norm),
        functools.partial(_learn, settings),
    )


class _Settings(NamedTuple):
    q: ArrayLike
    decay: ArrayLike | None
    warmup: ArrayLike
    include_current: bool
    relative_error: float


def _start(settings: _Settings, shape: tuple[int, ...]) -> QuantileState:
    # The threshold is in [1, 1 + error] times the quantile, the sketch's value in
    # [1 - half, 1 + half] times it.
    half = settings.relative_error / (2 + settings.relative_error)
    dtype = jnp.int32 if settings.decay is None else jnp.float32
    return QuantileState(
        limit_sketch=sketch_init(shape, half, dtype),
        norms_seen=jnp.zeros(shape, jnp.int32),
    )


def _limits(
    settings: _Settings, norm: jax.Array, global_norm: jax.Array, state: QuantileState
) -> Limits:
    del global_norm
    if settings.include_current:
        state = _learn(settings, norm, norm, state)
    # The upper end of the quantile's bin, so that all norms in the bin pass unchanged:
    # the sketch cannot tell them apart.
    value = sketch_quantile(state.limit_sketch, settings.q, of_nothing=0.0)
    to_end = factor_to_end(state.limit_sketch.shape[-1])
    threshold = value * max(1 + settings.relative_error / 2, to_end)
    is_known = (state.norms_seen >= settings.warmup) & (state.norms_seen > 0)
    # The sketch counts smaller norms as zero.
    threshold = jnp.where(is_known, jnp.maximum(threshold, SMALLEST_IN_SKETCH), jnp.inf)
    threshold = threshold.astype(norm.dtype)
    return threshold, threshold


def _learn(
    settings: _Settings, norm: jax.Array, clipped_norm: jax.Array, state: QuantileState
) -> QuantileState:
    del clipped_norm
    norm = norm.astype(jnp.float32)
    new = QuantileState(
        limit_sketch=sketch_add(state.limit_sketch, norm, settings.decay),
        norms_seen=increment(state.norms_seen),
    )
    return where_norm(is_informative(norm), new, state)
