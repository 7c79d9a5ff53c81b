"""Thresholds decide, from a norm and its past, when to clip and what to clip to."""

from optax_guard._public import publish
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._mean import RelativeToMeanState as RelativeToMeanState
from optax_guard.threshold._mean import relative_to_mean
from optax_guard.threshold._params import (
    RelativeToParamsState as RelativeToParamsState,
)
from optax_guard.threshold._params import relative_to_params
from optax_guard.threshold._quantile import QuantileState as QuantileState
from optax_guard.threshold._quantile import quantile
from optax_guard.threshold._zscore import ZScoreState as ZScoreState
from optax_guard.threshold._zscore import zscore

__all__ = [
    "Threshold",
    "quantile",
    "relative_to_mean",
    "relative_to_params",
    "zscore",
]
# Users meet these classes in states and never construct them.
_STATES = [
    "QuantileState",
    "RelativeToMeanState",
    "RelativeToParamsState",
    "ZScoreState",
]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
