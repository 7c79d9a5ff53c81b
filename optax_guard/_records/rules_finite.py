"""Rules of the diagnosis about numbers that are not finite, and skipped steps."""

import math
from collections import deque

from optax_guard._records.facts import Facts, is_calm
from optax_guard._records.findings import Evidence, FindingCode


class NonfiniteBatch:
    """Steps that are not finite come out of calm norms, and nothing skips them."""

    code = FindingCode.NONFINITE_BATCH

    def __init__(self):
        self._was_calm = True
        self._was_lost = False

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        was_calm, was_lost = self._was_calm, self._was_lost
        self._was_lost = is_lost(f)
        is_risen = have_risen(f)
        self._was_calm = not is_risen
        # Finite norms of this row tell more than those of the row before.
        comes_from_calm = not is_risen and (was_calm or is_calm(f))
        if not self._was_lost or was_lost or not comes_from_calm:
            return None
        # In the first row nothing tells what norms were before.
        if f.num_norms == 0 and not f.past_losses:
            return None
        return {
            "nonfinite_steps": max(1, round(f.nonfinite_share * f.num_steps)),
            "of_steps": f.num_steps,
            "loss": f.lost_loss,
            "typical_norm": f.typical_norm,
        }


class NonfiniteParameters:
    """Nothing is finite any more, for 3 rows or more."""

    code = FindingCode.NONFINITE_PARAMETERS

    def __init__(self):
        self._rows_in_a_row = self._first_step = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, as long as the rule holds."""
        f = facts
        has_loss = not math.isnan(f.train) or not math.isnan(f.val)
        is_finite = math.isfinite(f.train) or math.isfinite(f.val)
        is_finite |= math.isfinite(f.norm) or f.skip_share > 0
        is_lost = f.is_loss_nonfinite or f.nonfinite_share == 1
        if is_finite:
            self._rows_in_a_row = 0
        elif is_lost or has_loss:
            if self._rows_in_a_row == 0:
                self._first_step = f.step
            self._rows_in_a_row += 1
        if self._rows_in_a_row < 3:
            return None
        return {"since_step": self._first_step, "rows": self._rows_in_a_row}


class NonfiniteLoss:
    """A loss is not finite although a clip is in force."""

    code = FindingCode.NONFINITE_LOSS_DESPITE_CLIPPING

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        if not (f.has_clip and f.is_loss_nonfinite):
            return None
        return {
            "loss": f.lost_loss,
            "grad_norm": f.norm,
            "clipped_norm": f.clipped_norm,
            "clip_threshold": f.threshold,
        }


class SkipStorm:
    """A large share of the recent steps was skipped."""

    code = FindingCode.SKIP_STORM

    def __init__(self):
        self._rows: deque[tuple[int, float]] = deque(maxlen=5)

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        if math.isnan(facts.skip_share):
            return None
        skipped = facts.skip_share * facts.num_steps
        self._rows.append((facts.num_steps, skipped))
        num_steps = sum(steps for steps, _ in self._rows)
        num_skipped = sum(skips for _, skips in self._rows)
        if num_skipped < 4.5 or num_skipped < 0.25 * num_steps:
            return None
        return {
            "skipped": round(num_skipped),
            "steps": num_steps,
            "skip_share": num_skipped / num_steps,
        }


class StepsSkipped:
    """The guard has skipped steps."""

    code = FindingCode.STEPS_SKIPPED

    def __init__(self):
        self._skipped = self._nonfinite = 0.0
        self._num_steps = self._first_step = self._last_step = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, as long as the rule holds."""
        f = facts
        self._num_steps += f.num_steps
        if f.skip_share > 0:
            self._skipped += f.skip_share * f.num_steps
            self._nonfinite += min(f.skip_share, f.nonfinite_share) * f.num_steps
            self._first_step = self._first_step or f.step
            self._last_step = f.step
        if self._skipped < 0.5:
            return None
        return {
            "skipped": round(self._skipped),
            "not_finite": round(self._nonfinite),
            "of_steps": self._num_steps,
            "first_in_row_of_step": self._first_step,
            "last_in_row_of_step": self._last_step,
        }


def is_lost(facts: Facts) -> bool:
    """Whether a gradient or a loss of this row is not finite, and was not skipped."""
    f = facts
    return (f.nonfinite_share > 0 and not f.skip_share > 0) or f.is_loss_nonfinite


def have_risen(facts: Facts) -> bool:
    """Whether the largest finite norm of the row is far above the typical one."""
    f = facts
    if f.num_norms == 0 and is_lost(f):
        # Nothing was before, and later steps of this row were not finite.
        return f.norm > 10 * f.mean_norm or f.train > 3 * f.start_loss
    return math.isfinite(f.norm) and f.norm > 10 * f.typical_norm
