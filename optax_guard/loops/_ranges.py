"""Ranges of batches that are left out of a run."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# From the first batch of each to the one after its last, in order and apart.
Ranges = tuple[tuple[int, int], ...]


def as_ranges(given: Any) -> Ranges:
    """The ranges in order and apart, of a list or of the JSON file that it names."""
    if isinstance(given, str | os.PathLike):
        path = pathlib.Path(given)
        if not path.is_file():
            raise FileNotFoundError(
                f"`skip_steps` names a file that does not exist: {path}."
            )
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"`skip_steps` must name a JSON file such as [[1200, 1260]], got "
                f"{os.fspath(given)!r}: {error}."
            ) from error
    if not isinstance(given, Sequence):
        raise TypeError(
            "`skip_steps` must be a list of ranges such as [(1200, 1260)], or the name "
            f"of a JSON file, got {given!r}."
        )
    for each in given:
        is_pair = isinstance(each, Sequence) and len(each) == 2
        if not (
            is_pair and all(type(n) is int for n in each) and 0 <= each[0] < each[1]
        ):
            raise ValueError(
                "`skip_steps` must hold ranges of two whole numbers, the second above "
                f"the first, such as (1200, 1260), got {each!r}."
            )
    return merged((int(first), int(end)) for first, end in given)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same numbers, as ranges in order and apart."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def moved_up(index: int, ranges: Ranges) -> int:
    """The number at this index, among those that are in no range."""
    for first, end in ranges:
        if index >= first:
            index += end - first
    return index


def without(batch_at: Callable[[int], Any], ranges: Ranges) -> Callable[[int], Any]:
    """The batches that are in no range, counted from 0."""
    if not ranges:
        return batch_at
    return lambda index: batch_at(moved_up(index, ranges))


def all_left_out(
    by_rewinds: Sequence[Sequence[int]], ranges: Ranges, num_drawn: int
) -> Ranges:
    """The batches before the last one drawn that did not come.

    Args:
      by_rewinds: Ranges that rewinds have left out, among those in no range.
      ranges: Ranges that were left out from the start.
      num_drawn: How many have come or were left out by rewinds.
    """
    last = moved_up(num_drawn - 1, ranges)
    jumps = [
        (moved_up(first, ranges), moved_up(end - 1, ranges) + 1)
        for first, end in by_rewinds
        if first < end
    ]
    return merged([*jumps, *(each for each in ranges if each[0] < last)])
