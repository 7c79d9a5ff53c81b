"""The guard for those who do not want to choose."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._guarding.guard import guard
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import TransformationLike
from optax_guard.skip import Signals, SkipRule, spike
from optax_guard.threshold import relative_to_params


@answers_wrong_calls
def auto(
    inner: TransformationLike, *, mask: Any = True
) -> optax.GradientTransformationExtraArgs:
    """A guard with settings that need no tuning.

    It is ``guard(inner, clip=1.0, max_update=threshold.relative_to_params(),
    skip=skip.spike())``. Steps that are not finite are skipped. Gradients are clipped
    to a norm of 1. An update changes the parameters by at most 10 % of their norm at
    first, and by 1 % later. Steps whose loss is far above the last ones are skipped, if
    ``value=`` gives the loss; without it, losses are not judged.

    With it, more learning rates train: ``benchmarks/README.md``, "No tuning", has the
    numbers. The bound needs ``params`` in ``update``, and
    costs more than the rest of the guard: see ``max_update`` of ``guard``. Where that
    matters, or under ``shard_map``, call ``guard``.

    Args:
      inner: The optimizer.
      mask: The leaves that count, as for ``guard``.

    Returns:
      A transformation whose state is a ``GuardState``.

    Raises:
      TypeError: If ``inner`` is no transformation.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.auto(optax.adam(1e3))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> grads = {"w": jnp.array([1.0, 1.0])}
      >>> params, state = og.apply_gradients(
      ...     tx, params, tx.init(params), grads=grads, value=jnp.float32(2.5)
      ... )
      >>> og.metrics(state)["update_ratio"].round(3).item()
      0.1
    """
    return guard(
        inner,
        clip=1.0,
        skip=_where_given(spike()),
        mask=mask,
        max_update=relative_to_params(),
    )


def _where_given(rule: SkipRule) -> SkipRule:
    """The rule, which judges nothing in a step without a loss."""

    def judge(signals: Signals, state: Any) -> jax.Array:
        if signals.value is None:
            return jnp.zeros((), jnp.bool_)
        return rule.judge(signals, state)

    def learn(signals: Signals, is_skipped: jax.Array, state: Any) -> Any:
        if signals.value is None:
            return state
        return rule.learn(signals, is_skipped, state)

    return dataclasses.replace(rule, judge=judge, learn=learn)
