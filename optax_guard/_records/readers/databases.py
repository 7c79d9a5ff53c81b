"""The SQLite databases of MLflow and of trackio. Nothing is written to them."""

import json
import math
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from optax_guard._records.readers.metric_series import rows_of_series
from optax_guard._records.readers.raw import RawLog, RawRow

_TRACKIO = "SELECT run_name, step, metrics FROM metrics ORDER BY id"
_MLFLOW_RUNS = (
    "SELECT run_uuid, name FROM runs WHERE lifecycle_stage IS NOT 'deleted' "
    "ORDER BY start_time"
)
_MLFLOW = (
    "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? "
    "ORDER BY key, timestamp, step"
)
# MLflow stores an infinite value as the largest number.
_INFINITE = 1.7976931348623157e308


def read_database(path: Path) -> RawLog:
    """Reads the runs of a database of MLflow or of trackio."""
    try:
        # Not `immutable`: the last rows of a running job are in a log beside it.
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            tables = database.execute("SELECT name FROM sqlite_master").fetchall()
            if ("runs",) in tables:
                return _read_mlflow(path, database)
            return _read_trackio(path, database)
    except sqlite3.Error as error:
        raise ValueError(
            f"{path}: a database, but none of MLflow or trackio: {error}."
        ) from None


def _read_mlflow(path: Path, database: sqlite3.Connection) -> RawLog:
    runs = database.execute(_MLFLOW_RUNS).fetchall()
    counts = Counter(name for _, name in runs)
    rows = []
    for key, name in runs:
        # Runs may share a name, or have none.
        shown = name if name and counts[name] == 1 else f"{name or ''} {key}".strip()
        metrics: dict[str, list[tuple[int, float]]] = {}
        for metric, step, value, is_nan in database.execute(_MLFLOW, (key,)):
            metrics.setdefault(metric, []).append((step, _number(value, is_nan)))
        rows += rows_of_series(f"{path}, run {shown}", metrics, shown)
    return RawLog("a database of MLflow", rows, [])


def _number(value: float, is_nan: int) -> float:
    if is_nan:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) >= _INFINITE else value


def _read_trackio(path: Path, database: sqlite3.Connection) -> RawLog:
    rows = []
    for i, (run, step, metrics) in enumerate(database.execute(_TRACKIO)):
        place = f"{path}, entry {i}"
        try:
            cells = json.loads(metrics)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {error}.") from None
        if not isinstance(cells, dict):
            raise ValueError(f"{place}: must be a JSON object.")
        rows.append(RawRow(place, {"step": step, **cells}, str(run)))
    return RawLog("a database of trackio", rows, [])
