"""The share of steps with a norm above a threshold, from rows of steps or intervals.

A row of an interval holds the largest norm of its steps and their mean, not each norm.
Of ``n`` steps with mean ``m`` and largest norm ``M``, none is above ``x`` if ``M`` is
not. Otherwise at least one is, and at most ``1 + (n m - M) / x`` are, since norms are
not negative. Between these bounds the share is estimated: the other ``n - 1`` norms are
taken as log-normal, with the mean that is left for them. Their width is that at which
the largest of ``n`` such norms is typically ``M`` (median over the rows, so that rare
huge norms do not count).
"""

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# A norm that differs from the mean by less is the rounding of float32.
_ROUNDING = 1e-5


class StepNorms(NamedTuple):
    """The norms of a run's steps, as far as its rows tell. Arrays have a row's entry.

    Attributes:
      num_steps: Finite steps of each row, at least 1.
      largest: The largest norm of these steps, finite and above 0.
      others: Mean of the other norms; 0 if there are none.
      width: Standard deviation of the logarithms of norms within a row.
    """

    num_steps: np.ndarray
    largest: np.ndarray
    others: np.ndarray
    width: float

    @property
    def is_exact(self) -> bool:
        """Whether each row is of a single step."""
        return bool(np.all(self.num_steps == 1))

    def part(self, of_rows: slice) -> "StepNorms":
        """The norms of some rows."""
        return self._replace(
            num_steps=self.num_steps[of_rows],
            largest=self.largest[of_rows],
            others=self.others[of_rows],
        )

    def share_above(self, x: float) -> float:
        """The estimated share of steps with a norm above ``x``."""
        low, high = self._numbers_above(x)
        number, is_spread = low.copy(), self.others > 0
        others = self.others[is_spread]
        if self.width > 0:
            z = np.log(x / others) / self.width + self.width / 2
            tail = np.array([math.erfc(each / math.sqrt(2)) / 2 for each in z])
        else:
            tail = 1.0 * (others > x)
        number[is_spread] += tail * (self.num_steps[is_spread] - 1)
        return float(np.clip(number, low, high).sum() / self.num_steps.sum())

    def bounds_above(self, x: float) -> tuple[float, float]:
        """The smallest and the largest share that the rows allow."""
        total = self.num_steps.sum()
        low, high = self._numbers_above(x)
        return float(low.sum() / total), float(high.sum() / total)

    def quantile(self, q: float) -> float:
        """The smallest norm that at most a share of ``1 - q`` of the steps is above."""
        # From so low that every norm is above.
        low, high = 1e-6 * float(self.largest.min()), float(self.largest.max())
        most = (1 - q) * (1 + 1e-12)
        for _ in range(100):
            middle = math.sqrt(low) * math.sqrt(high)
            if self.share_above(middle) > most:
                low = middle
            else:
                high = middle
        return high

    def _numbers_above(self, x: float) -> tuple[np.ndarray, np.ndarray]:
        is_above = 1.0 * (self.largest > x)
        num_others = self.num_steps - 1
        most = np.floor(num_others * self.others / x * (1 + _ROUNDING))
        return is_above, is_above * (1 + np.minimum(most, num_others))


def step_norms(rows: Iterable[Mapping[str, float]]) -> StepNorms:
    """The norms of the rows in which one is finite and above 0.

    A row with ``grad_norm_mean`` is of the steps since the row before, as `fit` writes
    it. Any other is of a single step.
    """
    found, last = [], 0.0
    for row in rows:
        num_steps = max(1.0, row["step"] - last) * (1 - row.get("nonfinite_rate", 0.0))
        last = row["step"]
        largest = row.get("grad_norm", math.nan)
        if not 0 < largest < math.inf:
            continue
        mean = row.get("grad_norm_mean", math.nan)
        if not 0 < mean < math.inf:
            num_steps, mean = 1.0, largest
        found.append((max(1.0, round(num_steps)), largest, min(mean, largest)))
    num_steps, largest, mean = np.array(found, float).reshape(-1, 3).T
    total = np.maximum(num_steps * mean - largest, 0.0)
    others = np.where(num_steps > 1, total / np.maximum(num_steps - 1, 1), 0.0)
    return StepNorms(num_steps, largest, others, _width(num_steps, largest, mean))


def _width(num_steps: np.ndarray, largest: np.ndarray, mean: np.ndarray) -> float:
    """The width at which the typical largest of as many log-normal norms is this."""
    is_spread = num_steps > 1
    if not is_spread.any():
        return 0.0
    excess = np.log(largest / mean)[is_spread]
    # Blom's approximation of the mean of the largest of n standard normal numbers.
    places = (num_steps - 0.375) / (num_steps + 0.25)
    typical = np.array([NormalDist().inv_cdf(p) for p in places[is_spread]])
    # log largest = log mean - width^2 / 2 + typical * width, of which the smaller root.
    root = np.sqrt(np.maximum(typical**2 - 2 * excess, 0.0))
    return float(np.median(typical - root))
