"""The origins of skipped steps: which operation made them non-finite."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optax_guard._guarding.accumulate_state import AccumulateState
from optax_guard._guarding.leaf_report import as_text
from optax_guard._guarding.skip_readout import skipped_steps
from optax_guard._guarding.state import GuardState
from optax_guard._trees import find_states
from optax_guard.debug import NonfiniteOrigin, explain_step
from optax_guard.loops._carrier import on_carrier
from optax_guard.skip import SkipReason

# A search takes seconds, and a run whose steps are bad all the time has one cause.
_MOST_SEARCHES = 5
_NONFINITE = (
    SkipReason.NONFINITE,
    SkipReason.NONFINITE_VALUE,
    SkipReason.NONFINITE_PARAMS,
)


@dataclasses.dataclass
class SkipOrigins:
    """The search for the origins of skipped steps in a run.

    Attributes:
      train_step: The user's function.
      batch_at: The user's batch of a step.
      first_step: The step of the state that was given.
      last_row: The row that was examined last, or ``None``.
      found: Steps that were examined, each with its origin.
    """

    train_step: Callable[[Any, Any], Any]
    batch_at: Callable[[int], Any]
    first_step: int
    last_row: dict[str, float] | None = None
    found: list[tuple[int, NonfiniteOrigin | None]] = dataclasses.field(
        default_factory=list
    )

    def examine(
        self, row: dict[str, float], state: Any, step: int, data_offset: int
    ) -> None:
        """Searches for the origin of the first skip since the row before.

        Without a skip this reads only the row.

        Args:
          row: The last row of the history.
          state: The state at hand.
          step: Steps that it has behind it.
          data_offset: Number that is added to a step to get its batch.
        """
        before, self.last_row = self.last_row, row
        if before is row or len(self.found) == _MOST_SEARCHES:
            return
        if before is None or before["step"] >= row["step"]:  # The run has gone back.
            before = {"step": self.first_step}
        if row.get("num_skipped", 0) <= before.get("num_skipped", 0):
            return
        # The state may be an interval of steps beyond the row.
        since = range(int(before["step"]), int(row["step"]))
        skipped = [at for at in _nonfinite_steps(state, step) if at in since]
        if not skipped:  # They were finite, or came before the state that was given.
            return
        first = min(skipped)
        batch = self.batch_at(first + data_offset)
        origin = explain_step(on_carrier(self.train_step), state, batch)
        self.found.append((first, origin))
        words = f"Step {first} was skipped. {_as_text(origin)}"
        if leaves := _leaves_of(state, first - step):
            words += f"\n  Its gradients: {leaves}."
        print(words, flush=True)


def _as_text(origin: NonfiniteOrigin | None) -> str:
    if origin is None:
        return "With the parameters at hand, its batch is finite: it does not recur."
    return str(origin)


def _leaves_of(state: Any, ago: int) -> str:
    """The bad leaves of a step, which is counted back from the last; or empty."""
    for guard in find_states(state, GuardState):
        update = int(guard.clip_state.stats.num_updates) + ago
        for skipped in skipped_steps(guard, getattr(state, "params", None)):
            if skipped.update == update:
                return as_text(skipped.leaves)
    return ""


def _nonfinite_steps(state: Any, step: int) -> list[int]:
    """The last steps that guards have skipped as non-finite."""
    found = []
    for guard in find_states(state, GuardState):
        log, num_updates = jax.device_get(
            (guard.skip_log, guard.clip_state.stats.num_updates)
        )
        is_bad = np.isin(log.skipped_reason, _NONFINITE) & (log.skipped_update >= 0)
        found += (log.skipped_update[is_bad] + step - num_updates).tolist()
    return found


def check_on_skip(on_skip: Any, state: Any, batches: Any) -> None:
    """Refuses a setting that is unknown, or that the run cannot follow."""
    if on_skip is None:
        return
    if not isinstance(on_skip, str) or on_skip != "explain":
        raise ValueError(f'`on_skip` must be "explain" or `None`, got {on_skip!r}.')
    if not find_states(state, GuardState):
        raise ValueError(
            "`on_skip` needs a guard that skips steps: wrap the optimizer in `guard`."
        )
    if not callable(batches):
        raise ValueError(
            "`on_skip` draws the batch of a skipped step again: `batches` must be a "
            "function `step -> batch`."
        )
    if find_states(state, (AccumulateState, optax.MultiStepsState)):
        raise ValueError(
            "`on_skip` needs one update a step, and this optimizer accumulates. Use "
            "`optax_guard.debug.explain_step` with the batch."
        )
    if jax.process_count() > 1:
        raise ValueError(
            "`on_skip` needs a run on one process, because it reads every array."
        )
