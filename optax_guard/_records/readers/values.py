"""Numbers, as files write them."""

import re
import sys
from typing import Any

# JSON has no such numbers: a record holds them as these strings.
NOT_FINITE = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
# What stands in a cell where there is no number.
_MISSING = {"", "-", "na", "n/a", "<na>", "none", "null"}
# Where a semicolon or a tab parts the cells, a comma may stand before the decimals.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)


def is_missing(value: Any) -> bool:
    """Whether a cell says that there is no value."""
    return value is None or (
        isinstance(value, str) and value.strip().lower() in _MISSING
    )


def as_number(value: Any) -> float | None:
    """The number that a cell holds; None if it holds anything else."""
    if isinstance(value, str):
        value = _parse(value.strip())
    if not isinstance(value, int | float):
        return None
    # Integers of JSON and Python may be too large for a float.
    if abs(value) > sys.float_info.max:
        return float("inf") if value > 0 else float("-inf")
    return int(value) if isinstance(value, bool) else value


def with_decimal_point(text: str) -> str:
    """A number with a decimal comma, with a point; other texts as they are."""
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text.strip()) else text


def _parse(text: str) -> float | None:
    # Python reads 1_000, and a number that a line break divides; nobody writes these.
    if "_" in text or len(text.split()) != 1:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def printable(text: str) -> str:
    """A text from outside with its control characters written out."""
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode() for x in text
    )
