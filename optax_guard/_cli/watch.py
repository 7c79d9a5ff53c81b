"""`optax-guard watch`: the findings of a run while it runs."""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optax_guard._records.diagnosis import Diagnosis
from optax_guard._records.findings import Finding
from optax_guard._records.history import History
from optax_guard._records.readers import find_file

_SECONDS = 2.0
# Reading a long log again may take at most this share of a core from the job.
_SHARE = 0.05


def follow(
    path: Path, *, sleep: Callable[[float], Any] = time.sleep, **how: Any
) -> Iterator[str | Finding]:
    """Yields what is to be said of a run, when it is; it ends only from outside.

    The record is read anew when it has changed, whatever its format: so a run that
    went back to a checkpoint, or a file that is written as a whole, is read right.

    Args:
      path: File or folder; it may not be there yet.
      sleep: Waits.
      **how: As for `History.read`.

    Yields:
      Findings when they first hold; and sentences, on what is waited for or was not
      understood.
    """
    said: set[Any] = set()
    before: Any = None
    trouble: str | None = None
    while True:
        began = time.monotonic()
        state = _state(path)
        if state != before:
            texts, findings, trouble = _read(path, how)
            for each in [*texts, *findings]:
                key = (each.code, each.step) if isinstance(each, Finding) else each
                if key not in said:
                    said.add(key)
                    yield each
        elif trouble is not None and trouble not in said:
            # It is no row that is being written: nothing has changed since.
            said.add(trouble)
            yield trouble
        before = state
        sleep(max(_SECONDS, (time.monotonic() - began) / _SHARE))


def _read(
    path: Path, how: dict[str, Any]
) -> tuple[list[str], list[Finding], str | None]:
    """Warnings, findings, and why nothing could be read."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = History.read(path, **how)
        diagnosis = Diagnosis()
        found = [finding for row in history for finding in diagnosis.update(row)]
    except OSError as error:
        return [f"waiting for a log: {error}"], [], None
    except ValueError as error:
        return [], [], str(error)
    # That the last line is unfinished is the rule here.
    texts = [str(x.message) for x in caught if "unfinished" not in str(x.message)]
    return texts, found, None


def _state(path: Path) -> Any:
    """What changes when the record grows."""
    try:
        source = find_file(path)
        files = sorted(source.rglob("*")) if source.is_dir() else [source]
        states = [(file, file.stat()) for file in files if file.is_file()]
        return [(file, state.st_size, state.st_mtime_ns) for file, state in states]
    except OSError as error:
        return str(error)
