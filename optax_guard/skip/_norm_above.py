"""The rule that skips a step by the norm of its gradients."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_count
from optax_guard._public import answers_wrong_calls
from optax_guard.skip._rule import Signals, SkipReason, SkipRule
from optax_guard.threshold._base import Limits, Threshold
from optax_guard.threshold._coerce import as_absolute_threshold


@answers_wrong_calls
def norm_above(
    max_norm: ArrayLike | optax.Schedule | Threshold | Mapping[str, Any],
    *,
    max_consecutive: ArrayLike = 10,
) -> SkipRule:
    """Skips steps whose global norm before clipping is above ``max_norm``.

    A threshold that adapts learns from skipped steps, too, in its own way. Otherwise it
    could not follow a lasting change of scale.

    Args:
      max_norm: Largest norm that is not skipped, in units of the gradient: a positive
        number, possibly traced; a schedule, called with the number of finite steps
        before this one; one of ``optax_guard.threshold``; or a table of one.
      max_consecutive: Largest number of steps that rules skip in a row before this one
        lets a finite step through; at least 1, may be traced. Steps that are not finite
        do not count.

    Returns:
      A rule for ``guard(inner, skip=...)``.

    Raises:
      ValueError: If ``max_norm`` is a concrete number and not positive, or
        ``max_consecutive`` below 1.
      TypeError: If ``max_norm`` is none of the above.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(1.0), skip=og.skip.norm_above(10.0))
      >>> updates, state = tx.update(jnp.array([30.0]), tx.init(jnp.zeros(1)))
      >>> updates, og.SkipReason(int(state.skip_reason)).name
      (Array([0.], dtype=float32), 'NORM_ABOVE')
    """
    threshold = as_absolute_threshold("max_norm", max_norm)
    check_count("max_consecutive", max_consecutive)

    def limits(signals: Signals, state: Any) -> Limits:
        return threshold.limits(signals.grad_norm, signals.grad_norm, state)

    def judge(signals: Signals, state: Any) -> jax.Array:
        trigger, _ = limits(signals, state)
        return signals.grad_norm > trigger

    def learn(signals: Signals, is_skipped: jax.Array, state: Any) -> Any:
        del is_skipped
        norm = signals.grad_norm
        trigger, target = limits(signals, state)
        return threshold.learn(norm, jnp.where(norm > trigger, target, norm), state)

    return SkipRule(
        reason=SkipReason.NORM_ABOVE,
        start=lambda: threshold.start(()),
        judge=judge,
        learn=learn,
        max_consecutive=max_consecutive,
        # Thresholds adapt by themselves, and a schedule must not begin again.
        restart=lambda state: state,
    )
