"""A rule on the guard: too many skipped steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_count
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import states_with
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_int,
    verdict_for,
)


class SkipStormState(NamedTuple):
    """State of `skip_storm`.

    Attributes:
      seen_skipped: Steps skipped up to the last evaluation, int32, shape (); -1
        before the first.
    """

    seen_skipped: jax.Array


@answers_wrong_calls
def skip_storm(n: ArrayLike) -> StopRule:
    """Stops when the guard skips many steps instead of training.

    Fires when the guard is exhausted, when its present streak of skipped steps is
    at least ``n``, or when at least ``n`` were skipped since the last evaluation.
    The counts of several guards in one state are added. `update` needs ``opt_state=``.

    Args:
      n: Skipped steps that are too many; at least 1, may be traced.

    Returns:
      A rule whose state is a `SkipStormState`.

    Raises:
      ValueError: If ``n`` is concrete and below 1, or, at `update`, if
        ``opt_state`` holds no guard.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx, params = og.guard(optax.sgd(0.1)), jnp.ones(1)
      >>> _, opt_state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
      >>> stopper = og.early_stopping(og.stop.skip_storm(1))
      >>> state = stopper.update(0.5, stopper.init(), opt_state=opt_state)
      >>> bool(state.should_stop)
      True
    """
    check_count("n", n)

    def init() -> SkipStormState:
        return SkipStormState(jnp.asarray(-1, jnp.int32))

    def update(
        observation: Observation, state: SkipStormState
    ) -> tuple[Verdict, SkipStormState]:
        guards = _guards(observation.opt_state)
        skipped = jnp.asarray(sum(guard.num_skipped for guard in guards), jnp.int32)
        # Steps that were skipped before a `reset` do not count again.
        is_first = state.seen_skipped < 0
        fired = ~is_first & (skipped - state.seen_skipped >= as_int(n))
        for guard in guards:
            fired |= (guard.skip_streak >= as_int(n)) | guard.guard_exhausted
        return verdict_for(fired, StopReason.SKIP_STORM), SkipStormState(skipped)

    return StopRule(init, update, frozenset({"opt_state"}))


def _guards(opt_state: Any) -> list[Any]:
    # By name: the guard belongs to a room that builds on this one.
    found = states_with(opt_state, "skip_streak")
    if not found:
        raise ValueError(
            "`opt_state` holds no guard (no `skip_streak`), which `skip_storm` reads. "
            "Wrap the optimizer in `guard` and pass the state it returns."
        )
    return found
