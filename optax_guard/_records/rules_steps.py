"""Rules of the diagnosis about runs that a too large step ruins."""

import math
from collections import deque
from statistics import median

from optax_guard._records.facts import Facts, is_calm
from optax_guard._records.findings import Evidence, FindingCode
from optax_guard._records.rules_finite import have_risen, is_lost

Ruling = tuple[FindingCode, Evidence]


class Unstable:
    """Steps are too large: EXPLODING if norms have risen, else RATE_TOO_HIGH."""

    def __init__(self):
        self._large_in_a_row = 0
        self._risen_rows = 0
        self._largest = math.nan
        self._first_val = math.nan
        self._past_ratios: deque[float] = deque(maxlen=8)
        self._largest_ratio = math.nan
        self._vals: deque[float] = deque(maxlen=3)
        self._burst: tuple[Evidence, float] | None = None

    def update(self, facts: Facts) -> Ruling | None:
        """The finding, if the rule holds at this row."""
        f = facts
        if math.isnan(self._first_val) and math.isfinite(f.val):
            self._first_val = f.val
        is_risen = f.num_norms >= 3 and have_risen(f)
        self._large_in_a_row = self._large_in_a_row + 1 if is_risen else 0
        # Norms that rose in the last rows tell of this one, too, unless they were calm
        # since: then a single batch was huge.
        if have_risen(f):
            self._risen_rows = 10
        else:
            self._risen_rows = 0 if is_calm(f) else self._risen_rows - 1
        evidence: Evidence | None = self._from_norms(f) or self._from_losses(f)
        if evidence is None:
            return None
        if self._risen_rows > 0:
            return FindingCode.EXPLODING, {
                "grad_norm": f.norm,
                "typical_norm": f.typical_norm,
                **evidence,
            }
        return FindingCode.RATE_TOO_HIGH, evidence

    def _from_norms(self, f: Facts) -> Evidence | None:
        is_bounded = f.has_clip or f.skip_share > 0
        if is_bounded:
            # Under a clip or a guard, losses must be worse than at the start. The
            # training loss does not suffice: it contains huge batches.
            is_worse = f.loss > f.first_loss and not f.val <= self._first_val
        else:
            is_worse = not f.loss < median(f.past_losses[-5:] or [math.inf])
        if self._large_in_a_row >= 2 and is_worse:
            return {"loss": f.lost_loss}
        if is_lost(f) and self._risen_rows > 0:
            return {"nonfinite_share": f.nonfinite_share, "loss": f.lost_loss}
        return None

    def _from_losses(self, f: Facts) -> Evidence | None:
        before = median(self._past_ratios or [math.nan])
        if math.isfinite(f.update_ratio):
            self._past_ratios.append(f.update_ratio)
            self._largest_ratio = max(f.update_ratio, self._largest_ratio)
        if f.is_loss_nonfinite:
            return None
        if math.isfinite(f.val):
            self._vals.append(f.val)
        start, recent = f.start_loss, list(self._past_ratios)[-3:]
        ratio = median(recent or [0.0])
        # Healthy runs had at most 0.017, in their first row.
        is_large = f.update_ratio > 0.03
        evidence: Evidence = {
            "update_ratio": f.update_ratio,
            "ratio_before": before,
            "loss": f.loss,
            "start_loss": start,
        }
        if burst := self._ended_burst(f, evidence if is_large else None):
            return burst
        is_first = (
            not f.past_losses and f.train > 1.05 * start and not f.val <= 1.05 * start
        )
        is_jump = f.update_ratio > 10 * before and f.loss > max(
            f.past_losses[-5:], default=math.inf
        )
        # Few parameters may take large steps to their optimum.
        is_falling = f.loss < median(f.past_losses[-3:] or [-math.inf])
        is_lasting = len(recent) >= 2 and (
            (ratio > 0.1 and not is_falling) or (ratio > 0.05 and f.loss > 0.95 * start)
        )
        if is_lasting or (is_large and (is_first or is_jump)):
            return evidence
        # Where no step was large, noise or skipped steps raise the loss.
        if self._largest_ratio <= 0.03:
            return None
        if len(self._vals) == 3 and min(self._vals) > start:
            return {"val_loss": f.val, "start_loss": start}
        return None

    def _ended_burst(self, f: Facts, evidence: Evidence | None) -> Evidence | None:
        """The evidence of a first row whose training loss was far above the start.

        That loss may hold more than the one before training does. The second row tells:
        there it must be about the validation loss with which that row begins.
        """
        burst, self._burst = self._burst, None
        if burst is not None and 0.5 < f.train / burst[1] < 2:
            return burst[0]
        if (
            evidence
            and not f.past_losses
            and f.val > 0
            and f.train > 1.05 * f.start_loss
        ):
            self._burst = evidence, f.val
        return None
