"""The guard's record of the last steps that it withheld."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._clipping import Measurement, select
from optax_guard._statistics import as_float32
from optax_guard.skip import SkipReason

NUM_REJECTIONS = 16


class RejectionLog(NamedTuple):
    """The last 16 withheld steps, in a ring: entry ``i`` is rejection ``i mod 16``.

    Attributes:
      rejected_update: int32[16], index of the step among all that the guard has seen,
        from 0; -1 after ``init``.
      rejected_norm: float32[16], its global norm before clipping; 0 after ``init``.
      rejected_value: float32[16], its loss, NaN if ``value=`` was not given; 0 after
        ``init``.
      rejected_reason: int32[16], a ``SkipReason``; 0 after ``init``.
      rejected_leaf: int32[16], index among the leaves of its gradients of the first
        whose norm is not finite, -1 if there was none; -1 after ``init``.
      rejected_num_leaves: int32[16], how many leaves its gradients had; 0 after
        ``init``.
    """

    rejected_update: jax.Array
    rejected_norm: jax.Array
    rejected_value: jax.Array
    rejected_reason: jax.Array
    rejected_leaf: jax.Array
    rejected_num_leaves: jax.Array


def empty_log() -> RejectionLog:
    """The log after ``init``."""
    return RejectionLog(
        rejected_update=jnp.full(NUM_REJECTIONS, -1, jnp.int32),
        rejected_norm=jnp.zeros(NUM_REJECTIONS, jnp.float32),
        rejected_value=jnp.zeros(NUM_REJECTIONS, jnp.float32),
        rejected_reason=jnp.zeros(NUM_REJECTIONS, jnp.int32),
        rejected_leaf=jnp.full(NUM_REJECTIONS, -1, jnp.int32),
        rejected_num_leaves=jnp.zeros(NUM_REJECTIONS, jnp.int32),
    )


def logged(
    log: RejectionLog,
    measured: Measurement,
    value: jax.Array | None,
    reason: jax.Array,
    *,
    update: jax.Array,
    num_skipped: jax.Array,
    num_leaves: int,
) -> RejectionLog:
    """The log with this step in it, if there is a reason to withhold it.

    Args:
      log: The log before.
      measured: What the clip measured.
      value: The loss, if it was given.
      reason: int32[], 0 if the step is taken.
      update: int32[], index of the step.
      num_skipped: int32[], steps withheld before it.
      num_leaves: How many leaves the gradients have.
    """
    entry = RejectionLog(
        rejected_update=update,
        rejected_norm=as_float32(measured.norm.value),
        rejected_value=as_float32(jnp.array(jnp.nan) if value is None else value),
        rejected_reason=reason,
        rejected_leaf=measured.norm.bad_leaf,
        rejected_num_leaves=jnp.int32(num_leaves),
    )
    slot = jnp.arange(NUM_REJECTIONS, dtype=jnp.int32) == num_skipped % NUM_REJECTIONS
    return select(slot & (reason != SkipReason.NONE), entry, log)
