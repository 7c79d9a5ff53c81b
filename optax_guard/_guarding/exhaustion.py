"""The alarm of a guard that skips all steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_guard._guarding.skip_readout import last_skips
from optax_guard.skip import SkipReason

_ADVICE = {
    SkipReason.NONFINITE_UPDATE: (
        "The gradients were finite, and the optimizer made non-finite parameters or "
        "moments of them. Those entries kept their old values. Look at its learning "
        "rate and its schedule, and at `eps`, which float16 rounds to 0."
    ),
    SkipReason.NONFINITE_PARAMS: (
        "The parameters were not finite before the step. The guard does not write such "
        "ones: they were there before it, or something else has written them. No step "
        "can repair them: go back to a checkpoint from before."
    ),
    SkipReason.OVERFLOW: (
        "Parameters and optimizer state are those of the last good step. The gradients "
        "are too large for float32: clip them by `guard(tx, clip=1.0)`."
    ),
}
_OTHER_ADVICE = (
    "Parameters and optimizer state are those of the last good step. Look at "
    "`skipped_steps(opt_state, params)` for the leaves and the steps, and at the "
    "batches of those steps; a lower learning rate or threshold helps only if the "
    "gradients were growing before."
)


class GuardExhaustedError(RuntimeError):
    """The guard has skipped too many steps in a row; see ``raise_if_exhausted``."""


def raise_if_exhausted(
    metrics: Mapping[str, Any], state: Any = None, params: Any = None
) -> None:
    """Raises if the guard has skipped too many steps in a row. Waits for the device.

    Args:
      metrics: The dict that ``metrics(state)`` returned.
      state: That state, to tell the last skipped steps with their leaves; read only if
        it raises.
      params: The parameters, to name the leaves, and those that are not finite
        themselves; taken from ``state.params`` if it has them.

    Raises:
      GuardExhaustedError: If a ``guard_exhausted`` in it is true.
      ValueError: If there is none.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), max_consecutive_skips=1)
      >>> updates, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
      >>> og.raise_if_exhausted(og.metrics(state))
      Traceback (most recent call last):
      ...
      optax_guard.GuardExhaustedError: The guard skipped the last 1 step(s)...
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            "`metrics` must be the dict that `optax_guard.metrics` returns for a "
            f"state, got a `{type(metrics).__name__}`. Write "
            "`raise_if_exhausted(metrics(opt_state), opt_state, params)`."
        )
    flags = {k: v for k, v in metrics.items() if k.startswith("guard_exhausted")}
    if not flags:
        raise ValueError(
            "`metrics` must hold `guard_exhausted`, as `optax_guard.metrics` returns "
            f"it for an optimizer with a guard, got the keys {sorted(metrics)}."
        )
    for name, flag in flags.items():
        if np.any(flag):
            suffix = name.removeprefix("guard_exhausted")
            worst = np.argmax(metrics["skip_streak" + suffix])
            reason = SkipReason(int(np.ravel(metrics["skip_reason" + suffix])[worst]))
            streak = int(np.ravel(metrics["skip_streak" + suffix])[worst])
            message = (
                f"The guard skipped the last {streak} step(s) in a row, the last for "
                f"{reason.name}. {_ADVICE.get(reason, _OTHER_ADVICE)}"
            )
            lines = [] if state is None else last_skips(state, params)
            raise GuardExhaustedError("\n".join([message, *lines]))
