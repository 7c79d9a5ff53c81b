"""How large a difference between evaluations is more than their noise."""

import math
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
# A claim on what is no noise is wrong in at most this share of runs without it.
_ERROR = 0.05
# Fewer evaluations do not tell their noise.
_FEWEST = 8
# A change of three evaluations has a variance of 1 + 4 + 1 times theirs.
_OF_CHANGES = math.sqrt(6)
# So many quantiles stand for a distribution.
_NUM_QUANTILES = 64


def noise_of(values: np.ndarray) -> float:
    """Standard deviation of the noise of evaluations; NaN if there are fewer than 8.

    It is ``median(abs(v[i] - 2 v[i+1] + v[i+2])) / (0.6745 * sqrt(6))``, which neither
    a trend nor a jump changes much. Noise that lasts over several evaluations is not
    seen.
    """
    values = values[np.isfinite(values)].astype(np.float64)
    if len(values) < _FEWEST:
        return math.nan
    changes = np.abs(np.diff(values, n=2))
    return float(np.median(changes)) / (_NORMAL.inv_cdf(0.75) * _OF_CHANGES)


def least_difference(noise: float, num_later: int) -> float:
    """Smallest lead of the best of later evaluations that is more than noise.

    Each of them is better than the one before by ``d`` with a probability of at most
    ``1 - Phi(d / (noise * sqrt(2)))`` if there is only noise. So one of ``num_later``
    is in at most one of twenty runs for ``d = noise * sqrt(2) * z``, with ``z`` the
    normal quantile of ``1 - 0.05 / num_later``.
    """
    if num_later == 0:
        return 0.0
    return noise * math.sqrt(2) * _NORMAL.inv_cdf(1 - _ERROR / num_later)


def least_fall(noise: float, num_waited: int) -> float:
    """Smallest fall that noise hides from a rule in at most one of twenty runs.

    The value falls evenly over the ``n`` evaluations that the rule waits, by ``c *
    noise`` in all. They are compared with ``m * noise``, the best of ``n`` evaluations
    before the fall. None of them is better with a probability of the product over ``i``
    of ``1 - Phi(m + c i / n)``, averaged over ``m``; ``c`` makes it 0.05.
    """
    n = num_waited
    shares = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    best = [_NORMAL.inv_cdf(-math.expm1(math.log1p(-x) / n)) for x in shares]

    def hidden(c: float) -> float:
        places = [c * i / n for i in range(1, n + 1)]
        products = [math.prod(_NORMAL.cdf(-m - x) for x in places) for m in best]
        return sum(products) / _NUM_QUANTILES

    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if hidden(middle) > _ERROR else (low, middle)
    return noise * high
