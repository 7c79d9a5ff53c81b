"""Rules of the diagnosis about losses. `diagnose` explains their numbers."""

import math
from collections import deque
from statistics import linear_regression, median

from optax_guard._records.facts import RECENT, Facts, is_calm, mean, noise
from optax_guard._records.findings import Evidence, FindingCode


class LossSpike:
    """The loss is far above all recent ones, and the norm is not."""

    code = FindingCode.LOSS_SPIKE_WITHOUT_NORM_SPIKE

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f, past = facts, facts.past_losses
        if not is_calm(f) or f.nonfinite_share > 0 or f.skip_share > 0:
            return None
        is_spike = f.is_loss_nonfinite and not f.has_clip
        if len(past) >= 3 and math.isfinite(f.loss):
            needed = max(6 * noise(past), 0.2 * abs(median(past[-5:])))
            if len(past) < 8:
                # So few do not tell the noise: their range stands in for it.
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
    """The validation loss stays above its best while the training loss falls."""

    code = FindingCode.OVERFITTING

    def __init__(self):
        # Fifty values tell the noise to within a fifth.
        self._vals: deque[float] = deque(maxlen=50)
        self._trains: deque[float] = deque(maxlen=3)
        self._best = self._best_mean = math.inf
        self._train_at_best = math.nan
        self._since_best = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
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
        # The best of many noisy values is too good by chance: take means of three.
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
    """The last validation losses, for the two rules about the end of a run."""

    def __init__(self):
        self._vals: deque[float] = deque(maxlen=RECENT)
        self._best = math.inf
        self._since_best = 0

    def update(self, facts: Facts) -> None:
        """Adds a row."""
        if math.isfinite(facts.val):
            self._vals.append(facts.val)
            self._since_best += 1
            if facts.val < self._best:
                self._best, self._since_best = facts.val, 0
        elif facts.is_loss_nonfinite:
            # If the loss is not finite, the end of the run says nothing.
            self._vals.clear()

    def finish(self) -> tuple[FindingCode, Evidence] | None:
        """The finding on a run that ends here, with its evidence."""
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
    """The slope of a line through the values, and the standard deviation from it."""
    slope, start = linear_regression(range(len(values)), values)
    squares = [(y - start - slope * i) ** 2 for i, y in enumerate(values)]
    return slope, math.sqrt(sum(squares) / (len(values) - 2))
