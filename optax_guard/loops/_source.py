"""The batches of a run: a function of the step, or an iterator that may have a state.

An iterator with ``get_state()`` and ``set_state(state)``, such as Grain's, goes on
after a restart with the batch that comes next. Its state is written as JSON.
"""

import base64
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# The mark that a source of batches returns when there are no more.
END = object()
# The key of what JSON has no type for.
_KIND = "__kind__"


class Source:
    """The batches of a run.

    Args:
      batches: A function ``step -> batch``, or an iterable.

    Attributes:
      at: The batch of a step, or `END`.
    """

    def __init__(self, batches: Any):
        self._iterator: Any = None
        self._is_function = callable(batches)
        if callable(batches):
            self.at: Callable[[int], Any] = batches
            return
        # An array without axes has the type of an iterable, but is none.
        if not isinstance(batches, Iterable) or getattr(batches, "shape", None) == ():
            raise TypeError(
                "`batches` must be a function `step -> batch` or an iterable of "
                f"batches, got {batches!r}."
            )
        iterator = iter(batches)
        self.at = lambda step: next(iterator, END)
        for owner in (iterator, batches):
            if hasattr(owner, "get_state") and hasattr(owner, "set_state"):
                self._iterator = owner
                break

    def state(self) -> list[Any] | None:
        """The iterator's state on each process, for JSON; ``None`` without one."""
        if self._iterator is None:
            return None
        own = as_json(self._iterator.get_state())
        if jax.process_count() == 1:
            return [own]
        return [json.loads(text) for text in _gathered(json.dumps(own))]

    def restore(self, saved: list[Any] | None, directory: str) -> None:
        """Sets the iterator to the state with which a checkpoint was saved."""
        if self._iterator is None:
            # A function knows the batch of each step.
            return
        if saved is None or len(saved) != jax.process_count():
            count = 0 if saved is None else len(saved)
            raise ValueError(
                "`batches` must be the iterators of the run that is resumed, one a "
                f"process: the checkpoint in {directory} holds the states of {count}, "
                f"and {jax.process_count()} processes run now. Pass a function "
                "`step -> batch`, or give another directory."
            )
        self._iterator.set_state(from_json(saved[jax.process_index()]))

    @property
    def is_resumable(self) -> bool:
        """Whether it can go on with the right batch after a restart."""
        return self._is_function or self._iterator is not None


def as_json(state: Any) -> Any:
    """A tree of numbers, texts, bytes and arrays as JSON can hold it."""
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if isinstance(state, np.bool_ | np.integer | np.floating):
        return state.item()
    if isinstance(state, list):
        return [as_json(x) for x in state]
    if isinstance(state, dict) and all(isinstance(key, str) for key in state):
        return {key: as_json(x) for key, x in state.items()}
    if isinstance(state, tuple):
        return {_KIND: "tuple", "items": [as_json(x) for x in state]}
    if isinstance(state, bytes):
        return {_KIND: "bytes", "data": base64.b64encode(state).decode()}
    if isinstance(state, np.ndarray | np.generic | jax.Array):
        array = np.asarray(state)
        if not array.dtype.hasobject:
            return {
                _KIND: "array",
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "data": base64.b64encode(array.tobytes()).decode(),
            }
    raise TypeError(
        "`get_state()` of `batches` must return numbers, texts, bytes, arrays, or "
        f"lists, tuples and dicts of these, to be saved; got a `{type(state).__name__}`"
    )


def from_json(saved: Any) -> Any:
    """The tree of which `as_json` made this."""
    if isinstance(saved, list):
        return [from_json(x) for x in saved]
    if not isinstance(saved, dict):
        return saved
    kind = saved.get(_KIND)
    if kind is None:
        return {key: from_json(x) for key, x in saved.items()}
    if kind == "tuple":
        return tuple(from_json(x) for x in saved["items"])
    data = base64.b64decode(saved["data"])
    if kind == "bytes":
        return data
    array = np.frombuffer(data, np.dtype(saved["dtype"])).reshape(saved["shape"])
    return array.copy()


def _gathered(text: str) -> list[str]:
    """The texts of all processes, on each."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
    ]
