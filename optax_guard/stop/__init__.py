"""Stop rules for `early_stopping`, combinators of them, and smoothing."""

from optax_guard._public import publish
from optax_guard.stop._averaging import RecentParamsState as RecentParamsState
from optax_guard.stop._clocks import budget, not_before
from optax_guard.stop._combinators import CooldownState as CooldownState
from optax_guard.stop._combinators import HeldForState as HeldForState
from optax_guard.stop._combinators import (
    all_of,
    any_of,
    cooldown,
    held_for,
    monitor,
)
from optax_guard.stop._lag import LagState as LagState
from optax_guard.stop._lag import OverfittingState as OverfittingState
from optax_guard.stop._lag import lag, overfitting
from optax_guard.stop._patience import PatienceState as PatienceState
from optax_guard.stop._patience import patience
from optax_guard.stop._plateau import PlateauScaleState as PlateauScaleState
from optax_guard.stop._plateau import PlateauState as PlateauState
from optax_guard.stop._plateau import apply_plateau, plateau, scale_by_plateau
from optax_guard.stop._prechelt import (
    GeneralizationLossState as GeneralizationLossState,
)
from optax_guard.stop._prechelt import ProgressQuotientState as ProgressQuotientState
from optax_guard.stop._prechelt import SuccessiveRisesState as SuccessiveRisesState
from optax_guard.stop._prechelt import (
    generalization_loss,
    progress_quotient,
    successive_rises,
)
from optax_guard.stop._presets import from_flax, from_keras, from_lightning
from optax_guard.stop._rule import Observation as Observation
from optax_guard.stop._rule import StopRule, Verdict
from optax_guard.stop._skip_storm import SkipStormState as SkipStormState
from optax_guard.stop._skip_storm import skip_storm
from optax_guard.stop._smoothing import MedianState as MedianState
from optax_guard.stop._smoothing import MovingAverageState as MovingAverageState
from optax_guard.stop._smoothing import Smoother, ema, median
from optax_guard.stop._target import divergence, target

__all__ = [
    "Smoother",
    "StopRule",
    "Verdict",
    "all_of",
    "any_of",
    "apply_plateau",
    "budget",
    "cooldown",
    "divergence",
    "ema",
    "from_flax",
    "from_keras",
    "from_lightning",
    "generalization_loss",
    "held_for",
    "lag",
    "median",
    "monitor",
    "not_before",
    "overfitting",
    "patience",
    "plateau",
    "progress_quotient",
    "scale_by_plateau",
    "skip_storm",
    "successive_rises",
    "target",
]
# Classes that are met in states and never constructed by users.
_STATES = [
    "CooldownState",
    "GeneralizationLossState",
    "HeldForState",
    "LagState",
    "MedianState",
    "MovingAverageState",
    "Observation",
    "OverfittingState",
    "PatienceState",
    "PlateauScaleState",
    "PlateauState",
    "ProgressQuotientState",
    "RecentParamsState",
    "SkipStormState",
    "SuccessiveRisesState",
]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
