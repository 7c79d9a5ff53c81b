"""What a reader of one format returns: rows as they stand in the file."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class RawRow(NamedTuple):
    """A row of a file.

    Attributes:
      place: Where it stands, for messages.
      cells: Its cells, by the names in the file.
      run: The name of its run; None if the file names none.
    """

    place: str
    cells: Mapping[str, Any]
    run: str | None = None


class RawLog(NamedTuple):
    """A file, read.

    Attributes:
      format: The name of the format, in words.
      rows: The rows, in their order.
      notes: What was not understood, in clauses.
      says_step: Whether rows without a step are numbered rightly by their place, as
        the epochs of Keras are.
    """

    format: str
    rows: list[RawRow]
    notes: list[str]
    says_step: bool = False


def unfinished(place: str) -> str:
    """The note on a last line, or record, that is left out."""
    return f"{place}: the last line is unfinished, as a killed run leaves it"
