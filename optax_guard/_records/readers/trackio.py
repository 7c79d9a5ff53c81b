"""The database of trackio, which it keeps for each project."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from optax_guard._records.readers.raw import RawLog, RawRow

_QUERY = "SELECT run_name, step, metrics FROM metrics ORDER BY id"


def read_trackio(path: Path) -> RawLog:
    """Reads it, and writes nothing."""
    try:
        # Not `immutable`: the last rows of a running job are in a log beside it.
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            found = database.execute(_QUERY).fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"{path}: a database, but none of trackio: {error}.") from None
    rows = []
    for i, (run, step, metrics) in enumerate(found):
        place = f"{path}, entry {i}"
        try:
            cells = json.loads(metrics)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {error}.") from None
        if not isinstance(cells, dict):
            raise ValueError(f"{place}: must be a JSON object.")
        rows.append(RawRow(place, {"step": step, **cells}, str(run)))
    return RawLog("a database of trackio", rows, [])
