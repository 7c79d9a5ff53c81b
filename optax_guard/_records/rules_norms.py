"""Rules of the diagnosis about gradient norms. `diagnose` explains their numbers."""

import math
from collections import deque
from statistics import median

from optax_guard._records.facts import Facts
from optax_guard._records.findings import Evidence, FindingCode


class Vanishing:
    """Norms of the run or of some layers are tiny, and the loss hardly falls."""

    code = FindingCode.VANISHING

    def __init__(self):
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=3)
        self._of_leaves: deque[float] = deque(maxlen=8)
        self._best = self._fifth_loss = math.inf
        self._num_losses = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        if math.isfinite(f.loss):
            self._num_losses += 1
            if self._num_losses == 5:
                self._fifth_loss = f.loss
            self._best = min(self._best, f.loss)
        if math.isfinite(f.leaf_norm_ratio):
            self._of_leaves.append(f.leaf_norm_ratio)
        # A step without any gradient tells nothing of those that have one.
        if 0 < f.mean_norm < math.inf:
            if len(self._first) < 5:
                self._first.append(f.mean_norm)
            self._last.append(f.mean_norm)
        return self._of_run(f) or self._of_layers(f)

    def _of_run(self, f: Facts) -> Evidence | None:
        if f.num_norms + 1 < 8 or not self._last:
            return None
        norm, first = median(self._last), median(self._first)
        fall = _share_lost(f.first_loss, self._best)
        if norm > max(1e-3 * first, 1e-6) or not fall < 0.05:
            return None
        return {"grad_norm": norm, "first_norm": first, "loss_fall": fall}

    def _of_layers(self, f: Facts) -> Evidence | None:
        if len(self._of_leaves) < 8 or self._num_losses < 12:
            return None
        ratio, fall = median(self._of_leaves), _share_lost(self._fifth_loss, f.loss)
        if ratio > 1e-3 or not fall < 0.05:
            return None
        return {"smallest_to_largest_leaf_norm": ratio, "loss_fall": fall}


def _share_lost(before: float, after: float) -> float:
    """By which share a loss has fallen; a loss of 0 cannot fall by a share."""
    return (before - after) / (abs(before) or 1.0)


class RegimeShift:
    """The norms of 8 rows and of the next 8 have different levels."""

    code = FindingCode.REGIME_SHIFT

    def __init__(self):
        self._logs: deque[float] = deque(maxlen=16)
        self._rates: deque[float] = deque(maxlen=16)

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        if not 0 < facts.mean_norm < math.inf:
            return None
        self._logs.append(math.log(facts.mean_norm))
        self._rates.append(facts.learning_rate)
        logs = list(self._logs)
        if len(logs) < 16:
            return None
        old, new = median(logs[:8]), median(logs[8:])
        spread = median([abs(x - old) for x in logs[:8]])
        spread = max(spread, median([abs(x - new) for x in logs[8:]]))
        # A drift spreads each stretch by more than a fifth of their distance.
        if abs(new - old) < max(math.log(3), 5 * spread):
            return None
        evidence: Evidence = {"norm_before": math.exp(old), "norm_after": math.exp(new)}
        rates = self._rates[0], self._rates[-1]
        if all(map(math.isfinite, rates)):
            evidence |= {"learning_rate_before": rates[0]}
            evidence |= {"learning_rate_after": rates[1]}
        return evidence


class ZeroGradients:
    """A share of the norms is exactly zero."""

    code = FindingCode.ZERO_GRADIENTS

    def __init__(self):
        self._num_norms = self._num_zero = 0

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, as long as the rule holds."""
        self._num_norms += math.isfinite(facts.norm)
        self._num_zero += facts.norm == 0
        share = self._num_zero / max(self._num_norms, 1)
        if self._num_norms < 20 or share < 0.1:
            return None
        return {"zero_norms": self._num_zero, "share": share}
