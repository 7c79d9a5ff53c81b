"""All runs of a file or folder."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from optax_guard._checks import check_positive
from optax_guard._records.history import History
from optax_guard._records.readers import find_files, read_logs

# Names of files that many runs share: their folder names the run.
_COMMON = {"history", "metrics", "trainer_state", "trainer_log", "progress", "results"}
# Other ends of names may belong to them, as in `lr0.1`.
_ENDINGS = {".csv", ".json", ".jsonl", ".log", ".ndjson", ".tsv", ".txt"}


class Run(NamedTuple):
    """A run that was read.

    Attributes:
      name: Its name in the file, and of the file or folder if there are several; else
        that of its file, or of the folder if the file has a name as all have.
      source: The file that holds it.
      history: Its rows.
    """

    name: str
    source: Path
    history: History


def read_runs(
    path: Path,
    *,
    run: str | None = None,
    columns: Mapping[str, str] | None = None,
    pattern: str | None = None,
    max_norm: float | None = None,
) -> list[Run]:
    """Reads all runs of a file or folder, or one; arguments as for `History.read`.

    Of several files or folders, those that cannot be read are left out with a warning.
    """
    if max_norm is not None:
        check_positive("max_norm", max_norm)
    sources = find_files(path)
    if run is not None and "" in sources:
        how = {"columns": columns, "pattern": pattern, "max_norm": max_norm}
        return [Run(run, sources[""], History.read(path, run=run, **how))]
    known, found, trouble = [], [], []
    for folder, source in sources.items():
        try:
            logs = read_logs(source, columns=columns, pattern=pattern)
        except ValueError as error:
            trouble.append(error)
            continue
        for name, log in logs.items():
            known.append("/".join(filter(None, (folder, name))) or run_name(source))
            if run not in (None, known[-1]):
                continue
            history, notes = History._of_log(log, max_norm)
            if notes:
                warnings.warn(f"{source}: {'; '.join(notes)}.", stacklevel=2)
            found.append(Run(known[-1], source, history))
    if not known:
        raise trouble[0]
    for error in trouble if run is None else ():
        warnings.warn(f"left out: {error}", stacklevel=2)
    if not found:
        raise ValueError(f"`run` must be one of {known} in {path}, got {run!r}.")
    return found


def run_name(source: Path) -> str:
    """The name of a run by its file."""
    source = source.resolve()
    folder = source.parent.name
    if source.stem in _COMMON and folder:
        return folder
    return source.stem if source.suffix.lower() in _ENDINGS else source.name
