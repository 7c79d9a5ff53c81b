"""Rules of the diagnosis about losses. `diagnose` explains their numbers."""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from statistics import linear_regression, median
from typing import NamedTuple

from optax_guard._records.facts import Facts, is_calm, mean, noise, unit_of
from optax_guard._records.findings import Evidence, FindingCode
from optax_guard.stop._rule import StopReason

# With fewer rows nearly all rules are silent.
_FEWEST = 5
# At another reason to stop, such as a target, the end is no end of patience.
_EARLY = {StopReason.RUNNING, StopReason.PATIENCE, StopReason.BUDGET}


class LossSpike:
    """The loss is far above all recent ones, and the norm is not."""

    code = FindingCode.LOSS_SPIKE_WITHOUT_NORM_SPIKE

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f, past = facts, facts.past_losses
        if not is_calm(f) or f.nonfinite_share > 0 or f.skip_share > 0:
            return None
        if len(past) < 3 or not math.isfinite(f.loss) or f.update_ratio > 0.05:
            return None
        # Near to zero, a rise by a share of the loss is none.
        rise, least = f.loss - max(past[-5:]), 0.02 * abs(f.first_loss)
        if rise <= max(least, 0.2 * abs(median(past[-5:]))):
            return None
        # Losses with heavy tails have such rises now and then.
        largest = max(b - a for a, b in itertools.pairwise(past))
        needed = max(2 * largest, 6 * noise(past), 10 * unit_of([*past, f.loss]))
        if len(past) < 8:
            # So few do not tell the noise: their range stands in for it.
            needed = max(needed, 2 * (max(past) - min(past)))
        if rise <= needed:
            return None
        return {
            "loss": f.loss,
            "loss_before": past[-1],
            "grad_norm": f.norm,
            "typical_norm": median(f.past_norms or [f.norm]),
        }


class Overfitting:
    """The validation loss rises steadily from its best while training goes on."""

    code = FindingCode.OVERFITTING

    def __init__(self):
        # Fifty values tell the noise to within a fifth.
        self._vals: deque[float] = deque(maxlen=50)
        self._trains: deque[float] = deque(maxlen=20)
        self._since: deque[tuple[float, float]] = deque(maxlen=50)
        self._num_since = 0
        self._best = self._best_mean = math.inf
        self._train_at_best = self._least_at_best = math.nan
        self._least_train = math.inf
        self._largest_rise = 0.0
        self._train_rose = False

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        if math.isfinite(f.train):
            self._trains.append(f.train)
        if not math.isfinite(f.val):
            return None
        self._follow(f.val)
        vals = list(self._vals)
        # The best of many noisy values is too good by chance: take means of three.
        lately = mean(vals[-3:])
        if len(vals) >= 3:
            self._best_mean = min(self._best_mean, lately)
        rise = lately - self._best_mean
        if self._num_since < 5 or self._train_rose:
            return None
        if rise <= 0.02 * abs(self._best_mean) or rise <= 5 * noise(vals):
            return None
        # One step that makes half of the rise is an accident, not overfitting.
        if self._largest_rise > max(0.5 * rise, 5 * noise(vals)):
            return None
        # After a change of the data the training loss jumps, and falls to where it was.
        train, trains = mean(list(self._trains)[-3:]), list(self._trains)
        if not train < self._least_at_best - 2 * noise(trains):
            return None
        if not self._is_steady():
            return None
        return {
            "best_val_loss": self._best,
            "val_loss": f.val,
            "train_loss_at_best": self._train_at_best,
            "train_loss": train,
            "evaluations_since_best": self._num_since,
        }

    def _follow(self, val: float) -> None:
        train = mean(list(self._trains)[-3:])
        self._least_train = min(self._least_train, train)
        before = self._vals[-1] if self._vals else val
        self._vals.append(val)
        if val < self._best:
            self._best, self._train_at_best, self._num_since = val, train, 0
            self._least_at_best = self._least_train
            self._since.clear()
            self._largest_rise, self._train_rose = 0.0, False
        else:
            self._num_since += 1
            self._largest_rise = max(self._largest_rise, val - before)
            rise = train - self._train_at_best
            if rise > 0.2 * abs(self._train_at_best):
                self._train_rose |= rise > 6 * noise(list(self._trains))
        self._since.append((val, train))

    def _is_steady(self) -> bool:
        vals, trains = zip(*self._since, strict=True)
        return trend(vals) > 2.5 and trend(trains) < -2.5


