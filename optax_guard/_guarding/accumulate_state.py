"""The state of gradient accumulation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._guarding.state import GuardState
from optax_guard._guarding.transparency import attribute_inside
from optax_guard._rows import Entry


class AccumulateState(NamedTuple):
    """State of ``accumulate``. The micro-batches that make one step are a group.

    The counts and the mean loss are attributes, and share two arrays. An attribute that
    it does not have is that of ``guard_state``, and so of the optimizer's state.

    Attributes:
      micro_counts: int32[8], the row of the six counts.
      micro_values: float32[8], the row of the mean loss, the weight and their rests.
      grad_mean: Their mean gradient, float32 (float64 for doubles, complex64 for
        complex) and shaped like the parameters; zeros after ``init``. A leaf that does
        not count by the guard's ``mask``, or is not floating, has none.
      guard_state: State of the guard that takes the steps, a ``GuardState``.
      group_seen: int32[], micro-batches of the group at hand so far; 0 after ``init``
        and after a call that closed a group.
      group_kept: int32[], how many of them were good; 0 after ``init``.
      num_groups: int32[], groups closed; 0 after ``init``.
      num_micro_batches: int32[], micro-batches in all; 0 after ``init``.
      num_dropped: int32[], how many of them were dropped; 0 after ``init``.
      drop_reason: int32[], a ``SkipReason`` for the last micro-batch: 0 if it was kept.
        Of parameters that are not finite it says ``NONFINITE``.
      value_mean: float32[], mean loss of the good micro-batches of the group at hand,
        or, if it has none yet, of the group before; 0 after ``init``.
      value_mean_rest: float32[], what rounding took from it; 0 after ``init``.
      mini_step: ``group_seen``, by its name in ``optax.MultiStepsState``.
      gradient_step: ``num_groups``, by its name there.
      count: As that of ``guard_state``.
      index: As that of ``guard_state``.
      group_weight: float32[], sum of the weights of the good micro-batches of the group
        at hand, each 1 without ``weight=``; 0 after ``init`` and after a call that
        closed a group.
      group_weight_rest: float32[], what rounding took from it; 0 after ``init``.
    """

    micro_counts: jax.Array
    micro_values: jax.Array
    grad_mean: Any
    guard_state: GuardState

    group_seen = Entry("micro_counts", 0)
    group_kept = Entry("micro_counts", 1)
    num_groups = Entry("micro_counts", 2)
    num_micro_batches = Entry("micro_counts", 3)
    num_dropped = Entry("micro_counts", 4)
    drop_reason = Entry("micro_counts", 5)
    value_mean = Entry("micro_values", 0, jnp.float32)
    value_mean_rest = Entry("micro_values", 1, jnp.float32)
    group_weight = Entry("micro_values", 2, jnp.float32)
    group_weight_rest = Entry("micro_values", 3, jnp.float32)

    @property
    def mini_step(self) -> jax.Array:
        return self.group_seen

    @property
    def gradient_step(self) -> jax.Array:
        return self.num_groups

    def __getattr__(self, name: str) -> Any:
        return attribute_inside(self, name, self.guard_state)

    # A tuple has methods of these names, so they would not be looked for inside.
    @property
    def count(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return attribute_inside(self, "count", self.guard_state)

    @property
    def index(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return attribute_inside(self, "index", self.guard_state)
