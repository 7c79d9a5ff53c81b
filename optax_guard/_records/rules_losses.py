"""Rules of the diagnosis about losses. Their numbers are told in `diagnose`."""

import math
from collections import deque
from statistics import linear_regression, median
from typing import Any

from optax_guard._records.facts import RECENT, Facts, is_calm, mean, noise
from optax_guard._records.findings import FindingCode

Evidence = dict[str, Any]


class LossSpike:
    """A loss far above all recent ones, at a norm that is not."""

    code = FindingCode.LOSS_SPIKE_WITHOUT_NORM_SPIKE

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if it holds at this row."""
        f, past = facts, facts.past_losses
        if not is_calm(f) or f.nonfinite_share > 0 or f.skip_share > 0:
            return None
        is_spike = f.is_loss_nonfinite and not f.has_clip
        if len(past) >= 3 and math.isfinite(f.loss):
            needed = max(6 * noise(past), 0.2 * abs(median(past[-5:])))
            if len(past) < 8:
                # Of so few the noise is not known: measured by their range instead.
                needed = max(needed, 2 * (max(past) - min(past)))
            is_spike |= f.loss - max(past[-5:]) > needed
        if not is_spike:
            return None
        return {
            "loss": f.lost_loss,
            "loss_before": past[-1] if past else math.nan,
            "grad_norm": f.norm,
            "typical_norm": median(f.past_norms or [f.norm]),
        }


class Overfitting:
    """Validation above its best for long, while training goes on to fall."""

    code = FindingCode.OVERFITTING

    def __init__(self):
        # So many that the noise is known to a fifth.
        self._vals: deque[float] = deque(maxlen=50)
        self._trains: deque[float] = deque(maxlen=3)
        self._best = self._best_mean = math.inf
        self._train_at_best = math.nan
        self._since_best = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if it holds at this row."""
        f = facts
        if math.isfinite(f.train):
            self._trains.append(f.train)
        if not math.isfinite(f.val):
            return None
        self._vals.append(f.val)
        self._since_best += 1
        train = mean(self._trains)
        if f.val < self._best:
            self._best, self._train_at_best, self._since_best = f.val, train, 0
        vals = list(self._vals)
        # Means of three: of many noisy values the best is far too good.
        lately = mean(vals[-3:])
        if len(vals) >= 3:
            self._best_mean = min(self._best_mean, lately)
        rise = max(0.02 * abs(self._best_mean), 5 * noise(vals))
        fell = train < self._train_at_best - 0.01 * abs(self._train_at_best)
        if self._since_best < 5 or lately - self._best_mean <= rise or not fell:
            return None
        return {
            "best_val_loss": self._best,
            "val_loss": f.val,
            "train_loss_at_best": self._train_at_best,
            "train_loss": train,
            "evaluations_since_best": self._since_best,
        }


class Endings:
    """The validation losses at the end of a run, for the two rules about its end."""

    def __init__(self):
        self._vals: deque[float] = deque(maxlen=RECENT)
        self._best = math.inf
        self._since_best = 0

    def update(self, facts: Facts) -> None:
        """Takes in a row."""
        if math.isfinite(facts.val):
            self._vals.append(facts.val)
            self._since_best += 1
            if facts.val < self._best:
                self._best, self._since_best = facts.val, 0
        elif facts.is_loss_nonfinite:
            # Of a run that was lost, how it ended says nothing.
            self._vals.clear()

    def finish(self) -> tuple[FindingCode, Evidence] | None:
        """What holds of a run that ended here."""
        vals = list(self._vals)
        if len(vals) < 10:
            return None
        if self._since_best <= 1:
            slope, deviation = _fit_line(vals[-10:])
            fall = -9 * slope
            if fall <= max(0.05 * abs(mean(vals[-10:])), 5 * deviation):
                return None
            return FindingCode.STOPPED_TOO_EARLY, {
                "val_loss": vals[-1],
                "fall_in_last_10": fall,
                "noise": deviation,
            }
        (slope, deviation), (late_slope, _) = map(_fit_line, (vals, vals[-10:]))
        n = len(vals)
        # Standard error of the slope over 0, 1, ..., n - 1.
        error = deviation / math.sqrt(n * (n * n - 1) / 12)
        is_falling = slope < -4 * error and late_slope < 0.5 * slope
        is_falling &= -slope * n > 0.03 * abs(mean(vals))
        if not is_falling or deviation <= -slope * self._since_best:
            return None
        return FindingCode.SHORT_PATIENCE, {
            "evaluations_since_best": self._since_best,
            "noise": deviation,
            "fall_an_evaluation": -slope,
        }


def _fit_line(values: list[float]) -> tuple[float, float]:
    """Slope a value, and the standard deviation around the line."""
    slope, start = linear_regression(range(len(values)), values)
    squares = [(y - start - slope * i) ** 2 for i, y in enumerate(values)]
    return slope, math.sqrt(sum(squares) / (len(values) - 2))
