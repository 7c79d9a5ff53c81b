"""Reading anybody's log: a file or folder, as rows of a history."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optax_guard._records.readers.folders import find_file as find_file
from optax_guard._records.readers.folders import find_files as find_files
from optax_guard._records.readers.names import COLUMN_NAMES as COLUMN_NAMES
from optax_guard._records.readers.names import Renamer as Renamer
from optax_guard._records.readers.names import part_names, sources_of
from optax_guard._records.readers.names import rename as rename
from optax_guard._records.readers.raw import RawLog, RawRow
from optax_guard._records.readers.recognition import read_raw
from optax_guard._records.readers.steps import Row as Row
from optax_guard._records.readers.steps import number_steps
from optax_guard._records.readers.unused import unused_columns
from optax_guard._records.readers.values import NOT_FINITE as NOT_FINITE
from optax_guard._records.readers.values import as_number, is_missing, printable

# So many names are written out in a message.
_MOST_NAMES = 10


class Log(NamedTuple):
    """The rows of one run.

    Attributes:
      format: The format, in words.
      rows: Its rows, in the order of the file: steps may be there twice.
      sources: For each name in a history the column that it was read from.
      notes: What was not understood, in clauses.
    """

    format: str
    rows: list[Row]
    sources: dict[str, str]
    notes: list[str]


def read_log(
    path: str | Path,
    *,
    run: str | None = None,
    columns: Mapping[str, str] | None = None,
    pattern: str | None = None,
) -> Log:
    """Reads the rows of a run; see `History.read`."""
    path = find_file(Path(path))
    raw = read_raw(path, pattern)
    rows = _select_run(path, raw.rows, run)
    _check_columns(path, rows, columns)
    return _log_of(raw, rows, columns)


def read_logs(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    pattern: str | None = None,
) -> dict[str, Log]:
    """Reads every run of a file by its name, which is empty if the file names none."""
    raw = read_raw(path, pattern)
    _check_columns(path, raw.rows, columns)
    runs = list(dict.fromkeys(row.run for row in raw.rows if row.run is not None))
    if len(runs) < 2:
        return {"".join(runs): _log_of(raw, raw.rows, columns)}
    rows = {run: [row for row in raw.rows if row.run == run] for run in runs}
    return {run: _log_of(raw, its, columns) for run, its in rows.items()}


def _check_columns(
    path: Path, rows: list[RawRow], columns: Mapping[str, str] | None
) -> None:
    names = {name for row in rows for name in row.cells}
    for name, theirs in (columns or {}).items():
        if rows and theirs not in names:
            raise ValueError(
                f"`columns` must name columns of {path}, got {theirs!r} for {name!r}. "
                f"There are {sorted(names)}."
            )


def _log_of(raw: RawLog, rows: list[RawRow], columns: Mapping[str, str] | None) -> Log:
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    given = {
        name: theirs for name, theirs in (columns or {}).items() if theirs in names
    }
    sources = {**sources_of(names), **given}
    parts = {
        f"{split}_loss": found
        for split in ("train", "val")
        if f"{split}_loss" not in sources and (found := part_names(names, split))
    }
    renamer = Renamer(sources)
    read = [(row.place, _numbers(row, renamer, parts)) for row in rows]
    numbered, notes = number_steps(read, says_step=raw.says_step)
    notes += unused_columns(names, {*sources, *parts}, sources)
    return Log(raw.format, numbered, sources, [*raw.notes, *notes])


def _select_run(path: Path, rows: list[RawRow], run: str | None) -> list[RawRow]:
    runs = list(dict.fromkeys(row.run for row in rows if row.run is not None))
    if run is None and len(runs) > 1:
        word = (
            "This is a table of runs, of one row each. "
            if len(runs) == len(rows)
            else ""
        )
        raise ValueError(
            f"{path} holds several runs: {_listed(runs)}. {word}Choose one with `run=`."
        )
    if run is not None and not runs:
        raise ValueError(f"`run` must be left out, for {path} names none, got {run!r}.")
    if run is not None and run not in runs:
        raise ValueError(
            f"`run` must be one of {runs[:_MOST_NAMES]} in {path}, got {run!r}."
        )
    return [row for row in rows if run is None or row.run == run]


def _listed(names: Iterable[str]) -> str:
    names = [printable(x) for x in names]
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def _numbers(raw: RawRow, renamer: Renamer, parts: Mapping[str, list[str]]) -> Row:
    row: dict[str, Any] = {}
    for name, value in renamer(raw.cells).items():
        number = as_number(value)
        if number is not None:
            row[name] = number
        elif name in COLUMN_NAMES and not is_missing(value):
            # In other columns, texts and lists are left out: a date, a tag.
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
            raise ValueError(f"{raw.place}: `{name}` must be a number, got {shown}.")
    for name, theirs in parts.items():
        if all(x in row for x in theirs):
            row[name] = sum(row[x] for x in theirs)
    return row
