"""Clips that tune themselves, as published and with their papers' names."""

import numpy as np
import optax
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_above,
    check_choice,
    check_count,
    check_flag,
    check_fraction,
    check_positive,
    check_range,
)
from optax_guard._clipping.global_norm import clip_by_global_norm
from optax_guard._clipping.groups import clip_by_leaf_norm
from optax_guard._norms.mesh_axes import AxisName
from optax_guard._public import answers_wrong_calls
from optax_guard.threshold._mean import relative_to_mean
from optax_guard.threshold._quantile import quantile
from optax_guard.threshold._zscore import published_zscore


@answers_wrong_calls
def zclip(
    *,
    clip_option: str = "adaptive_scaling",
    max_norm: ArrayLike | None = None,
    z_thresh: ArrayLike = 2.5,
    alpha: ArrayLike = 0.97,
    warmup_steps: ArrayLike = 25,
    mode: str = "zscore",
    skip_update_on_spike: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips updates by their global norm as ZClip does.

    A norm with a z-score ``z`` above ``z_thresh`` is clipped to ``z_thresh**2 / z``
    deviations above the running mean. Decisions and statistics are those of the
    authors' code, with three differences. Non-finite and zero norms do not enter the
    statistics; in their code one NaN turns clipping off for good. Norms are right in
    every dtype. ``max_norm`` is off by default; theirs is 1. Like theirs, after a
    lasting rise, or norms without variance, it clips to about the old mean for good.
    ``clip_by_global_norm(threshold.zscore())`` recovers.

    Args:
      clip_option: ``"adaptive_scaling"``, or ``"mean"`` to clip to the running mean.
      max_norm: A norm to clip to in any case, from the first step, in units of the
        gradient; ``None`` for none.
      z_thresh: How many standard deviations pass; positive.
      alpha: Weight of the past in mean and variance, in (0, 1).
      warmup_steps: How many norms make up the first mean and variance.
      mode: ``"zscore"``, or ``"percentile"`` to clip to ``z_thresh`` deviations above
        the mean.
      skip_update_on_spike: Whether clipped norms do not enter the statistics. By
        default they enter after clipping.
      axis_name: As for ``clip_by_global_norm``.

    Returns:
      A transformation whose state is a ``ClipByNormState``. All numbers may be traced.

    Raises:
      ValueError: If a concrete number is out of range or a string unknown.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.zclip(clip_option="mean", warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 3.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates
      Array([2.], dtype=float32)

    References:
      Kumar et al., `ZClip: Adaptive spike mitigation for LLM pre-training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    check_choice("mode", mode, ("zscore", "percentile"))
    check_choice("clip_option", clip_option, ("adaptive_scaling", "mean"))
    check_positive("z_thresh", z_thresh)
    check_fraction("alpha", alpha)
    check_count("warmup_steps", warmup_steps)
    check_flag("skip_update_on_spike", skip_update_on_spike)
    clip_to = {"adaptive_scaling": "reciprocal", "mean": "mean"}[clip_option]
    rule = published_zscore(
        z_thresh,
        decay=alpha,
        warmup=warmup_steps,
        clip_to=clip_to if mode == "zscore" else "threshold",
        learn="nothing" if skip_update_on_spike else "target",
        min_deviation=0.0,
        restart=False,
        max_norm=max_norm,
        eps=1e-6,
    )
    return clip_by_global_norm(rule, axis_name=axis_name)


@answers_wrong_calls
def autoclip(
    percentile: ArrayLike = 10.0, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Clips updates by a percentile of all global norms, this one's included.

    The whole history is kept as counts in 23 kB: the threshold is AutoClip's, or up to
    1 % more, for norms from 1e-12 to 1e12. Zero and non-finite norms do not enter it.

    Args:
      percentile: Which percentile, in [1, 100]: about the share of updates, in per
        cent, that pass. The paper's 10 clips nine in ten. May be traced.
      axis_name: As for ``clip_by_global_norm``.

    Returns:
      A transformation whose state is a ``ClipByNormState``.

    Raises:
      ValueError: If ``percentile`` is concrete and out of range.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.autoclip(50.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> 2.0 <= updates.item() <= 1.01 * 2.0
      True

    References:
      Seetharaman et al., `AutoClip: Adaptive gradient clipping for source separation
      networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    _check_percentile(percentile)
    rule = quantile(percentile / 100, warmup=0, include_current=True)
    return clip_by_global_norm(rule, axis_name=axis_name)


def _check_percentile(percentile: ArrayLike) -> None:
    """Refuses a share such as 0.9, which would clip nearly all updates."""
    try:
        check_range("percentile", percentile, 1, 100)
    except ValueError as error:
        number = np.asarray(percentile)
        if number.ndim == 0 and 0 < number < 1:
            raise ValueError(
                f"{error} It is in per cent: did you mean {100 * number:g}?"
            ) from None
        raise


@answers_wrong_calls
def adagc(
    *,
    lambda_rel: ArrayLike = 1.05,
    lambda_abs: ArrayLike = 1.0,
    beta: ArrayLike = 0.98,
    warmup_steps: ArrayLike = 100,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each leaf by the ratio to the running mean of its clipped norms: AdaGC.

    During warm-up, updates are clipped by their global norm, and each mean starts as
    the smallest norm after that clip. Decisions and means are those of the authors'
    code, with one difference: zero and non-finite norms do not enter. In their code, a
    leaf whose norm is zero once in warm-up gets no update ever after. Like theirs, a
    mean grows by a factor of at most ``1 + (1 - beta) * (lambda_rel - 1)`` a step,
    1.001 by default. ``clip_by_leaf_norm(threshold.relative_to_mean())`` follows a
    lasting rise.

    Args:
      lambda_rel: How far above its mean a norm may be; above 1.
      lambda_abs: Largest global norm in warm-up, in units of the gradient; positive.
      beta: Weight of the past in the means, in (0, 1).
      warmup_steps: Number of the first update that is not clipped by its global norm,
        counted from 1; at least 2. All numbers may be traced.
      axis_name: As for ``clip_by_leaf_norm``.

    Returns:
      A transformation whose state is a ``ClipByLeafNormState``.

    Raises:
      ValueError: If a concrete number is out of range.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.adagc(lambda_rel=1.5, lambda_abs=10.0, warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [4.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> updates
      Array([6.], dtype=float32)

    References:
      Wang et al., `AdaGC: Improving training stability for large language model
      pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    above = "The mean of the clipped norms could only fall."
    check_above("lambda_rel", lambda_rel, 1, above)
    if lambda_abs is not None:
        check_positive("lambda_abs", lambda_abs)
    check_fraction("beta", beta)
    check_count("warmup_steps", warmup_steps)
    check_above("warmup_steps", warmup_steps, 1, "The first mean is of those before.")
    rule = relative_to_mean(
        lambda_rel,
        decay=beta,
        warmup=warmup_steps - 1,
        warmup_max_norm=lambda_abs,
        restart=False,
    )
    return clip_by_leaf_norm(rule, axis_name=axis_name)
