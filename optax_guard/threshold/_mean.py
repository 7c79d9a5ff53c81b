"""Thresholds by ratio to the running mean of clipped norms: AdaGC's rule."""

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
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import as_float
from optax_guard.threshold._base import (
    Limits,
    Threshold,
    float32,
    is_informative,
    where,
)


class RelativeToMeanState(NamedTuple):
    """State of ``relative_to_mean``; S is the shape of the norms, () for the global.

    Norms are in units of the gradient; all fields are 0 after ``init``.

    Attributes:
      clipped_mean: float32[S], running mean of the norms after clipping; 0 until
        ``warmup`` norms were seen.
      recent_min: float32[S], smallest of the last norms, if all of them were unusual
        (or during warm-up), else 0.
      recent_share: float32[S], the largest share that clipping left of any of them.
      recent_length: int32[S], how many they are.
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

    Norms above :math:`\rho\gamma` are clipped to it, and
    :math:`\gamma \leftarrow \beta\gamma + (1-\beta) \min(n, \rho\gamma)` follows the
    norms :math:`n`, upwards by a factor of at most :math:`1 + (1-\beta)(\rho - 1)` a
    step. During warm-up, updates are clipped by their
    *global* norm, and :math:`\gamma` starts as the smallest norm times the largest
    share that this left of any. (The paper has the smallest clipped norm, to which one
    exploding leaf brings all leaves at once; without a spike both are about the same.)
    After ``warmup`` norms in a row above the limit or below half the mean, it starts
    afresh from the smallest of those. A lasting change of scale is so followed after
    ``warmup`` updates, and after ``2 * warmup - 1`` at most: norms of the old scale
    just before it that were above the limit may be the smallest of the first such row.
    Zero and non-finite norms do not enter: the limit cannot end at zero.

    Args:
      ratio: How far above the running mean a norm may be; above 1, or the mean could
        only fall.
      decay: Weight :math:`\beta` of the past, in (0, 1).
      warmup: How many norms make up the first mean, and a new one.
      warmup_max_norm: Largest global norm that passes unchanged during warm-up, in
        units of the gradient; ``None`` to clip nothing. All numbers may be traced.
      restart: Whether the mean ever starts afresh; if not, it starts as in the paper.

    Returns:
      A threshold with a ``RelativeToMeanState``: 16 bytes for each norm.

    Raises:
      ValueError: If a Python number is out of range.

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

    def start(shape: tuple[int, ...]) -> RelativeToMeanState:
        return RelativeToMeanState(
            clipped_mean=jnp.zeros(shape, jnp.float32),
            recent_min=jnp.zeros(shape, jnp.float32),
            recent_share=jnp.zeros(shape, jnp.float32),
            recent_length=jnp.zeros(shape, jnp.int32),
        )

    def limits(
        norm: jax.Array, global_norm: jax.Array, state: RelativeToMeanState
    ) -> Limits:
        limit = float32(ratio) * state.clipped_mean
        if warmup_max_norm is None:
            early = jnp.full_like(norm, jnp.inf)
        else:
            # Above this exactly if the global norm is above `warmup_max_norm`.
            is_known = is_informative(norm) & is_informative(global_norm)
            share = jnp.where(is_known, norm / jnp.where(is_known, global_norm, 1), 1)
            early = as_float(warmup_max_norm, norm.dtype) * share
        limit = jnp.where(state.clipped_mean > 0, limit.astype(norm.dtype), early)
        return limit, limit

    def learn(
        norm: jax.Array, clipped_norm: jax.Array, state: RelativeToMeanState
    ) -> RelativeToMeanState:
        norm, clipped_norm = norm.astype(jnp.float32), clipped_norm.astype(jnp.float32)
        old = state.clipped_mean
        is_new = old == 0
        weight = 1 - float32(decay)
        mean = jnp.where(is_new, old, old + weight * (clipped_norm - old))

        is_unusual = is_new
        if restart:
            is_unusual |= (norm > float32(ratio) * old) | (norm < old / 2)
        length = state.recent_length + 1
        if restart:
            # Afterwards clipped norms are all at the old limit: only raw ones tell.
            kept = jnp.where(is_new, clipped_norm / jnp.where(norm > 0, norm, 1.0), 1.0)
            candidate, share = norm, jnp.maximum(state.recent_share, kept)
        else:
            candidate, share = clipped_norm, jnp.ones_like(norm)
        smallest = jnp.where(
            length == 1, candidate, jnp.minimum(state.recent_min, candidate)
        )
        is_restart = is_unusual & (length >= warmup)
        goes_on = is_unusual & ~is_restart
        new = RelativeToMeanState(
            clipped_mean=jnp.where(is_restart, smallest * share, mean),
            recent_min=jnp.where(goes_on, smallest, 0.0),
            recent_share=jnp.where(goes_on, share, 0.0),
            recent_length=jnp.where(goes_on, length, 0),
        )
        return where(is_informative(norm) & (clipped_norm > 0), new, state)

    return Threshold(start, limits, learn)
