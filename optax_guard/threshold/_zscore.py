"""Thresholds by deviation from the running mean: ZClip's rule, made more robust."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_not_negative,
    check_positive,
)
from optax_guard._norms.statistics import bounded_square
from optax_guard._public import answers_wrong_calls
from optax_guard.threshold._base import (
    Limits,
    Threshold,
    capped,
    end_of_row,
    float32,
    is_informative,
    where_norm,
)


class ZScoreState(NamedTuple):
    """State of ``zscore``; S is the shape of the norms, () for the global norm.

    Norms are in units of the gradient; all fields are 0 after ``init``.

    Attributes:
      baseline_mean: float32[S], running mean of the norms; 0 until ``warmup`` norms
        were seen.
      baseline_var: float32[S], running variance of the norms.
      recent_mean: float32[S], mean of the present row of unusual norms; during warm-up
        all norms are; 0 without a row.
      recent_var: float32[S], variance of that row.
      recent_length: int32[S], length of that row.
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
    clip_to: str = "threshold",
    learn: str = "threshold",
    min_deviation: ArrayLike = 0.05,
    restart: bool = True,
    max_norm: ArrayLike | None = None,
) -> Threshold:
    r"""Clips norms that lie ``sigma`` standard deviations above their running mean.

    The threshold is :math:`t = \mu + \sigma \max(s, \delta\mu)`, with the running mean
    :math:`\mu` and deviation :math:`s` of the norms and :math:`\delta` =
    ``min_deviation``. A clipped norm enters the statistics as :math:`t`, so one spike
    of any size moves them little. After ``warmup`` norms in a row above :math:`t` or
    below :math:`\mu / 2` the statistics start afresh from those norms. So after any
    lasting change of scale at most ``warmup`` updates are clipped because of it. Zero
    and non-finite norms do not enter, so the threshold cannot fall to zero.

    Args:
      sigma: How many standard deviations pass; positive.
      decay: Weight of the past in mean and variance, in (0, 1).
      warmup: How many norms make up the first statistics, and new ones. Until then
        nothing but ``max_norm`` clips.
      clip_to: ``"threshold"``; ``"mean"``; or ``"reciprocal"``, ZClip's adaptive
        scaling, which clips a norm closer to the mean the further it lies above.
      learn: The value with which a clipped norm enters the statistics: ``"threshold"``;
        ``"target"``, the norm it was clipped to; or ``"nothing"``, it does not enter.
      min_deviation: Smallest standard deviation assumed, as a share of the mean; at
        least 0. At 0, after constant norms every larger norm is clipped.
      restart: Whether statistics ever start afresh. If not, and ``learn`` is not
        ``"threshold"``, a lasting rise can be clipped for good.
      max_norm: Largest norm that passes in any case, in units of the gradient; ``None``
        for none. All numbers may be traced.

    Returns:
      A threshold with a ``ZScoreState``: 20 bytes.

    Raises:
      ValueError: If a concrete number is out of range or a string unknown.

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
    """Makes a ``zscore`` that adds ``eps`` to the deviation, as ZClip does."""
    check_positive("sigma", sigma)
    check_fraction("decay", decay)
    check_count("warmup", warmup)
    check_flag("restart", restart)
    check_choice("clip_to", clip_to, ("threshold", "mean", "reciprocal"))
    check_choice("learn", learn, ("threshold", "target", "nothing"))
    check_not_negative("min_deviation", min_deviation)

    settings = _Settings(
        sigma, decay, warmup, clip_to, learn, min_deviation, restart, eps
    )
    limits = functools.partial(_limits, settings)
    return Threshold(
        _start, capped(limits, max_norm), functools.partial(_learn, settings)
    )


class _Settings(NamedTuple):
    sigma: ArrayLike
    decay: ArrayLike
    warmup: ArrayLike
    clip_to: str
    learn: str
    min_deviation: ArrayLike
    restart: bool
    eps: float


def _start(shape: tuple[int, ...]) -> ZScoreState:
    return ZScoreState(
        baseline_mean=jnp.zeros(shape, jnp.float32),
        baseline_var=jnp.zeros(shape, jnp.float32),
        recent_mean=jnp.zeros(shape, jnp.float32),
        recent_var=jnp.zeros(shape, jnp.float32),
        recent_length=jnp.zeros(shape, jnp.int32),
    )


def _limits(
    settings: _Settings, norm: jax.Array, global_norm: jax.Array, state: ZScoreState
) -> Limits:
    del global_norm
    trigger, target = _float32_limits(settings, norm.astype(jnp.float32), state)
    return trigger.astype(norm.dtype), target.astype(norm.dtype)


def _float32_limits(settings: _Settings, norm: jax.Array, state: ZScoreState) -> Limits:
    """Computes trigger and target; the trigger is infinite without statistics."""
    mean, sigma, eps = state.baseline_mean, settings.sigma, settings.eps
    deviation = jnp.maximum(
        _sqrt(state.baseline_var), float32(settings.min_deviation) * mean
    )
    trigger = mean + float32(sigma) * (deviation + eps)
    if settings.clip_to == "threshold":
        target = mean + float32(sigma) * deviation
    elif settings.clip_to == "mean":
        target = mean
    else:
        # The mean plus sigma deviations times sigma over the norm's own z-score.
        above = jnp.where(norm > trigger, norm - mean, 1.0)
        target = mean + float32(sigma) ** 2 * deviation * (deviation + eps) / above
        target = jnp.where(norm > trigger, target, trigger)
    return jnp.where(mean > 0, trigger, jnp.inf), target


def _learn(
    settings: _Settings, norm: jax.Array, clipped_norm: jax.Array, state: ZScoreState
) -> ZScoreState:
    # A clip to `max_norm` says nothing about the scale of the norms.
    del clipped_norm
    norm = norm.astype(jnp.float32)
    trigger, target = _float32_limits(settings, norm, state)
    is_spike, is_new = norm > trigger, state.baseline_mean == 0
    learns_target = settings.learn == "target"
    entered = jnp.where(is_spike, target if learns_target else trigger, norm)
    mean, var = _baseline_with(settings, entered, state)
    keeps = is_new | is_spike if settings.learn == "nothing" else is_new
    mean = jnp.where(keeps, state.baseline_mean, mean)
    var = jnp.where(keeps, state.baseline_var, var)

    is_unusual = is_new
    if settings.restart:
        is_unusual |= is_spike | (norm < state.baseline_mean / 2)
    length = state.recent_length + 1
    recent_mean, recent_var = _row_with(norm, length, state)
    is_restart, goes_on = end_of_row(is_unusual, length, settings.warmup)
    new = ZScoreState(
        baseline_mean=jnp.where(is_restart, recent_mean, mean),
        baseline_var=jnp.where(is_restart, recent_var, var),
        recent_mean=jnp.where(goes_on, recent_mean, 0.0),
        recent_var=jnp.where(goes_on, recent_var, 0.0),
        recent_length=jnp.where(goes_on, length, 0),
    )
    return where_norm(is_informative(norm), new, state)


def _baseline_with(
    settings: _Settings, entered: jax.Array, state: ZScoreState
) -> tuple[jax.Array, jax.Array]:
    """Adds a value to the running mean and variance."""
    weight = 1 - float32(settings.decay)
    mean = state.baseline_mean + weight * (entered - state.baseline_mean)
    square = bounded_square(entered - mean)
    return mean, (1 - weight) * state.baseline_var + weight * square


def _row_with(
    norm: jax.Array, length: jax.Array, state: ZScoreState
) -> tuple[jax.Array, jax.Array]:
    """Adds a norm to the mean and variance of a row, which then has ``length``."""
    share = 1 / length.astype(jnp.float32)
    deviation = norm - state.recent_mean
    mean = state.recent_mean + share * deviation
    square = bounded_square(deviation)
    return mean, (1 - share) * (state.recent_var + share * square)


def _sqrt(value: jax.Array) -> jax.Array:
    """Computes the square root, with the derivative zero at zero, not infinity."""
    is_zero = value == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, value)))
