"""Studies of a run: history, table, diagnosis, replay, threshold, landscape."""

from optax_guard._public import publish
from optax_guard._records.diagnosis import Diagnosis, diagnose
from optax_guard._records.findings import Finding as Finding
from optax_guard._records.findings import FindingCode as FindingCode
from optax_guard._records.findings import Severity as Severity
from optax_guard._records.frozen_moments import FrozenMoment as FrozenMoment
from optax_guard._records.frozen_moments import frozen_moments
from optax_guard._records.history import History
from optax_guard._records.suggest import Suggestion as Suggestion
from optax_guard._records.suggest import suggest_max_norm
from optax_guard.analysis._landscape import Landscape as Landscape
from optax_guard.analysis._landscape import landscape
from optax_guard.analysis._leaf_columns import leaf_columns
from optax_guard.analysis._replay import Replayed as Replayed
from optax_guard.analysis._replay import replay
from optax_guard.analysis._sweep import Sweep as Sweep
from optax_guard.analysis._sweep import Trial as Trial
from optax_guard.analysis._sweep import sweep_max_norm
from optax_guard.analysis._table import table

__all__ = [
    "Diagnosis",
    "History",
    "diagnose",
    "frozen_moments",
    "landscape",
    "leaf_columns",
    "replay",
    "suggest_max_norm",
    "sweep_max_norm",
    "table",
]
# Results, which users read and never construct.
_STATES = [
    "Finding",
    "FindingCode",
    "FrozenMoment",
    "Landscape",
    "Replayed",
    "Severity",
    "Suggestion",
    "Sweep",
    "Trial",
]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
