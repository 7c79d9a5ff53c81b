"""Several steps in one dispatch, where a dispatch takes longer than a step."""

import time
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A state or batch with more bytes is at work for longer than its dispatch takes.
_MOST_STATE_BYTES = 1 << 19
_MOST_WAITING_BYTES = 1 << 18
# With more steps the rest of a dispatch is below a tenth of a microsecond a step.
_MOST_STEPS = 32
# Where batches come slowly, the device must not wait for a group of them.
_MOST_SECONDS = 1e-3
# Groups under way, so that a Ctrl-C need not wait for many. With two the device has
# work while the host waits for the first, and where that takes long, smaller groups do.
_MOST_UNDER_WAY = 2
_SLOW_SECONDS = 5e-3


class Apart(NamedTuple):
    """The arrays of one leaf that lie on the device, one for each batch."""

    arrays: list[jax.Array]


def stacked(batches: Any) -> Any:
    """The batches of a group along a leading axis."""
    return jax.tree.map(
        lambda x: jnp.stack(x.arrays) if isinstance(x, Apart) else x,
        batches,
        is_leaf=lambda x: isinstance(x, Apart),
    )


class Group:
    """Batches that wait to be dispatched together.

    A group of one kind of batch always has room for the same number, and one program
    takes the number that wait as an argument. So a step gives the same bits in whatever
    company it is dispatched, and the clock may decide when.

    Args:
      most_steps: Largest number of batches that may wait.
      devices: The devices of the state.

    Attributes:
      size: Number of batches that wait.
    """

    def __init__(self, most_steps: int, devices: Set[Any]):
        self.size = 0
        self._most_steps = self._limit = min(most_steps, _MOST_STEPS)
        self._devices = devices
        self._room = 0
        self._structure: Any = None
        self._first: list[Any] = []
        self._columns: list[np.ndarray | Apart] = []
        self._opened_at = 0.0
        self._under_way: list[jax.Array] = []

    def add(self, batch: Any) -> bool:
        """Takes the batch, if it is of the kind of those that wait.

        An array of NumPy is copied, because the user may write the next into it.
        """
        leaves, structure = jax.tree.flatten(batch)
        if self.size == 0:
            if not self._open(leaves, structure):
                return False
        elif structure != self._structure or not self._fit(leaves):
            return False
        for column, leaf in zip(self._columns, leaves, strict=True):
            if isinstance(column, Apart):
                column.arrays.append(leaf)
            else:
                column[self.size] = leaf
        self.size += 1
        return True

    def is_due(self) -> bool:
        """Whether the group is full, or its first batch has waited for long."""
        is_full = self.size >= min(self._room, self._limit)
        return is_full or time.perf_counter() - self._opened_at > _MOST_SECONDS

    def take(self) -> tuple[Any, np.int32]:
        """The batches for `stacked`, and how many they are. Then none waits."""
        for column in self._columns:
            if isinstance(column, Apart):
                # The program has room for all.
                column.arrays.extend(column.arrays[-1:] * (self._room - self.size))
        batches = jax.tree.unflatten(self._structure, self._columns)
        size, self.size = self.size, 0
        # The program may read its arguments in place, so they are not used again.
        self._columns, self._first = [], []
        return batches, np.int32(size)

    def wait(self) -> None:
        """Waits until few enough groups are under way to dispatch the next."""
        if len(self._under_way) < _MOST_UNDER_WAY:
            return
        began = time.perf_counter()
        self._under_way.pop(0).block_until_ready()
        if time.perf_counter() - began > _SLOW_SECONDS:
            self._limit = max(1, self._limit // 2)
        else:
            self._limit = min(self._most_steps, 2 * self._limit)

    def follow(self, done: jax.Array) -> None:
        """Counts a group as under way until this array is there."""
        self._under_way.append(done)

    def _open(self, leaves: list[Any], structure: Any) -> bool:
        if not all(self._is_suited(leaf) for leaf in leaves):
            return False
        num_bytes = sum(leaf.nbytes for leaf in leaves)
        self._room = min(self._most_steps, _MOST_WAITING_BYTES // max(1, num_bytes))
        if self._room < 2:
            return False
        self._structure, self._first = structure, leaves
        # A place that no batch fills is 0: JAX may cast it, and a cast may overflow.
        self._columns = [
            Apart([])
            if isinstance(leaf, jax.Array)
            else np.zeros((self._room, *leaf.shape), leaf.dtype)
            for leaf in leaves
        ]
        self._opened_at = time.perf_counter()
        return True

    def _is_suited(self, leaf: Any) -> bool:
        # A weak type, as a number of Python has, would be lost in a stack.
        if isinstance(leaf, jax.Array):
            is_weak = getattr(leaf, "weak_type", False)  # A key has no such field.
            return not is_weak and leaf.sharding.device_set == self._devices
        return type(leaf) is np.ndarray or isinstance(leaf, np.generic | np.memmap)

    def _fit(self, leaves: list[Any]) -> bool:
        for first, leaf in zip(self._first, leaves, strict=True):
            if type(leaf) is not type(first):
                return False
            if leaf.dtype != first.dtype or leaf.shape != first.shape:
                return False
            if isinstance(leaf, jax.Array) and not self._is_suited(leaf):
                return False
        return True


def open_group(
    train_step: Callable[[Any, Any], Any], state: Any, batch: Any, eval_every: int
) -> Group | None:
    """A group for the steps of a run, or ``None`` if each is dispatched alone.

    This depends on sizes and settings alone, not on the time that steps take: the run
    would else not be the same to the last bit each time.

    Args:
      train_step: The function that the run traces.
      state: The train state.
      batch: The first batch.
      eval_every: Steps between evaluations. A group ends at each.
    """
    leaves = jax.tree.leaves(state)
    if sum(leaf.nbytes for leaf in leaves) > _MOST_STATE_BYTES:
        return None
    devices = set().union(*(leaf.sharding.device_set for leaf in leaves))
    # An accelerator is at work while the host dispatches the next step, and a loop over
    # a number of steps that the compiler does not know may wait for the host.
    if len(devices) != 1 or next(iter(devices)).platform != "cpu":
        return None
    config: Any = jax.config
    if config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs:
        return None  # Each step is looked at.
    # With callbacks or prints, users see when a step runs.
    if jax.jit(train_step).trace(state, batch).jaxpr.effects:
        return None
    return Group(eval_every, devices) if eval_every > 1 else None
