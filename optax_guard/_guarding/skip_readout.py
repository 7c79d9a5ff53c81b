"""Reading the log of skipped steps."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_guard._guarding.leaf_report import (
    FINITE,
    Verdict,
    as_text,
    bad_parameters,
    verdicts_of,
)
from optax_guard._guarding.state import LOG_LENGTH, GuardState
from optax_guard._models import arrays_of
from optax_guard._trees import find_states, only_state
from optax_guard.skip import SkipReason


class SkippedStep(NamedTuple):
    """One skipped step, on the host.

    Attributes:
      update: Index of the step among all that the guard has seen, from 0.
      grad_norm: Its global norm before clipping, in units of the gradient.
      value: Its loss; NaN if ``value=`` was not given to ``update``.
      reason: Why it was skipped.
      leaf: Path of the first leaf in ``leaves`` that is not finite, or of a run of
        neighbours that holds it; ``None`` if all were finite.
      leaves: The leaves whose gradient's norm is not finite, and their neighbours that
        are finite, in the order of the model: pairs of a path and "NaN", "Inf", "NaN or
        Inf" or "finite". A dict that is not sorted keeps its order, as the parameters
        from Linen's ``init`` do; in one that is sorted, as JAX makes them, ``layers_2``
        comes before ``layers_10``. Of more than 128 leaves, neighbours share a path "a
        to b". If the gradients are not known to be those of the parameters, only
        indices of those that are not finite are given. A leaf that a mask leaves out
        counts as finite. A NaN that a layer's backward pass makes reaches all layers
        before it: the finite leaf that comes next stands just above the layer that
        broke.
    """

    update: int
    grad_norm: float
    value: float
    reason: SkipReason
    leaf: str | int | None
    leaves: tuple[Verdict, ...] = ()

    def __str__(self) -> str:
        words = (
            f"update {self.update}: {self.reason.name}, norm {self.grad_norm:.4g}, "
            f"loss {self.value:.4g}"
        )
        return "; ".join(filter(None, [words, as_text(self.leaves)]))


def skipped_steps(state: Any, params: Any = None) -> list[SkippedStep]:
    """The last skipped steps, at most 16, oldest first. Waits for the device.

    Args:
      state: An optimizer state with one guard in it, a ``TrainState`` or an
        ``nnx.Optimizer``.
      params: The parameters that the guard was initialised with, to name leaves by
        their path; taken from ``state.params`` if it has them.

    Returns:
      A list of ``SkippedStep``.

    Raises:
      ValueError: If there is not exactly one guard in ``state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params = {"head": {"bias": jnp.zeros(1), "kernel": jnp.zeros(2)}}
      >>> grads = {"head": {"bias": jnp.ones(1), "kernel": jnp.array([1.0, jnp.inf])}}
      >>> tx = og.guard(optax.sgd(0.1))
      >>> updates, state = tx.update(grads, tx.init(params))
      >>> [skipped] = og.skipped_steps(state, params)
      >>> skipped.update, skipped.reason.name, skipped.leaf
      (0, 'NONFINITE', 'head/kernel')
      >>> skipped.leaves
      (('head/bias', 'finite'), ('head/kernel', 'Inf'))
    """
    guard_state = only_state("state", state, GuardState)
    params = arrays_of(getattr(state, "params", None) if params is None else params)
    log, total = jax.device_get((guard_state.skip_log, guard_state.num_skipped))
    if np.shape(total):
        raise ValueError(
            "`state` must be that of one run, got a population of shape "
            f"{np.shape(total)}. Take one: `jax.tree.map(lambda x: x[i], state)`."
        )
    order = np.arange(max(0, int(total) - LOG_LENGTH), int(total)) % LOG_LENGTH
    return [_skipped_step(log, int(i), params) for i in order]


def _skipped_step(log: Any, i: int, params: Any) -> SkippedStep:
    num_leaves = int(log.skipped_num_leaves[i])
    leaves = verdicts_of(log.skipped_leaves[i], num_leaves, params)
    return SkippedStep(
        update=int(log.skipped_update[i]),
        grad_norm=float(log.skipped_norm[i]),
        value=float(log.skipped_value[i]),
        reason=SkipReason(int(log.skipped_reason[i])),
        leaf=next((name for name, kind in leaves if kind != FINITE), None),
        leaves=leaves,
    )


def last_skips(state: Any, params: Any) -> list[str]:
    """The last skipped steps of each guard, and the bad parameters, in lines."""
    params = getattr(state, "params", None) if params is None else params
    guards = find_states(state, GuardState)
    # With several guards, each may see only a part of the parameters.
    known = params if len(guards) == 1 else None
    single = [guard for guard in guards if not np.shape(guard.num_skipped)]
    skipped = [step for guard in single for step in skipped_steps(guard, known)]
    lines = ["Skipped last:", *(f"  {step}" for step in skipped)]
    for multi in find_states(state, optax.MultiStepsState):
        if bad_parameters(multi.acc_grads):
            lines.append(
                "The accumulator of `optax.MultiSteps` is not finite, and stays so: no "
                "step will be taken. Use `accumulate(guard(...), every_k)` instead."
            )
    if bad := bad_parameters(params):
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        lines.append(
            f"These parameters are not finite: {', '.join(bad[:8])}{more}. No step can "
            "repair them: go back to a checkpoint."
        )
    return lines
