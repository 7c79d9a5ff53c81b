"""What a run's record says: history, table, diagnosis, and writers for it."""

from optax_guard._diagnosis import Diagnosis as Diagnosis
from optax_guard._diagnosis import diagnose as diagnose
from optax_guard._findings import Finding as Finding
from optax_guard._findings import FindingCode as FindingCode
from optax_guard._findings import Severity as Severity
from optax_guard._history import History as History
from optax_guard._history_readers import COLUMN_NAMES as COLUMN_NAMES
from optax_guard._history_table import table as table
from optax_guard._writers import GroupedWriter as GroupedWriter
from optax_guard._writers import grouped_name as grouped_name
