"""What a run's record says: history, table, diagnosis, replay, threshold, writers."""

from optax_guard._public import publish
from optax_guard._records.diagnosis import Diagnosis, diagnose
from optax_guard._records.findings import Finding, FindingCode, Severity
from optax_guard._records.history import History
from optax_guard._records.readers import COLUMN_NAMES
from optax_guard._records.suggest import Suggestion, suggest_max_norm
from optax_guard._records.table import table
from optax_guard._records.writers import GroupedWriter, grouped_name
from optax_guard.analysis._landscape import Landscape, landscape
from optax_guard.analysis._leaf_columns import leaf_columns
from optax_guard.analysis._replay import Replayed, replay, replay_table
from optax_guard.analysis._sweep import Sweep, Trial, sweep_max_norm

__all__ = [
    "COLUMN_NAMES",
    "Diagnosis",
    "Finding",
    "FindingCode",
    "GroupedWriter",
    "History",
    "Landscape",
    "Replayed",
    "Severity",
    "Suggestion",
    "Sweep",
    "Trial",
    "diagnose",
    "grouped_name",
    "landscape",
    "leaf_columns",
    "replay",
    "replay_table",
    "suggest_max_norm",
    "sweep_max_norm",
    "table",
]


def __dir__() -> list[str]:
    return list(__all__)


publish(__name__)
