"""The live display of a run: a progress bar, and a table of evaluations."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax

from optax_guard._checks import check_kind, is_flag
from optax_guard._records.table import cell, choose_columns, heading


class NoDisplay:
    """A display that shows nothing."""

    def advance(self, steps: int = 1) -> None:
        """Does nothing."""

    def row(self, row: Mapping[str, float]) -> None:
        """Does nothing."""


_SECONDS_BETWEEN_DRAWINGS = 0.1


class Progress:
    """Shows a run while it runs; a context manager.

    On a terminal a bar with steps, speed and time left stays at the bottom, and the
    table grows above it. Until the first step is done the bar says that it compiles. A
    bar that does not reach its end goes away with the run. In a file, a pipe or a
    notebook each row is printed as a plain line.

    Args:
      total: Steps of the whole run.
      title: A word before the bar and above the table.
      file: File to write to; standard output if ``None``.

    Raises:
      ImportError: If `rich` is not installed.

    Examples:
      >>> from optax_guard._records.progress import Progress
      >>> with Progress(total=20) as progress:
      ...     progress.advance(10)
      ...     progress.row({"step": 10, "clip_rate": 0.25, "train_loss": 3.5})
           step    clipped  train loss
             10      25.0%         3.5
    """

    def __init__(self, total: int, title: str = "", file: TextIO | None = None):
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError as error:
            raise ImportError(
                "Showing progress needs rich: pip install 'optax-guard[demo]'",
                name=error.name,
            ) from error
        self._title = title
        self._file = file
        self._columns: list[str] = []
        self._waiting = 0
        self._drawn_at = -float("inf")
        self._bar: Any = None
        console = Console(file=file, highlight=False)
        if console.is_terminal and not (console.is_jupyter or console.is_dumb_terminal):
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=console,
            )
            # It moves to and fro until it is started, and does not count that time.
            self._task = self._bar.add_task(
                title, total=total, start=False, speed="compiling"
            )

    def __enter__(self) -> "Progress":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Draws the bar."""
        if self._bar is not None:
            self._bar.start()

    def advance(self, steps: int = 1) -> None:
        """Adds steps that are done."""
        self._waiting += steps
        now = time.monotonic()
        # Drawing costs more than a small step does.
        if self._bar is not None and now - self._drawn_at > _SECONDS_BETWEEN_DRAWINGS:
            self._draw(now)

    def row(self, row: Mapping[str, float]) -> None:
        """Adds a row to the table; the first row sets the columns."""
        if not self._columns:
            self._columns = choose_columns(row)
            if self._title:
                self.say(self._title)
            self._print_cells([heading(key) for key in self._columns])
        self._print_cells([cell(key, row.get(key)) for key in self._columns])

    def close(self) -> None:
        """Draws the bar for the last time and releases the terminal."""
        if self._bar is not None:
            self._draw(time.monotonic())
            self._bar.update(self._task, visible=self._bar.finished)
            self._bar.stop()

    def _draw(self, now: float) -> None:
        task = self._bar.tasks[0]
        if self._waiting and not task.started:
            self._bar.start_task(self._task)
            self._bar.update(self._task, speed="")
        self._bar.advance(self._task, self._waiting)
        if task.speed:
            self._bar.update(self._task, speed=f"{task.speed:.3g} steps/s")
        self._waiting = 0
        self._drawn_at = now

    def _print_cells(self, cells: list[str]) -> None:
        # Nine characters hold any number as `cell` writes it.
        widths = [max(9, len(heading(key))) for key in self._columns]
        pairs = zip(cells, widths, strict=True)
        self.say("  ".join(f"{cell:>{width}}" for cell, width in pairs))

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=self._file or sys.stdout, flush=True)


def open_display(
    progress: Any, total: int
) -> contextlib.AbstractContextManager[Progress | NoDisplay]:
    """The display that ``progress`` asks for. A display of the user stays open."""
    is_bool = is_flag(progress)
    if not is_bool and not (hasattr(progress, "advance") and hasattr(progress, "row")):
        check_kind("progress", progress, bool, "True, False or a display")
    if jax.process_index() != 0 or (is_bool and not progress):
        return contextlib.nullcontext(NoDisplay())
    return Progress(total) if is_bool else contextlib.nullcontext(progress)
