"""Rules of the diagnosis about gradient norms. `diagnose` explains their numbers."""

import math
from collections import deque
from statistics import median

from optax_guard._records.facts import Facts, is_calm
from optax_guard._records.findings import Evidence, FindingCode


class Exploding:
    """Norms are far above the typical one or not finite, and the loss does not fall."""

    code = FindingCode.EXPLODING

    def __init__(self):
        self._large_in_a_row = 0
        self._first_val = math.nan

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        if math.isnan(self._first_val) and math.isfinite(f.val):
            self._first_val = f.val
        is_large = f.num_norms >= 3 and f.norm > 10 * f.typical_norm
        self._large_in_a_row = self._large_in_a_row + 1 if is_large else 0
        is_bounded = f.has_clip or f.skip_share > 0
        if is_bounded:
            # Under a clip or a guard, losses must be worse than at the start. The
            # training loss does not suffice: it contains huge batches.
            is_worse = f.loss > f.first_loss and not f.val <= self._first_val
        else:
            is_worse = not f.loss < median(f.past_losses[-5:] or [math.inf])
        grows = self._large_in_a_row >= 2 and is_worse
        # If the norm is calm, the gradient did not make the loss non-finite.
        is_lost = f.nonfinite_share > 0 or (f.is_loss_nonfinite and not is_calm(f))
        if not (grows or (is_lost and not is_bounded)):
            return None
        return {
            "grad_norm": f.norm,
            "typical_norm": f.typical_norm,
            "nonfinite_share": f.nonfinite_share,
            "loss": f.lost_loss,
        }


class Vanishing:
    """Norms are far below the first ones, or tiny, and the loss has hardly fallen."""

    code = FindingCode.VANISHING

    def __init__(self):
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=3)
        self._best = math.inf

    def update(self, facts: Facts) -> Evidence | None:
        """The evidence, if the rule holds at this row."""
        f = facts
        if math.isfinite(f.loss):
            self._best = min(self._best, f.loss)
        if not math.isfinite(f.mean_norm):
            return None
        if len(self._first) < 5:
            self._first.append(f.mean_norm)
        self._last.append(f.mean_norm)
        norm, first = median(self._last), median(self._first)
        # A first loss of 0 cannot fall by a share of itself.
        fall = (f.first_loss - self._best) / (abs(f.first_loss) or 1.0)
        is_small = norm <= 1e-3 * first or norm <= 1e-6
        if f.num_norms + 1 < 8 or not is_small or not fall < 0.05:
            return None
        return {"grad_norm": norm, "first_norm": first, "loss_fall": fall}


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
