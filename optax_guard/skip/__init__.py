"""Skip rules decide which finite steps to skip. A guard skips all non-finite ones."""

from optax_guard._public import publish
from optax_guard.skip._norm_above import norm_above
from optax_guard.skip._rule import Signals as Signals
from optax_guard.skip._rule import SkipReason, SkipRule, is_nonfinite
from optax_guard.skip._spike import SpikeState as SpikeState
from optax_guard.skip._spike import SpikeWindow as SpikeWindow
from optax_guard.skip._spike import spike

__all__ = [
    "SkipReason",
    "SkipRule",
    "is_nonfinite",
    "norm_above",
    "spike",
]
# Users meet these classes in states and never construct them.
_STATES = [
    "Signals",
    "SpikeState",
    "SpikeWindow",
]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
