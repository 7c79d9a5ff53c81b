"""Rules of the diagnosis about clipping. `diagnose` explains their numbers."""

import math
from collections import deque
from statistics import median

from optax_guard._records.facts import Facts, mean, noise
from optax_guard._records.findings import Evidence, FindingCode

# The evidence of OVER_CLIPPED if a tight threshold does no harm.
FALLS_WELL = "falls well"


class ClippingWorks:
    """Steps are clipped, and the loss falls."""

    code = FindingCode.CLIPPING_WORKS

    def __init__(self):
        self._shares: list[float] = [0.0, 0]
        self._largest = self._largest_after = 0.0
        self._first: list[float] = []
        self._num_losses = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, as long as the rule holds."""
        f = facts
        if math.isfinite(f.clip_share):
            self._shares[0] += f.clip_share
            self._shares[1] += 1
        if math.isfinite(f.norm) and f.has_clip:
            self._largest = max(self._largest, f.norm)
        if math.isfinite(f.clipped_norm) and f.has_clip:
            self._largest_after = max(self._largest_after, f.clipped_norm)
        if math.isfinite(f.loss):
            self._num_losses += 1
            if len(self._first) < 3:
                self._first.append(f.loss)
        # One noisy value says little: take means of three.
        losses = [*f.past_losses, f.loss]
        first, lately = mean(self._first), mean(losses[-3:])
        is_clipped = f.has_clip and self._shares[0] > 0
        if self._num_losses < 4 or not is_clipped:
            return None
        fall = first - lately
        if not fall > 0.05 * abs(first) or not fall > 4 * noise(losses):
            return None
        return {
            "clip_share": self._shares[0] / self._shares[1],
            "largest_norm": self._largest,
            "largest_after_clip": self._largest_after,
            "first_loss": f.first_loss,
            "loss": f.loss,
        }


class OverClipped:
    """Nearly all recent steps were clipped, to much less than their norm."""

    code = FindingCode.OVER_CLIPPED

    def __init__(self):
        self._window: deque[tuple[float, float]] = deque(maxlen=8)
        self._num_rows = 0
        self._share = 0.0
        self._began: int | None = None
        self._was_slow: bool | None = None
        self._times = math.nan

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, from the first row at which the rule held."""
        f = facts
        # A threshold of entries, leaves or units is below the global norm after it.
        limit = max(filter(math.isfinite, (f.threshold, f.clipped_norm)), default=None)
        is_known = math.isfinite(f.clip_share) and math.isfinite(f.mean_norm)
        if is_known and limit is not None:
            shrunk = math.log(max(f.mean_norm, 1e-30) / max(limit, 1e-30))
            self._window.append((f.clip_share, shrunk))
            self._num_rows += 1
            self._share += f.clip_share
        share = mean(share for share, _ in self._window)
        # The median ignores a row with one huge batch.
        times = math.exp(median(shrunk for _, shrunk in self._window or [(0, 0.0)]))
        # While losses fall fast over the 8 rows, a tight threshold does no harm.
        losses = [*f.past_losses, f.loss][-8:]
        is_slow = not losses[0] - losses[-1] > 0.1 * abs(losses[0])
        is_tiny = times >= 10 or (times >= 3 and is_slow)
        if len(self._window) == 8 and share >= 0.9 and is_tiny:
            if self._began is None:
                self._began = self._num_rows - 8
            self._times = times
        if self._began is None:
            return None
        if self._was_slow is None:
            self._was_slow = is_slow
        overall = self._share / self._num_rows
        phase = "part of the run"
        if overall >= 0.75:
            phase = "whole run"
        elif self._began <= 2:
            phase = "warm-up"
        return {
            "phase": phase,
            "clip_share": overall,
            "norm_over_threshold": self._times,
            "loss_then": "falls slowly" if self._was_slow else FALLS_WELL,
            "first_loss": f.first_loss,
            "loss": f.loss,
        }


class NeverClipped:
    """Many rows have a threshold, and no norm came near it."""

    code = FindingCode.NEVER_CLIPPED

    def __init__(self):
        self._num_rows = 0
        self._largest = 0.0
        self._threshold = math.inf
        self._has_clipped = False

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, as long as the rule holds."""
        f = facts
        self._has_clipped |= f.clip_share > 0
        if math.isfinite(f.norm):
            # Those of before the clip came into force, too: it was not needless then.
            self._largest = max(self._largest, f.norm)
        if math.isfinite(f.norm) and math.isfinite(f.threshold):
            self._num_rows += 1
            self._threshold = min(self._threshold, f.threshold)
        is_near = self._threshold < 2 * self._largest
        if self._num_rows < 10 or self._has_clipped or is_near:
            return None
        return {"largest_norm": self._largest, "clip_threshold": self._threshold}


class DirectionDistorted:
    """The cosine between gradients before and after clipping is small."""

    code = FindingCode.DIRECTION_DISTORTED

    def __init__(self):
        self._cosines: deque[float] = deque(maxlen=5)

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        if math.isfinite(facts.cosine):
            self._cosines.append(facts.cosine)
        if len(self._cosines) < 3 or mean(self._cosines) >= 0.9:
            return None
        cosine = mean(self._cosines)
        degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        return {"update_cosine": cosine, "turned_by_degrees": degrees}


class ClippedTooLate:
    """A clip comes into force after unstable rows without one."""

    code = FindingCode.CLIPPED_TOO_LATE

    def __init__(self):
        self._unstable_step: int | None = None
        self._norm = math.nan
        self._was_clipped = False

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        is_first = f.has_clip and not self._was_clipped
        self._was_clipped |= f.has_clip
        if is_first and self._unstable_step is not None:
            return {
                "unstable_at_step": self._unstable_step,
                "norm_then": self._norm,
                "clipped_from_step": f.step,
            }
        is_unstable = f.nonfinite_share > 0 or f.is_loss_nonfinite
        is_unstable |= f.num_norms >= 3 and f.norm > 10 * f.typical_norm
        is_skipped = f.skip_share > 0
        if is_unstable and not is_skipped and self._unstable_step is None:
            self._unstable_step, self._norm = f.step, f.norm
        return None
