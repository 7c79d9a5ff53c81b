"""A record of a run's scalars, in memory and, line by line, on disk."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from optax_guard._checks import check_count, check_kind, check_positive
from optax_guard._records.readers import read_rows, rename
from optax_guard._records.rows import Row, number_of


class History(Sequence[Row]):
    """An append-only record of scalars, one row a step or an evaluation.

    A logger for `optax_guard.flax.fit`, a list of rows for the plots, and what
    `diagnose` reads. With a path every row is also a line of JSON (JSON Lines), on disk
    before `append` returns: a killed run loses at most its last line. JSON has no NaN
    and no infinities; they are the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which are the only strings, so rows are read back as they were.

    Rows are in the order of their steps. A row for the last step adds to it: losses
    and norms need not come in one call. A row for an earlier step means that the run
    went back, to a checkpoint or to its start: it takes the place of the rows from that
    step on. (On disk nothing is removed; the same is done on reading.)

    Args:
      path: File to write to, ending in .jsonl, made with its folders if missing. What
        it holds already is read first, and rows are added to it. ``None``: memory only.

    Raises:
      ValueError: If the file has another ending or holds something else.

    Examples:
      >>> from optax_guard.analysis import History
      >>> history = History()
      >>> history.append(1, loss=2.3, grad_norm=15.2, clip_threshold=5.0)
      >>> history.append(2, loss=1.8, grad_norm=12.7, clip_threshold=5.0)
      >>> history.append(2, val_loss=1.9)
      >>> history[-1]["train_loss"], history[-1]["val_loss"], len(history)
      (1.8, 1.9, 2)
    """

    def __init__(self, path: str | Path | None = None):
        self._rows: list[Row] = []
        if path is not None:
            check_kind("path", path, (str, os.PathLike), "a path or None")
        self._path = None if path is None else Path(path)
        if self._path is not None:
            if self._path.suffix != ".jsonl":
                raise ValueError(f"`path` must end in .jsonl, got {str(path)!r}.")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _drop_half_line(self._path)
                for row in read_rows(self._path):
                    self._add(row)

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        run: str | None = None,
        columns: Mapping[str, str] | None = None,
        max_norm: float | None = None,
    ) -> "History":
        """Reads what a run has written, by this library or another. Changes nothing.

        Formats: JSON Lines (``.jsonl``, ``.ndjson``), CSV with a heading, such as
        Lightning's ``metrics.csv``, and Hugging Face's ``trainer_state.json``; or a
        folder with one of these in it. Names in `COLUMN_NAMES` are recorded under one
        name. Of a run that was killed an unfinished last line is left out, with a
        warning. Reading never runs code: there is no pickle.

        Args:
          path: File or folder.
          run: Which run, if rows have a ``run``, as those of `optax-guard demo`.
          columns: Names in the file of what has other names there than `COLUMN_NAMES`
            knows, as ``{"grad_norm": "my/norm"}``.
          max_norm: Threshold to which global norms were clipped, in units of the
            gradient, if the file does not tell.

        Returns:
          The rows, in memory only.

        Raises:
          TypeError: If an argument is of another type.
          ValueError: If the file is broken, naming file and line; if ``run`` or a name
            in ``columns`` is not in it; if there are several runs and ``run`` is none;
            if ``max_norm`` is not positive.
          FileNotFoundError: If there is no such file, or none in the folder.
        """
        check_kind("path", path, (str, os.PathLike), "a path")
        check_kind("run", run, (str, type(None)), "a name or None")
        check_kind("columns", columns, (Mapping, type(None)), "a dict or None")
        if max_norm is not None:
            check_positive("max_norm", max_norm)
        history = cls()
        for row in read_rows(path, run=run, columns=columns):
            if max_norm is not None and "grad_norm" in row:
                row.setdefault("clip_threshold", max_norm)
            history._add(row)
        return history

    def append(self, step: Any, row: Mapping[str, Any] | None = None, **scalars: Any):
        """Adds scalars of a step.

        Args:
          step: Steps done; an integer of at least 0, or a scalar array of one.
          row: Scalars by name: Python's or NumPy's numbers, or arrays of shape ().
            Names in `COLUMN_NAMES` are recorded under one name: ``loss`` is
            ``train_loss``.
          **scalars: More of them.

        Raises:
          TypeError: If a value is no number, or ``row`` no dict.
          ValueError: If a value is an array of another shape or too large for a float,
            or ``step`` is negative.
        """
        check_kind("row", row, (Mapping, type(None)), "a dict of numbers or None")
        number = number_of("step", step)
        if number != number // 1 or number < 0:
            raise ValueError(f"`step` must be a whole number >= 0, got {number}.")
        named = {**(row or {}), **scalars}
        numbers = {name: number_of(name, value) for name, value in named.items()}
        row = {"step": 0, **rename(numbers)} | {"step": int(number)}
        if self._path is not None:
            try:
                # Opened anew: nothing is left to flush or to close at a kill.
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(row))
            except OSError:
                # As of a full disk: the next row must not go on in this line.
                if self._path.exists():
                    _drop_half_line(self._path)
                raise
        self._add(row)

    def __call__(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a row, as a logger of `fit`."""
        self.append(step, row)

    def extend(self, buffers: Mapping[str, Any], num_rows: int | None = None) -> None:
        """Adds the rows that a loop on the device has collected in arrays.

        Args:
          buffers: Arrays of shape [rows] by name. ``step`` is one of them, or the rows
            go on from the last one, one step a row.
          num_rows: How many rows of the buffers were filled; all if ``None``.

        Raises:
          TypeError: If ``buffers`` is no dict, or ``num_rows`` no number.
          ValueError: If the arrays are not vectors of one length.
        """
        check_kind("buffers", buffers, Mapping, "a dict of arrays")
        if num_rows is not None:
            check_count("num_rows", num_rows, least=0)
        arrays = {name: np.asarray(x) for name, x in buffers.items()}
        shapes = {name: x.shape for name, x in arrays.items()}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(
                f"`buffers` must be vectors of one length, got the shapes {shapes}. Of "
                "a population, take one member."
            )
        first = self._rows[-1]["step"] + 1 if self._rows else 1
        (length,) = next(iter(shapes.values()))
        steps = arrays.pop("step", np.arange(first, first + length))
        for i in range(length if num_rows is None else min(length, int(num_rows))):
            self.append(steps[i], {name: x[i] for name, x in arrays.items()})

    def column(self, name: str) -> np.ndarray:
        """The values of a name, float64[rows]; NaN where a row has none."""
        check_kind("name", name, str, "a name")
        return np.array([row.get(name, math.nan) for row in self._rows], np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __repr__(self) -> str:
        where = "" if self._path is None else f" in {str(self._path)!r}"
        return f"<History of {len(self)} rows{where}>"

    def _add(self, row: Row) -> None:
        rows = self._rows
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        if rows and rows[-1]["step"] == row["step"]:
            row = {**rows.pop(), **row}
        rows.append(row)


def _line(row: Row) -> str:
    strict = {
        name: value if math.isfinite(value) else json.dumps(value)
        for name, value in row.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _drop_half_line(path: Path) -> None:
    """Ends the file after its last whole line, so that the next one stands alone."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return
    try:
        json.loads(content[whole:])
    except ValueError:
        with path.open("r+b") as file:
            file.truncate(whole)
    else:
        with path.open("ab") as file:
            file.write(b"\n")