class Endings:
    """The last losses, for the rule about the end of a run."""

    def __init__(self):
        self._rows: deque[tuple[float, float]] = deque(maxlen=10)
        self._best = math.inf
        self._num_rows = self._since_best = 0
        self._num_all = 0
        self._may_be_early = True

    def update(self, facts: Facts) -> None:
        """Adds a row."""
        f = facts
        self._num_all += 1
        self._may_be_early = f.stop_reason in _EARLY
        if f.is_loss_nonfinite:
            # If the loss is not finite, the end of the run says nothing.
            self._rows.clear()
            self._num_rows = 0
        elif math.isfinite(f.val):
            self._rows.append((f.val, f.train))
            self._num_rows += 1
            self._since_best += 1
            if f.val < self._best:
                self._best, self._since_best = f.val, 0

    def finish(self) -> tuple[FindingCode, Evidence] | None:
        """The finding on a run that ends here, with its evidence."""
        n, since = self._num_rows, self._since_best
        is_cut = n >= 6 and 3 <= since <= 6
        if not self._may_be_early or not is_cut:
            return None
        if not self._still_falls():
            return None
        vals = [val for val, _ in self._rows]
        line = line_through(vals)
        evidence: Evidence = {
            "val_loss": vals[-1],
            "fall_an_evaluation": -line.slope,
            "noise": line.deviation,
            "evaluations_since_best": since,
        }
        return FindingCode.SHORT_PATIENCE, evidence

    def _still_falls(self) -> bool:
        vals, trains = zip(*self._rows, strict=True)
        val = line_through(vals)
        knows_train = all(map(math.isfinite, trains))
        train = line_through(trains) if knows_train else None
        # Since the best it may lie above the line, but not rise.
        if line_through(vals[-self._since_best - 1 :]).t > 3:
            return False
        if train is None:
            return val.fall > 0.02 and val.t < -6
        if train.fall > 0.02 and train.t < -3 and val.fall > 0.015 and val.t < -0.9:
            return True
        if val.fall > 0.02 and val.t < -6 and train.slope < 0:
            return True
        return train.fall > 0.05 and train.t < -4 and val.slope < 0

    def too_few(self) -> tuple[FindingCode, Evidence] | None:
        """The finding that nothing could be judged."""
        if not 0 < self._num_all < _FEWEST:
            return None
        return FindingCode.TOO_FEW_ROWS, {
            "rows": self._num_all,
            "needed": _FEWEST,
            "not_judged": "overfitting, vanishing gradients, the threshold, the end",
        }


class Line(NamedTuple):
    """A line through values: slope, standard deviation from it, slope in its errors.

    Attributes:
      slope: Rise from one value to the next.
      deviation: Standard deviation of the values from the line.
      t: The slope in units of its standard error.
      fall: How far the line falls in all, in units of the mean size of the values.
    """

    slope: float
    deviation: float
    t: float
    fall: float


def line_through(values: Sequence[float]) -> Line:
    """The line of least squares through at least 3 values."""
    # In units of the largest, so that squares are finite.
    unit = max(map(abs, values)) or 1.0
    scaled, n = [x / unit for x in values], len(values)
    slope, start = linear_regression(range(n), scaled)
    squares = [(y - start - slope * i) ** 2 for i, y in enumerate(scaled)]
    # Rounding alone deviates by this.
    deviation = max(math.sqrt(sum(squares) / (n - 2)), 1e-9, unit_of(values) / unit)
    error = deviation / math.sqrt(n * (n * n - 1) / 12)
    size = mean(map(abs, scaled)) or 1.0
    return Line(slope * unit, deviation * unit, slope / error, -slope * (n - 1) / size)


def trend(values: Sequence[float]) -> float:
    """The trend of Mann and Kendall: above 2.5, values rise beyond chance."""
    n = len(values)
    signs = sum(
        (later > before) - (later < before)
        for i, before in enumerate(values)
        for later in values[i + 1 :]
    )
    error = math.sqrt(n * (n - 1) * (2 * n + 5) / 18) or 1.0
    return (signs - math.copysign(1, signs)) / error if signs else 0.0
