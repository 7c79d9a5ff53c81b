"""Thresholds by deviation from the running mean: ZClip, and a sturdier default."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_positive,
    check_range,
)
from optax_guard._norms.statistics import bounded_square
from optax_guard._public import answers_wrong_calls
from optax_guard.threshold._base import (
    Limits,
    Threshold,
    capped,
    float32,
    is_informative,
    where,
)


class ZScoreState(NamedTuple):
    """State of ``zscore``; S is the shape of the norms, () for the global norm.

    Norms are in units of the gradient; all fields are 0 after ``init``.

    Attributes:
      baseline_mean: float32[S], running mean of the norms; 0 until ``warmup`` norms
        were seen.
      baseline_var: float32[S], running variance of the norms.
      recent_mean: float32[S], mean of the last norms, if all of them were unusual (or
        during warm-up), else 0.
      recent_var: float32[S], their variance.
      recent_length: int32[S], how many they are.
    """

    baseline_mean: jax.Array
    baseline_var: jax.Array
    recent_mean: jax.Array
    recent_var: jax.Array
    recent_length: jax.Array


@answers_wrong_calls
def zscore(
    sigma: ArrayLike = 2.5,
    *,
    decay: ArrayLike = 0.97,
    warmup: ArrayLike = 25,
    clip_to: str = "limit",
    learn: str = "limit",
    min_deviation: ArrayLike = 0.05,
    restart: bool = True,
    max_norm: ArrayLike | None = None,
) -> Threshold:
    r"""Clips norms that lie ``sigma`` standard deviations above their running mean.

    Norms above :math:`l = \mu + \sigma \max(s, \delta\mu)` are clipped, with the
    running mean :math:`\mu` and deviation :math:`s` of the norms and
    :math:`\delta` = ``min_deviation``. A clipped norm enters the statistics as
    :math:`l`, so that one spike of any size moves them little. After ``warmup`` norms
    in a row above :math:`l` or below :math:`\mu / 2` the statistics start afresh from
    those: whatever happens to the scale of the norms, at most ``warmup`` updates are
    clipped for being at the new scale. Zero and non-finite norms do not enter, so the
    limit cannot end at zero.

    Args:
      sigma: How many standard deviations pass; positive.
      decay: Weight of the past in mean and variance, in (0, 1).
      warmup: How many norms make up the first statistics, and new ones. Until then
        nothing but ``max_norm`` clips.
      clip_to: ``"limit"``; ``"mean"``; or ``"reciprocal"``, ZClip's adaptive scaling:
        the further above the mean, the closer to it.
      learn: What a clipped norm enters the statistics as: ``"limit"``, ``"target"``
        (what it was clipped to) or ``"nothing"``.
      min_deviation: Smallest standard deviation assumed, as a share of the mean; at
        least 0, where constant norms let nothing above them pass.
      restart: Whether statistics ever start afresh. Without, and with ``learn`` not
        ``"limit"``, a lasting rise can be clipped for good.
      max_norm: A norm to clip to in any case, in units of the gradient; ``None`` for
        none. All numbers may be traced.

    Returns:
      A threshold with a ``ZScoreState``: 20 bytes.

    Raises:
      ValueError: If a Python number is out of range or a string unknown.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.clip_by_global_norm(og.threshold.zscore(2.0, warmup=4))
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.0, 1.0, 1.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates
      Array([1.1], dtype=float32)

    References:
      Kumar et al., `ZClip: Adaptive spike mitigation for LLM pre-training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    return published_zscore(
        sigma,
        decay=decay,
        warmup=warmup,
        clip_to=clip_to,
        learn=learn,
        min_deviation=min_deviation,
        restart=restart,
        max_norm=max_norm,
        eps=0.0,
    )


def published_zscore(
    sigma: ArrayLike,
    *,
    decay: ArrayLike,
    warmup: ArrayLike,
    clip_to: str,
    learn: str,
    min_deviation: ArrayLike,
    restart: bool,
    max_norm: ArrayLike | None,
    eps: float,
) -> Threshold:
    """``zscore``, with ZClip's addition of ``eps`` to the deviation."""
    check_positive("sigma", sigma)
    check_fraction("decay", decay)
    check_count("warmup", warmup)
    check_flag("restart", restart)
    check_choice("clip_to", clip_to, ("limit", "mean", "reciprocal"))
    check_choice("learn", learn, ("limit", "target", "nothing"))
    check_range("min_deviation", min_deviation, 0, math.inf)

    def start(shape: tuple[int, ...]) -> ZScoreState:
        return ZScoreState(
            baseline_mean=jnp.zeros(shape, jnp.float32),
            baseline_var=jnp.zeros(shape, jnp.float32),
            recent_mean=jnp.zeros(shape, jnp.float32),
            recent_var=jnp.zeros(shape, jnp.float32),
            recent_length=jnp.zeros(shape, jnp.int32),
        )

    def bounds(norm: jax.Array, state: ZScoreState) -> Limits:
        """Limit and target in float32, the former infinite without statistics."""
        mean = state.baseline_mean
        deviation = jnp.maximum(
            _sqrt(state.baseline_var), float32(min_deviation) * mean
        )
        limit = mean + float32(sigma) * (deviation + eps)
        if clip_to == "limit":
            target = mean + float32(sigma) * deviation
        elif clip_to == "mean":
            target = mean
        else:
            # The mean plus sigma deviations times sigma over the norm's own z-score.
            above = jnp.where(norm > limit, norm - mean, 1.0)
            target = mean + float32(sigma) ** 2 * deviation * (deviation + eps) / above
            target = jnp.where(norm > limit, target, limit)
        return jnp.where(mean > 0, limit, jnp.inf), target

    def limits(norm: jax.Array, global_norm: jax.Array, state: ZScoreState) -> Limits:
        del global_norm
        limit, target = bounds(norm.astype(jnp.float32), state)
        return limit.astype(norm.dtype), target.astype(norm.dtype)

    def learn_norm(
        norm: jax.Array, clipped_norm: jax.Array, state: ZScoreState
    ) -> ZScoreState:
        # What `max_norm` clips besides is no news about the scale of the norms.
        del clipped_norm
        norm = norm.astype(jnp.float32)
        limit, target = bounds(norm, state)
        is_spike = norm > limit
        old_mean, old_var = state.baseline_mean, state.baseline_var
        entered = jnp.where(is_spike, target if learn == "target" else limit, norm)
        weight = 1 - float32(decay)
        mean = old_mean + weight * (entered - old_mean)
        var = (1 - weight) * old_var + weight * bounded_square(entered - mean)
        is_new = old_mean == 0
        keeps = is_new | is_spike if learn == "nothing" else is_new
        mean, var = jnp.where(keeps, old_mean, mean), jnp.where(keeps, old_var, var)

        is_unusual = is_new
        if restart:
            is_unusual |= is_spike | (norm < old_mean / 2)
        length = state.recent_length + 1
        share = 1 / length.astype(jnp.float32)
        deviation = norm - state.recent_mean
        recent_mean = state.recent_mean + share * deviation
        recent_var = (1 - share) * (
            state.recent_var + share * bounded_square(deviation)
        )
        is_restart = is_unusual & (length >= warmup)
        goes_on = is_unusual & ~is_restart
        new = ZScoreState(
            baseline_mean=jnp.where(is_restart, recent_mean, mean),
            baseline_var=jnp.where(is_restart, recent_var, var),
            recent_mean=jnp.where(goes_on, recent_mean, 0.0),
            recent_var=jnp.where(goes_on, recent_var, 0.0),
            recent_length=jnp.where(goes_on, length, 0),
        )
        return where(is_informative(norm), new, state)

    return Threshold(start, capped(limits, max_norm), learn_norm)


def _sqrt(value: jax.Array) -> jax.Array:
    """The square root, with a derivative of zero at zero instead of infinity."""
    is_zero = value == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, value)))
