"""The `metrics` folder of a run of MLflow: a file for each metric."""

import re
from collections.abc import Iterator
from pathlib import Path

from optax_guard._records.readers.metric_series import rows_of_series
from optax_guard._records.readers.raw import RawLog
from optax_guard._records.readers.values import as_number

# Milliseconds, the value, the step.
_LINE = re.compile(r"\d+ (\S+) (\d+)(?: .*)?")


def is_metric_folder(path: Path) -> bool:
    """Whether a folder is of this kind."""
    return path.name == "metrics" and any(map(_is_metric, _files(path)))


def read_metric_folder(path: Path) -> RawLog:
    """Reads it; within a metric a step that comes again counts from there on."""
    metrics = {
        file.relative_to(path).as_posix(): _values(file)
        for file in _files(path)
        if _is_metric(file)
    }
    return RawLog("metrics of MLflow", rows_of_series(str(path), metrics), [])


def _values(file: Path) -> Iterator[tuple[int, float]]:
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        found = _LINE.fullmatch(line.strip())
        value = as_number(found[1]) if found else None
        if found and value is not None:
            yield int(found[2]), value


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _is_metric(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(200).decode("utf-8", errors="replace")
    return _LINE.fullmatch(line.strip()) is not None
