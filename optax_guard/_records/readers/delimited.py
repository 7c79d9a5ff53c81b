"""CSV in its kinds: with commas, semicolons or tabs; the exports of other tools."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from optax_guard._records.readers.names import COLUMN_NAMES, plain
from optax_guard._records.readers.raw import RawLog, RawRow, unfinished
from optax_guard._records.readers.values import (
    as_number,
    is_missing,
    with_decimal_point,
)

_DELIMITERS = ",;\t"
_KNOWN = {x for names in COLUMN_NAMES.values() for x in names}
# What TensorBoard's download button writes, and the tag in the name of such a file.
_TENSORBOARD = ["wall time", "step", "value"]
_TAG = re.compile(r"tag-(.+)")
_RUN_NAMES = ("run", "run_name", "run_id")
_CHART_ENDS = ("__MIN", "__MAX")

Line = tuple[int, list[str]]


def read_delimited(path: Path, text: str) -> RawLog | None:
    """Reads cells with a heading; None if the text has none."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    lines = _cells(path, text, delimiter)
    heading = next((cells for _, cells in lines if any(map(str.strip, cells))), [])
    heading = [name.strip() for name in heading]
    second = next(((i, cells) for i, cells in lines if cells), None)
    if not _is_heading(heading, second[1] if second else None):
        return None
    later = [second, *lines] if second else []
    rows, notes = _rows(path, text, heading, later, delimiter)
    if [name.lower() for name in heading] == _TENSORBOARD:
        return _tensorboard(path, heading, rows, notes)
    if _is_chart(heading):
        return RawLog("a chart of Weights & Biases", _chart(heading, rows), notes)
    label = _run_column(heading)
    return RawLog(
        "CSV",
        [row._replace(run=row.cells.get(label) if label else None) for row in rows],
        notes,
    )


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Line]:
    """The number of the last line of each row, and its cells."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in lines:
            yield lines.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: not CSV: {error}.") from None


def _is_heading(heading: list[str], second: list[str] | None) -> bool:
    """Whether a line names columns, of which the next line has numbers."""
    if not any(heading) or any(as_number(x) is not None for x in heading):
        return False
    is_known = any(plain(x) in _KNOWN for x in heading)
    if second is None:
        return is_known
    if len(heading) == 1 and not is_known and " " in heading[0]:
        return False  # A line of words.
    numbers = [as_number(with_decimal_point(x)) is not None for x in second]
    return len(second) <= len(heading) + 1 and (any(numbers) or is_known)


def _rows(
    path: Path, text: str, heading: list[str], lines: Sequence[Line], delimiter: str
) -> tuple[list[RawRow], list[str]]:
    """The rows, and a note if the last line is left out."""
    is_whole = text.endswith(("\n", "\r"))
    rows = []
    for i, (line, cells) in enumerate(lines):
        place = f"{path}, line {line}"
        if not cells or [x.strip() for x in cells] == heading:
            continue  # A resumed run may write its heading again.
        extra = cells[len(heading) :]
        if len(cells) < len(heading) or any(map(str.strip, extra)):
            if i == len(lines) - 1 and not is_whole and not extra:
                return rows, [unfinished(f"line {line}")]
            raise ValueError(
                f"{place}: must have {len(heading)} cells like the heading, got "
                f"{len(cells)}."
            )
        if delimiter != ",":
            cells = list(map(with_decimal_point, cells))
        pairs = zip(heading, cells, strict=False)
        rows.append(RawRow(place, {k: v for k, v in pairs if not is_missing(v)}))
    return rows, []


def _tensorboard(
    path: Path, heading: list[str], rows: list[RawRow], notes: list[str]
) -> RawLog:
    tag = _TAG.search(path.stem)
    name = tag[1] if tag else heading[-1]
    named = [
        row._replace(cells={"step": row.cells.get(heading[1]), name: value})
        for row in rows
        if (value := row.cells.get(heading[2])) is not None
    ]
    note = "the file does not say of what `Value` is; it is judged as an evaluation"
    return RawLog("a download of TensorBoard", named, notes if tag else [note, *notes])


def _is_chart(heading: list[str]) -> bool:
    columns = [x for x in heading[1:] if not x.endswith(_CHART_ENDS)]
    return bool(columns) and all(" - " in x for x in columns)


def _chart(heading: list[str], rows: list[RawRow]) -> list[RawRow]:
    """One row for each run of a row: columns are `run - name`."""
    first, *others = heading
    columns = [
        (run, name, column)
        for column in others
        if not column.endswith(_CHART_ENDS)
        for run, _, name in [column.rpartition(" - ")]
    ]
    found = []
    for row in rows:
        runs: dict[str, dict[str, str]] = {}
        for run, name, column in columns:
            if column in row.cells:
                runs.setdefault(run, {first: row.cells.get(first, "")})
                runs[run][name] = row.cells[column]
        found += [RawRow(row.place, cells, run) for run, cells in runs.items()]
    return found


def _run_column(heading: list[str]) -> str | None:
    """The column that names runs: of a table of runs, or of runs one after another."""
    by_name = {plain(x): x for x in reversed(heading)}
    if "name" in by_name and by_name.keys() & {"state", "runtime", "created"}:
        return by_name["name"]
    return next((by_name[x] for x in _RUN_NAMES if x in by_name), None)
