"""A record of the scalars of a run, in memory and on disk."""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from optax_guard._checks import check_count, check_kind, check_positive
from optax_guard._records.readers import Log, Renamer, Row, read_log
from optax_guard._records.rows import number_of
from optax_guard._records.timeline import Timeline


class History(Sequence[Row]):
    """An append-only record of scalars with a row for each step or evaluation.

    It is a logger for `optax_guard.loops.fit`, and a list of rows for `diagnose`,
    `table` and the figures. With a path, every row is also a line of JSON (JSON Lines)
    on disk before `append` returns: a killed run loses at most its last line. JSON has
    no NaN and no infinities. They are the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``; there are no other strings, so rows are read back as they were.

    Rows are in the order of their steps. A row for the last step adds to that row:
    losses and norms need not come in one call. A row for an earlier step with a loss or
    a norm that was recorded since means that the run went back to a checkpoint or to
    its start; the rows after that step are dropped. Other rows for an earlier step,
    such as a late evaluation, add to that step. (The file keeps the old rows; reading
    treats them in the same way.)

    Args:
      path: File to write to, ending in .jsonl. It is made if it is missing, with its
        folders. Rows that it holds already are read first. ``None``: memory only.

    Raises:
      TypeError: If ``path`` is no path.
      ValueError: If the file has another ending, or does not hold rows.

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
        self._timeline = Timeline()
        # `append` is told the step: a metric named `iter` keeps its name.
        self._rename = Renamer(leave="step")
        if path is not None:
            check_kind("path", path, (str, os.PathLike), "a path or None")
        self._path = None if path is None else Path(path)
        if self._path is not None:
            if self._path.suffix != ".jsonl":
                raise ValueError(f"`path` must end in .jsonl, got {str(path)!r}.")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _drop_half_line(self._path)
                for row in read_log(self._path).rows:
                    self._timeline.add(row)

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        run: str | None = None,
        columns: Mapping[str, str] | None = None,
        pattern: str | None = None,
        max_norm: float | None = None,
    ) -> "History":
        r"""Reads the record that this library or another has written.

        The content tells the format, not the name of the file:

        * JSON Lines, of this library, detectron2, LLaMA-Factory and others; Hugging
          Face's trainer state; lists of numbers by name, such as Keras' history;
        * CSV with a heading, its cells parted by commas, semicolons or tabs: Lightning,
          Keras, YOLO; a download of TensorBoard; charts and tables of Weights & Biases;
        * event files of TensorBoard, with ``pip install 'optax-guard[log]'``; metrics
          of MLflow, a folder or ``mlflow.db``; a database of trackio;
        * lines of text such as ``step 10 loss 2.5 norm 0.7``: nanoGPT, llm.c,
          torchtitan, Megatron, OLMo, MaxText, printed dicts; and any other with a
          ``pattern``.

        A folder is searched for one of these. Reading changes no file and runs no code
        (it does not unpickle).

        These columns get one name, whatever their usual name is (``loss``,
        ``train/loss``, ``eval_loss``, ``optim/total_grad_norm``, ``lr``,
        ``global_step``): ``step``, ``epoch``, ``train_loss``, ``val_loss``,
        ``grad_norm``, ``clipped_norm``, ``clip_threshold``, ``clip_rate``,
        ``learning_rate``. Each comes from one column: of a loss of steps and its mean
        of epochs, the mean keeps its name. Of YOLO's parts of a loss it is the sum.
        Other columns keep their names. Rows without a step belong to the step before.

        One warning tells what was not understood: columns that look like a loss, a norm
        or an evaluation and were not used; that there is no step; rows of one step that
        replaced each other; rows that were left out, because steps begin again after
        them; an unfinished last line, as a killed run leaves it.

        Args:
          path: File or folder.
          run: Name of the run, if there are several.
          columns: Unusual names in the file, as in ``{"grad_norm": "my/norm"}``.
          pattern: Regular expression for the lines of a text, with named groups, as in
            ``r"it (?P<step>\d+) cost (?P<train_loss>\S+)"``.
          max_norm: Threshold to which global norms were clipped, in units of the
            gradient, if the file does not hold it.

        Returns:
          The rows, in memory only.

        Raises:
          TypeError: If an argument is of another type.
          ValueError: If the file is broken (the text names file and line), or no log is
            recognised in it; if ``run``, ``pattern`` or a name in ``columns`` is not in
            it; if there are several runs and ``run`` is ``None``; if ``max_norm`` is
            not positive.
          FileNotFoundError: If there is no such file, or none in the folder.
          ImportError: If a package is missing that reads event files.
        """
        check_kind("path", path, (str, os.PathLike), "a path")
        check_kind("run", run, (str, type(None)), "a name or None")
        check_kind("columns", columns, (Mapping, type(None)), "a dict or None")
        check_kind("pattern", pattern, (str, type(None)), "a text or None")
        if max_norm is not None:
            check_positive("max_norm", max_norm)
        log = read_log(path, run=run, columns=columns, pattern=pattern)
        history, notes = cls._of_log(log, max_norm)
        if notes:
            warnings.warn(f"{path}: {'; '.join(notes)}.", stacklevel=2)
        return history

    @classmethod
    def _of_log(cls, log: Log, max_norm: float | None) -> tuple["History", list[str]]:
        """The history of what was read, and what was not understood, in clauses."""
        history = cls()
        for row in log.rows:
            if max_norm is not None and "grad_norm" in row:
                row.setdefault("clip_threshold", max_norm)
            history._timeline.add(row)
        timeline = history._timeline
        notes = _note_of_replaced(timeline.num_replaced)
        if timeline.num_dropped > 1:
            first = timeline.rows[0]["step"]
            notes.append(
                f"{timeline.num_dropped} rows, perhaps of an earlier run, were left "
                f"out: after them steps begin again at {first:.16g}"
            )
        return history, log.notes + notes

    def append(self, step: Any, row: Mapping[str, Any] | None = None, **scalars: Any):
        """Adds scalars of a step.

        Args:
          step: Steps done; an integer of at least 0, or a scalar array of one.
          row: Scalars by name: numbers of Python or NumPy, or arrays of shape (). Names
            are changed as in `read`: ``loss`` becomes ``train_loss``.
          **scalars: More scalars.

        Raises:
          TypeError: If a value is not a number, or ``row`` is not a dict.
          ValueError: If a value is an array of another shape or too large for a float,
            or ``step`` is negative.
        """
        check_kind("row", row, (Mapping, type(None)), "a dict of numbers or None")
        number = number_of("step", step)
        if number != number // 1 or number < 0:
            raise ValueError(f"`step` must be a whole number >= 0, got {number}.")
        named = {**(row or {}), **scalars}
        numbers = {name: number_of(name, value) for name, value in named.items()}
        row = {"step": 0, **self._rename(numbers)} | {"step": int(number)}
        if self._path is not None:
            try:
                # Open, write and close: a kill finds nothing left to flush.
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_json_line(row))
            except OSError:
                # The disk may be full. The next row must start a new line.
                if self._path.exists():
                    _drop_half_line(self._path)
                raise
        self._timeline.add(row)

    def __call__(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a row, as a logger of `fit`."""
        self.append(step, row)

    def log_scalar(self, event: str, value: Any, **kwargs: Any) -> None:
        """Adds one scalar, as a backend of metrax or a listener of `jax.monitoring`.

        JAX and Orbax send scalars of their own to every listener. These have no step,
        and are left out.

        Args:
          event: Its name, such as ``"train/loss"``. A slash at its front is removed.
          value: The scalar, as `append` takes it.
          **kwargs: ``step``, as `append` takes it; others are ignored.

        Raises:
          TypeError: If ``event`` is not a text, or ``value`` not a number.
          ValueError: As `append`.

        Examples:
          >>> history = History()
          >>> history.log_scalar("/train/loss", 2.5, step=1)
          >>> list(history)
          [{'step': 1, 'train_loss': 2.5}]
        """
        check_kind("event", event, str, "a name")
        if kwargs.get("step") is not None:
            self.append(kwargs["step"], {event.lstrip("/"): value})

    def close(self) -> None:
        """Does nothing: each row is in the file when `append` returns."""

    def extend(self, buffers: Mapping[str, Any], num_rows: int | None = None) -> None:
        """Adds rows that a loop on the device has collected in arrays.

        Args:
          buffers: Arrays of shape [rows] by name. Without ``step`` among them, each row
            is one step after the row before.
          num_rows: How many rows of the buffers are filled; all if ``None``.

        Raises:
          TypeError: If ``buffers`` is not a dict, or ``num_rows`` not a number.
          ValueError: If the arrays are not vectors of one length.
        """
        check_kind("buffers", buffers, Mapping, "a dict of arrays")
        if num_rows is not None:
            check_count("num_rows", num_rows, least=0)
        arrays = {name: np.asarray(x) for name, x in buffers.items()}
        shapes = {name: x.shape for name, x in arrays.items()}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(
                f"`buffers` must be vectors of one length, got the shapes {shapes}. "
                "Take one member of a population."
            )
        first = self._timeline.rows[-1]["step"] + 1 if self._timeline.rows else 1
        (length,) = next(iter(shapes.values()))
        steps = arrays.pop("step", np.arange(first, first + length))
        for i in range(length if num_rows is None else min(length, int(num_rows))):
            self.append(steps[i], {name: x[i] for name, x in arrays.items()})

    def column(self, name: str) -> np.ndarray:
        """The values of a name, float64[rows]; NaN in rows without it."""
        check_kind("name", name, str, "a name")
        return np.array(
            [row.get(name, math.nan) for row in self._timeline.rows], np.float64
        )

    def __len__(self) -> int:
        return len(self._timeline.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._timeline.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._timeline.rows[index]

    def __repr__(self) -> str:
        where = "" if self._path is None else f" in {str(self._path)!r}"
        return f"<History of {len(self)} rows{where}>"


def _note_of_replaced(num_replaced: Counter[float]) -> list[str]:
    """Says that rows of one step became one, though their losses or norms differ."""
    # A resumed run may repeat one step.
    if num_replaced.total() < 2:
        return []
    (step, most), *others = num_replaced.most_common()
    more = f", and so at {len(others)} more steps" if others else ""
    return [f"{most + 1} rows of step {step} became one{more}: are they several runs?"]


def _json_line(row: Row) -> str:
    strict = {
        name: value if math.isfinite(value) else json.dumps(value)
        for name, value in row.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def _drop_half_line(path: Path) -> None:
    """Removes an unfinished last line, so that the next row starts a new line."""
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
