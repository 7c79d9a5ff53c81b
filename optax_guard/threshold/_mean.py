"""Thresholds by ratio to the running mean of clipped norms: AdaGC's rule."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_above,
    check_count,
    check_flag,
    check_fraction,
    check_positive,
)
from optax_guard._norms.axis_norms import divide
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import as_float
from optax_guard.threshold._base import (
    Limits,
    Threshold,
    end_of_row,
    float32,
    is_informative,
    where_norm,
)


class RelativeToMeanState(NamedTuple):
    """State of ``relative_to_mean``; S is the shape of the norms, () for the global.

    Norms are in units of the gradient; all fields are 0 after ``init``.

    Attributes:
      clipped_mean: float32[S], running mean of the norms after clipping; 0 until
        ``warmup`` norms were seen.
      recent_min: float32[S], smallest norm of the present row of unusual norms; during
        warm-up all norms are; 0 without a row.
      recent_share: float32[S], largest share that clipping left of a norm in that row.
      recent_length: int32[S], length of that row.
    """

    clipped_mean: jax.Array
    recent_min: jax.Array
    recent_share: jax.Array
    recent_length: jax.Array


@answers_wrong_calls
def relative_to_mean(
    ratio: ArrayLike = 1.05,
    *,
    decay: ArrayLike = 0.98,
    warmup: ArrayLike = 100,
    warmup_max_norm: ArrayLike | None = 1.0,
    restart: bool = True,
) -> Threshold:
    r"""Clips norms above ``ratio`` times the running mean of the clipped norms.

    Norms :math:`n` above :math:`\rho\gamma` are clipped to it. The mean follows the
    clipped norms, :math:`\gamma \leftarrow \beta\gamma + (1-\beta) \min(n,
    \rho\gamma)`, so it rises by a factor of at most :math:`1 + (1-\beta)(\rho - 1)` a
    step.

    During warm-up updates are clipped by their *global* norm. Then :math:`\gamma`
    starts as the smallest norm times the largest share that this clipping left of a
    norm. (The paper takes the smallest clipped norm, and one exploding leaf makes that
    small for all leaves. Without a spike both are about the same.) After ``warmup``
    norms in a row above the threshold or below half the mean, :math:`\gamma` starts
    afresh from the smallest of them. So it follows a lasting change of scale after
    ``warmup`` updates; after up to ``2 * warmup - 1`` if norms just before the change
    were above the threshold, because they belong to the first such row. Zero and
    non-finite norms do not enter, so the threshold cannot fall to zero.

    Args:
      ratio: How far above the running mean a norm may be; above 1, or the mean could
        only fall.
      decay: Weight :math:`\beta` of the past, in (0, 1).
      warmup: How many norms make up the first mean, and a new one.
      warmup_max_norm: Largest global norm that passes unchanged during warm-up, in
        units of the gradient; ``None`` to clip nothing. All numbers may be traced.
      restart: Whether the mean ever starts afresh. If not, it starts as in the paper.

    Returns:
      A threshold with a ``RelativeToMeanState``: 16 bytes for each norm.

    Raises:
      ValueError: If a concrete number is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_global_norm(og.threshold.relative_to_mean(1.5, warmup=2))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [4.0, 4.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates
      Array([1.5], dtype=float32)

    References:
      Wang et al., `AdaGC: Improving training stability for large language model
      pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    check_above("ratio", ratio, 1, "The mean of the clipped norms could only fall.")
    check_fraction("decay", decay)
    check_count("warmup", warmup)
    check_flag("restart", restart)
    if warmup_max_norm is not None:
        check_positive("warmup_max_norm", warmup_max_norm)

    settings = _Settings(ratio, decay, warmup, warmup_max_norm, restart)
    return Threshold(
        _start,
        functools.partial(_limits, settings),
        functools.partial(_learn, settings),
    )


class _Settings(NamedTuple):
    ratio: ArrayLike
    decay: ArrayLike
    warmup: ArrayLike
    warmup_max_norm: ArrayLike | None
    restart: bool


def _start(shape: tuple[int, ...]) -> RelativeToMeanState:
    return RelativeToMeanState(
        clipped_mean=jnp.zeros(shape, jnp.float32),
        recent_min=jnp.zeros(shape, jnp.float32),
        recent_share=jnp.zeros(shape, jnp.float32),
        recent_length=jnp.zeros(shape, jnp.int32),
    )


def _limits(
    settings: _Settings,
    norm: jax.Array,
    global_norm: jax.Array,
    state: RelativeToMeanState,
) -> Limits:
    threshold = float32(settings.ratio) * state.clipped_mean
    if settings.warmup_max_norm is None:
        early = jnp.full_like(norm, jnp.inf)
    else:
        # A norm is above this exactly if the global norm is above `warmup_max_norm`.
        is_known = is_informative(norm) & is_informative(global_norm)
        share = jnp.where(
            is_known, divide(norm, jnp.where(is_known, global_norm, 1)), 1
        )
        early = as_float(settings.warmup_max_norm, norm.dtype) * share
    has_mean = state.clipped_mean > 0
    threshold = jnp.where(has_mean, threshold.astype(norm.dtype), early)
    return threshold, threshold


def _learn(
    settings: _Settings,
    norm: jax.Array,
    clipped_norm: jax.Array,
    state: RelativeToMeanState,
) -> RelativeToMeanState:
    norm, clipped_norm = norm.astype(jnp.float32), clipped_norm.astype(jnp.float32)
    old = state.clipped_mean
    is_new = old == 0
    weight = 1 - float32(settings.decay)
    mean = jnp.where(is_new, old, old + weight * (clipped_norm - old))

    is_unusual = is_new
    if settings.restart:
        is_unusual |= (norm > float32(settings.ratio) * old) | (norm < old / 2)
    length = state.recent_length + 1
    if settings.restart:
        # After warm-up all clipped norms are at the old threshold; only raw ones tell.
        kept = divide(clipped_norm, jnp.where(norm > 0, norm, 1.0))
        kept = jnp.where(is_new, kept, 1.0)
        candidate, share = norm, jnp.maximum(state.recent_share, kept)
    else:
        candidate, share = clipped_norm, jnp.ones_like(norm)
    smallest = jnp.where(
        length == 1, candidate, jnp.minimum(state.recent_min, candidate)
    )
    is_restart, goes_on = end_of_row(is_unusual, length, settings.warmup)
    new = RelativeToMeanState(
        clipped_mean=jnp.where(is_restart, smallest * share, mean),
        recent_min=jnp.where(goes_on, smallest, 0.0),
        recent_share=jnp.where(goes_on, share, 0.0),
        recent_length=jnp.where(goes_on, length, 0),
    )
    return where_norm(is_informative(norm) & (clipped_norm > 0), new, state)
