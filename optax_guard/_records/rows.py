"""Complete rows of a history: the form that tables, rules and figures expect."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from optax_guard._checks import brief, check_iterable
from optax_guard._records.readers import NOT_FINITE, Renamer, Row

_LARGEST = float(np.finfo(np.float32).max)


class Completer:
    """Completes rows, one after the other.

    Names become those of `COLUMN_NAMES`. ``clipped_norm`` and ``clip_rate`` are
    computed from norm and threshold if they are missing. Rates of `optax_guard.metrics`
    are shares of all ``num_updates`` so far; they become shares of the updates since
    the row before, as `fit` records them. Where ``norm_max`` has risen since then, it
    is the norm of the row. What float32 cannot hold is infinite. A complete row stays
    as it is.

    Attributes:
      num_new: Updates between the last two rows by their ``num_updates``; 0 if unknown.
    """

    def __init__(self):
        self.num_new = 0.0
        self._index = 0
        self._rename = Renamer()
        self._counts: dict[str, float] = {}
        self._norm_max = math.inf

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Completes a row."""
        if not isinstance(row, Mapping):
            raise TypeError(
                "`history` must be a `History` or rows, each a dict of numbers, got a "
                f"`{type(row).__name__}` as row {self._index}."
            )
        # Texts such as the name of the run are left out.
        full = {
            name: _within_float32(number_of(name, value))
            for name, value in row.items()
            if not isinstance(value, str) or value in NOT_FINITE
        }
        full = {"step": self._index, **self._rename(full)}
        self._index += 1
        self.num_new = 0.0
        if "num_updates" in full:
            self._set_rates_since_last_row(full)
            self._set_largest_norm(full)
        norm, limit = full.get("grad_norm"), full.get("clip_threshold")
        if norm is None or not math.isfinite(norm):
            return full
        if limit is not None and not math.isnan(limit):
            full.setdefault("clipped_norm", min(norm, limit))
        if "clipped_norm" in full:
            # A difference within the rounding of bfloat16 is no clip.
            is_clipped = full["clipped_norm"] < norm * (1 - 2**-7)
            full.setdefault("clip_rate", float(is_clipped))
        return full

    def _set_rates_since_last_row(self, row: Row) -> None:
        counts = {"num_updates": row.pop("num_updates")}
        for name in ("clip_rate", "nonfinite_rate", "skip_rate"):
            if name in row:
                counts[name] = row[name] * counts["num_updates"]
        before, self._counts = self._counts, counts
        num_new = counts["num_updates"] - before.get("num_updates", 0)
        self.num_new = num_new
        if before and num_new > 0:
            for name in counts.keys() & before.keys() - {"num_updates"}:
                # Rates are rounded to float32, so that counts are not quite whole.
                share = (counts[name] - before[name]) / num_new
                row[name] = min(1.0, max(0.0, round(share, 6)))

    def _set_largest_norm(self, row: Row) -> None:
        """A huge norm between two rows is not lost: the row has that of one update."""
        before, self._norm_max = self._norm_max, row.get("norm_max", math.inf)
        if not row.get("grad_norm", math.inf) < self._norm_max > before:
            return
        row["grad_norm"] = self._norm_max
        if "clipped_norm" in row:
            limit = row.get("clip_threshold", math.nan)
            row["clipped_norm"] = min(self._norm_max, limit)
            if math.isnan(limit):
                del row["clipped_norm"]


def as_rows(history: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The completed rows of a `History` or of a list of dicts."""
    check_iterable("history", history, "a `History` or rows")
    return list(map(Completer(), history))


def _within_float32(number: float) -> float:
    # No step has computed such a number, and squares of it do not fit into a float.
    return math.copysign(math.inf, number) if abs(number) > _LARGEST else number


def number_of(name: str, value: Any) -> float:
    """A scalar of Python, NumPy or JAX as a number of Python."""
    if type(value) is float:  # Most are: arrays take ten times as long.
        return value
    # Rows that a user has read from JSON hold these numbers as strings.
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    array = np.asarray(value)
    if array.shape:
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {array.shape}. Take its "
            "mean, or add buffers of rows with `extend`."
        )
    number = array.item()
    if isinstance(number, bool):
        return int(number)
    if not isinstance(number, int | float):
        is_row = name == "step" and isinstance(value, Mapping)
        order = " The order is `append(step, row)`." if is_row else ""
        raise TypeError(f"`{name}` must be a number, got {brief(value)}.{order}")
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        raise ValueError(
            f"`{name}` must fit into a float, got {number.bit_length()} bits."
        )
    return number
