"""JSON Lines; Hugging Face's trainer state; Keras' history; rows in one document."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optax_guard._records.readers.names import COLUMN_NAMES, plain
from optax_guard._records.readers.raw import RawLog, RawRow, unfinished
from optax_guard._records.readers.values import NOT_FINITE, as_number

_START = re.compile(r"\s*[{\[]")
_OF_A_ROW = {
    x for name in ("step", "train_loss", "val_loss") for x in COLUMN_NAMES[name]
}
# As Python prints a dict: such a line is none of JSON.
_PRINTED_DICT = re.compile(r"\s*[{\[]\s*'")


def read_json(path: Path, text: str) -> RawLog | None:
    """Reads JSON; None if the text is anything else."""
    if not _START.match(text) or _PRINTED_DICT.match(text):
        return None
    lines = text.split("\n")
    num_lines = sum(bool(line.strip()) for line in lines)
    first = next(line for line in lines if line.strip())
    if num_lines > 1 and isinstance(_parsed(first), dict):
        return _json_lines(path, lines)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if num_lines == 1 and not text.endswith("\n") and first.lstrip()[0] == "{":
            return _json_lines(path, lines)
        if not text.lstrip().startswith("{") and not isinstance(error, RecursionError):
            return None  # Lines of a text may begin with a bracket.
        raise ValueError(f"{path}: not JSON: {error}.") from None
    return _document(path, document)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_lines(path: Path, lines: list[str]) -> RawLog:
    rows, notes = [], []
    for i, line in enumerate(lines, start=1):
        place = f"{path}, line {i}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if i == len(lines):
                notes.append(unfinished(f"line {i}"))
                break
            raise ValueError(f"{place}: not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: must be a JSON object, got {str(row)[:40]!r}.")
        rows.append(_raw(place, row))
    return RawLog("JSON Lines", _without_summary(rows), notes)


def _raw(place: str, row: Mapping[str, Any]) -> RawRow:
    # A number under this name is a metric. So is a number that JSON does not have.
    run = row.get("run")
    is_label = isinstance(run, str) and run not in NOT_FINITE
    return RawRow(place, row, run if is_label else None)


def _without_summary(rows: list[RawRow]) -> list[RawRow]:
    """Leaves out Hugging Face's last entry, whose loss is the mean of all steps."""
    steps = [row for row in rows if "train_runtime" not in row.cells]
    return steps or rows


def _document(path: Path, document: Any) -> RawLog:
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        log = document["log_history"]
        if all(isinstance(row, dict) for row in log):
            where = f"{path}, entry {{}} of `log_history`"
            rows = [_raw(where.format(i), row) for i, row in enumerate(log)]
            return RawLog("Hugging Face's trainer state", _without_summary(rows), [])
    elif isinstance(document, list):
        if document and all(isinstance(row, dict) for row in document):
            rows = [_raw(f"{path}, entry {i}", row) for i, row in enumerate(document)]
            return RawLog("a JSON list of rows", _without_summary(rows), [])
    elif isinstance(document, dict):
        single = RawLog("JSON Lines", [_raw(f"{path}, line 1", document)], [])
        if any(plain(k) in _OF_A_ROW and not _is_many(x) for k, x in document.items()):
            return single
        for inner in (document, *document.values()):
            if series := _series(inner):
                return _history_of_series(path, series)
        if any(as_number(x) is not None for x in document.values()):
            return single
    raise ValueError(
        f"{path}: JSON, but no log. It must hold a row a line, a list of rows, lists "
        "of numbers by name as Keras' history, or Hugging Face's trainer state, with a "
        "list of objects `log_history`."
    )


def _is_many(value: Any) -> bool:
    return isinstance(value, list | dict)


def _series(document: Any) -> dict[str, list[Any]]:
    """The lists of numbers of a document by name; of pandas, dicts by row number."""
    if not isinstance(document, dict):
        return {}
    found = {}
    for name, values in document.items():
        if isinstance(values, dict) and values and all(k.isdigit() for k in values):
            values = list(values.values())
        is_list = isinstance(values, list) and bool(values)
        if is_list and all(x is None or as_number(x) is not None for x in values):
            found[name] = values
    return found


def _history_of_series(path: Path, series: dict[str, list[Any]]) -> RawLog:
    length = max(map(len, series.values()))
    rows: list[dict[str, Any]] = [{} for _ in range(length)]
    notes = []
    for name, values in series.items():
        # An evaluation each k epochs leaves a shorter list.
        every = length // len(values)
        if every * len(values) != length:
            notes.append(f"{name!r} has {len(values)} values of {length}")
            continue
        for i, value in enumerate(values):
            rows[(i + 1) * every - 1][name] = value
    raw = [RawRow(f"{path}, value {i}", row) for i, row in enumerate(rows)]
    return RawLog("lists by name, as Keras' history", raw, notes, says_step=True)
