"""The guard's configuration, its state and its log."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_whole
from optax_guard._clipping.parts import ClipParts, Measurement
from optax_guard._guarding.masking import Mask
from optax_guard._guarding.transparency import attribute_inside
from optax_guard._guarding.update_bound import first_bound
from optax_guard._models import trained
from optax_guard._norms.marks import NUM_WORDS, first_leaf
from optax_guard._norms.statistics import as_float32
from optax_guard._rows import Entry, empty_rows, replace_entries, rows_of
from optax_guard.skip import SkipReason, SkipRule

LOG_LENGTH = 16


class SkipLog(NamedTuple):
    """The last 16 skipped steps, in a ring: entry ``i`` is skipped step ``i mod 16``.

    The vectors are attributes, and share two arrays with a row for each step; a third
    has a bit for each leaf.

    Attributes:
      skipped_counts: int32[16, 8], the rows of the whole numbers.
      skipped_values: float32[16, 8], the rows of norm and loss. Where one is not
        finite, it holds the last one in this row that was, and ``skipped_counts`` says
        so.
      skipped_leaves: int32[16, 8], the leaves of its gradients that are not finite: bit
        ``i % 32`` of word ``i // 32`` is set if leaf ``i`` holds a NaN; of word ``4 + i
        // 32``, if it holds an infinity or its norm overflows; of both, if it is not
        known which. Of more than 128 leaves, a run of neighbours shares a bit: 32, or
        1/128 of all. Zeros after ``init``.
      skipped_update: int32[16], index of the step among all that the guard has seen,
        from 0; -1 after ``init``.
      skipped_norm: float32[16], its global norm before clipping; 0 after ``init``.
      skipped_value: float32[16], its loss, NaN if ``value=`` was not given; 0 after
        ``init``.
      skipped_reason: int32[16], a ``SkipReason``; 0 after ``init``.
      skipped_leaf: int32[16], index among the leaves of its gradients of the first
        whose norm is not finite, or of the first of its run; -1 if there was none, and
        after ``init``.
      skipped_num_leaves: int32[16], how many leaves its gradients had; 0 after
        ``init``.
    """

    skipped_counts: jax.Array
    skipped_values: jax.Array
    skipped_leaves: jax.Array

    skipped_update = Entry("skipped_counts", 0)
    skipped_reason = Entry("skipped_counts", 1)
    skipped_num_leaves = Entry("skipped_counts", 2)
    skipped_norm = Entry("skipped_values", 0, jnp.float32, codes="skipped_counts")
    skipped_value = Entry("skipped_values", 1, jnp.float32, codes="skipped_counts")

    @property
    def skipped_leaf(self) -> jax.Array:
        if isinstance(self.skipped_leaves, jax.ShapeDtypeStruct):
            return self.skipped_update  # It has the same shape and dtype.
        return first_leaf(self.skipped_leaves, self.skipped_num_leaves)


class GuardState(NamedTuple):
    """State of ``guard``. Its seven scalars are attributes, and share one array.

    An attribute that it does not have is that of ``wrapped_state``, so loops that read
    ``opt_state.hyperparams`` or ``opt_state.count`` go on. Such a ``count`` stays as it
    is on a skipped step; ``num_updates`` counts on.

    Attributes:
      skip_counts: int32[8], the row of the scalars.
      skip_log: The last 16 skipped steps, a ``SkipLog``.
      clip_state: State of the clip, with the statistics of the norm.
      rule_states: States of the skip rules, a tuple.
      wrapped_state: State of the optimizer inside, as of the last step taken.
      bound_state: State of the bound on updates, an ``UpdateBoundState``; () without
        ``max_update``.
      num_skipped: int32[], steps skipped; 0 after ``init``.
      skip_streak: int32[], steps skipped in a row up to the last; 0 after ``init``.
      skip_reason: int32[], a ``SkipReason`` for the last step: 0 if it was taken.
      rule_streak: int32[], how many of these the skip rules have skipped; 0 after
        ``init``.
      guard_exhausted: bool[], whether at least ``max_consecutive_skips`` of these were
        not finite; False after ``init`` and again after a step that is taken.
      num_vanished: int32[], steps taken in which the clip multiplied the gradients by
        less than a quarter of the parameters' machine epsilon (bfloat16: 1/512). The
        epsilon is that of the coarsest dtype that counts; without parameters, that of
        the gradients. If the optimizer scales its updates with the gradients, as SGD
        does, a parameter of that dtype then keeps its bits, unless its update without
        the clip would have been larger than itself. 0 after ``init``.
      num_partial: int32[], steps taken in which some entries kept their old values,
        because the new ones were not finite. It is read from the smallest leaves, at
        most 1/1024 of all entries (at least a part of one leaf). 0 after ``init``.
      num_updates: int32[], steps seen, skipped ones included; 0 after ``init``.
      count: As that of ``wrapped_state``, if it has one.
      index: As that of ``wrapped_state``, if it has one.
    """

    skip_counts: jax.Array
    skip_log: SkipLog
    clip_state: Any
    rule_states: tuple[Any, ...]
    wrapped_state: Any
    bound_state: Any = ()

    num_skipped = Entry("skip_counts", 0)
    skip_streak = Entry("skip_counts", 1)
    skip_reason = Entry("skip_counts", 2)
    guard_exhausted = Entry("skip_counts", 3, is_flag=True)
    num_vanished = Entry("skip_counts", 4)
    num_partial = Entry("skip_counts", 5)
    rule_streak = Entry("skip_counts", 6)

    @property
    def num_updates(self) -> jax.Array:
        return self.clip_state.stats.num_updates

    def __getattr__(self, name: str) -> Any:
        return attribute_inside(self, name, self.wrapped_state)

    # A tuple has methods of these names, so they would not be looked for inside.
    @property
    def count(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return attribute_inside(self, "count", self.wrapped_state)

    @property
    def index(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return attribute_inside(self, "index", self.wrapped_state)


class GuardConfig(NamedTuple):
    """The arguments of ``guard``, checked.

    Attributes:
      inner: The optimizer.
      clip: The parts of the clip, for the leaves that count.
      is_clipping: Whether a clip was given; otherwise ``clip`` only measures.
      rules: The skip rules.
      mask: ``True``, or the leaves that count.
      bound: The parts of the clip that bounds updates, or ``None``.
      max_consecutive_skips: Non-finite steps, without one taken, that are an alarm.
      use_cond: Whether to branch on every platform.
    """

    inner: optax.GradientTransformationExtraArgs
    clip: ClipParts
    is_clipping: bool
    rules: tuple[SkipRule, ...]
    mask: Mask
    bound: ClipParts | None
    max_consecutive_skips: ArrayLike
    use_cond: bool


def start_rules(rules: tuple[SkipRule, ...]) -> tuple[Any, ...]:
    """The states of the rules after ``init``."""
    return tuple(rule.start() for rule in rules)


def first_state(
    config: GuardConfig, params: optax.Params, inner_state: optax.OptState
) -> GuardState:
    """The state after ``init``, around the state of the optimizer."""
    return GuardState(
        **empty_rows(GuardState),
        skip_log=empty_log(),
        clip_state=config.clip.init(trained(params)),
        rule_states=start_rules(config.rules),
        wrapped_state=inner_state,
        bound_state=()
        if config.bound is None
        else first_bound(config.bound, params, inner_state),
    )


def empty_log() -> SkipLog:
    """The log after ``init``."""
    return replace_entries(
        SkipLog(
            **empty_rows(SkipLog, (LOG_LENGTH,)),
            skipped_leaves=jnp.zeros((LOG_LENGTH, 2 * NUM_WORDS), jnp.int32),
        ),
        skipped_update=jnp.full(LOG_LENGTH, -1),
    )


def logged(
    log: SkipLog,
    measured: Measurement,
    value: jax.Array | None,
    reason: jax.Array,
    *,
    update: jax.Array,
    num_skipped: jax.Array,
    num_leaves: int,
) -> SkipLog:
    """The log with this step in it, if there is a reason to skip it.

    Args:
      log: The log before.
      measured: The measurement of the clip.
      value: The loss, if it was given.
      reason: int32[], 0 if the step is taken.
      update: int32[], index of the step.
      num_skipped: int32[], steps skipped before it.
      num_leaves: How many leaves the gradients have.
    """
    check_whole("skip_log", len(log.skipped_counts), LOG_LENGTH)
    value = jnp.array(jnp.nan) if value is None else value
    numbers = {
        "skipped_update": update,
        "skipped_norm": as_float32(measured.norm.value),
        "skipped_value": as_float32(value),
        "skipped_reason": reason,
        "skipped_num_leaves": num_leaves,
    }
    slot = num_skipped % LOG_LENGTH
    before = jax.tree.map(lambda x: x[slot], log)
    marks = measured.norm.marks.reshape(-1)
    new = SkipLog(**rows_of(SkipLog, numbers, before), skipped_leaves=marks)
    slots = jnp.arange(LOG_LENGTH, dtype=jnp.int32)[:, None]
    is_here = (slots == slot) & (reason != SkipReason.NONE)
    return jax.tree.map(lambda new, old: jnp.where(is_here, new[None], old), new, log)
