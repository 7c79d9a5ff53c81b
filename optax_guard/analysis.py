"""What a run's record says: history, table, diagnosis, replay, threshold, writers."""

from optax_guard._diagnosis import Diagnosis as Diagnosis
from optax_guard._diagnosis import diagnose as diagnose
from optax_guard._findings import Finding as Finding
from optax_guard._findings import FindingCode as FindingCode
from optax_guard._findings import Severity as Severity
from optax_guard._history import History as History
from optax_guard._history_readers import COLUMN_NAMES as COLUMN_NAMES
from optax_guard._history_table import table as table
from optax_guard._landscape import Landscape as Landscape
from optax_guard._landscape import landscape as landscape
from optax_guard._leaf_columns import leaf_columns as leaf_columns
from optax_guard._replay import Replayed as Replayed
from optax_guard._replay import replay as replay
from optax_guard._replay import replay_table as replay_table
from optax_guard._suggest import Suggestion as Suggestion
from optax_guard._suggest import suggest_max_norm as suggest_max_norm
from optax_guard._sweep import Sweep as Sweep
from optax_guard._sweep import Trial as Trial
from optax_guard._sweep import sweep_max_norm as sweep_max_norm
from optax_guard._writers import GroupedWriter as GroupedWriter
from optax_guard._writers import grouped_name as grouped_name
