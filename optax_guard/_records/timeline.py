"""The order of rows: a row for each step, and what a resumed run does to it."""

from bisect import bisect_left
from collections import Counter
from operator import itemgetter

from optax_guard._records.readers.steps import MEASURED, Row

_STEP = itemgetter("step")
_PLACE = {"step", "epoch"}


class Timeline:
    """Rows in the order of their steps.

    A row for a step that is there adds to its row, and its values replace those of the
    same name. A row for an earlier step belongs there if it brings what was not
    measured since, as a late evaluation does. Otherwise the run went back to that step:
    the rows after it are dropped.

    Attributes:
      rows: The rows.
      num_replaced: For each step how many rows replaced a loss or norm by another,
        without going back.
      num_dropped: Rows that were dropped because the run began again.
    """

    def __init__(self):
        self.rows: list[Row] = []
        self.num_replaced: Counter[float] = Counter()
        self.num_dropped = 0
        self._last: dict[str, float] = {}

    def add(self, row: Row) -> None:
        """Adds a row."""
        rows, step = self.rows, row["step"]
        has_gone_back = rows and rows[-1]["step"] > step and self._goes_back(row)
        if has_gone_back:
            if rows[0]["step"] >= step:
                self.num_dropped += len(rows)
            while rows and rows[-1]["step"] > step:
                rows.pop()
            self._last = {k: min(x, step) for k, x in self._last.items()}
        i = len(rows) if not rows or rows[-1]["step"] < step else self._index(step)
        if i < len(rows) and rows[i]["step"] == step:
            old = rows[i]
            differs = any(x in row and old.get(x, row[x]) != row[x] for x in MEASURED)
            if differs and not has_gone_back:
                self.num_replaced[step] += 1
            rows[i] = {**old, **row}
        else:
            rows.insert(i, row)
        for name in row:
            self._last[name] = max(step, self._last.get(name, step))

    def _index(self, step: float) -> int:
        if self.rows[-1]["step"] == step:
            return len(self.rows) - 1
        return bisect_left(self.rows, step, key=_STEP)

    def _goes_back(self, row: Row) -> bool:
        named = [x for x in MEASURED if x in row] or row.keys() - _PLACE
        return any(self._last.get(x, -1) > row["step"] for x in named)
