"""Thresholds by quantile of all norms so far: AutoClip in fixed memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_count,
    check_flag,
    check_fraction,
    check_range,
    check_static,
)
from optax_guard._norms.sketch import (
    SMALLEST_IN_SKETCH,
    sketch_add,
    sketch_init,
    sketch_quantile,
)
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import increment
from optax_guard.threshold._base import Limits, Threshold, capped, is_informative, where


class QuantileState(NamedTuple):
    """State of ``quantile``; S is the shape of the norms, () for the global norm.

    Attributes:
      limit_sketch: int32[S, bins], float32 with a ``decay``: how many norms before
        clipping fell into each bin; 0 after ``init``.
      norms_seen: int32[S], how many norms were added, zeros and non-finite ones not
        counted; 0 after ``init``.
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

    AutoClip without its unbounded history: a sketch keeps counts in bins that grow
    geometrically, so that the limit is at least the exact quantile of all norms before
    clipping and at most ``relative_error`` above, for norms from 1e-12 to 1e12. What is
    larger counts as 1e12; norms of at most 1e-12 always pass. Zero and non-finite norms
    do not enter, so the limit cannot end at zero. Norms enter unclipped and count once,
    however large they are. After a lasting rise the limit is at the new scale when a
    share ``1 - q`` of all (weighted) norms is: without forgetting after ``(1 - q) / q``
    times as many updates as there were before, with it after about
    ``log(q) / log(decay)``.

    Args:
      q: Which quantile, in [0, 1]: about the share of updates that pass.
      decay: Weight of a norm relative to its successor's, in (0, 1), to forget the
        distant past; ``None`` to weigh all alike.
      warmup: How many norms must have been seen before anything but ``max_norm``
        clips.
      include_current: Whether the norm to be judged is among those of which the
        quantile is taken, as in AutoClip. It then counts against itself.
      relative_error: Of the quantile, in (0, 1). Not traced: it decides the size of
        the state.
      max_norm: A norm to clip to in any case, in units of the gradient; ``None`` for
        none. All other numbers may be traced.

    Returns:
      A threshold with a ``QuantileState``: about ``220 / relative_error`` bytes for
      each norm, 23 kB at 0.01.

    Raises:
      ValueError: If a Python number is out of range.
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
    check_static("relative_error", relative_error)
    check_fraction("relative_error", relative_error)

    def start(shape: tuple[int, ...]) -> QuantileState:
        dtype = jnp.int32 if decay is None else jnp.float32
        return QuantileState(
            # One-sided, an error of as much is half of it on both sides.
            limit_sketch=sketch_init(
                shape, relative_error / (2 + relative_error), dtype
            ),
            norms_seen=jnp.zeros(shape, jnp.int32),
        )

    def limits(norm: jax.Array, global_norm: jax.Array, state: QuantileState) -> Limits:
        del global_norm
        if include_current:
            state = learn(norm, norm, state)
        # The upper end of the quantile's bin: what the sketch cannot tell from it, such
        # as norms that are all the same, passes unchanged.
        limit = sketch_quantile(state.limit_sketch, q) * (1 + relative_error / 2)
        is_known = (state.norms_seen >= warmup) & (state.norms_seen > 0)
        # The sketch tells smaller norms not apart, and calls them zero.
        limit = jnp.where(is_known, jnp.maximum(limit, SMALLEST_IN_SKETCH), jnp.inf)
        limit = limit.astype(norm.dtype)
        return limit, limit

    def learn(
        norm: jax.Array, clipped_norm: jax.Array, state: QuantileState
    ) -> QuantileState:
        del clipped_norm
        norm = norm.astype(jnp.float32)
        new = QuantileState(
            limit_sketch=sketch_add(state.limit_sketch, norm, decay),
            norms_seen=increment(state.norms_seen, True),
        )
        return where(is_informative(norm), new, state)

    return Threshold(start, capped(limits, max_norm), learn)
