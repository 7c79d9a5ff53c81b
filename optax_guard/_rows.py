"""Numbers of a state that share one array, and are read by their names.

Each array of an optimizer state costs a step some microseconds of dispatch, whatever
its size. On a small model, twenty scalars in twenty arrays cost more than the norm. So
a state keeps its scalars of one dtype in one row, the last axis of one array, and each
number has a name by an `Entry` of the state's class. To add a number, give the class an
`Entry` at the next free index, and give its value to `rows_of`. A row has room for 8
numbers, so the shape stays and saved states still load; unused numbers are zero.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from optax_guard._checks import check_whole

ROW_LENGTH = 8

State = TypeVar("State", bound=tuple[Any, ...])


class Entry:
    """The number at one index of a row, as an attribute of the state.

    Attributes:
      row: Name of the field that holds the row.
      index: Position in the row.
      dtype: The dtype of the row.
      is_flag: Whether the number is a bool, kept as 0 or 1.
    """

    def __init__(
        self, row: str, index: int, dtype: Any = jnp.int32, *, is_flag: bool = False
    ) -> None:
        self.row = row
        self.index = index
        self.dtype = dtype
        self.is_flag = is_flag

    @overload
    def __get__(self, state: None, owner: Any) -> "Entry": ...
    @overload
    def __get__(self, state: tuple[Any, ...], owner: Any) -> jax.Array: ...
    def __get__(
        self, state: tuple[Any, ...] | None, owner: Any = None
    ) -> "Entry | jax.Array":
        """The number; with the axes of the row but its last."""
        if state is None:
            return self
        row = getattr(state, self.row)
        return self._of(row)

    def _of(self, row: Any) -> Any:
        if isinstance(row, jax.ShapeDtypeStruct):
            dtype = jnp.bool_ if self.is_flag else row.dtype
            shape = row.shape[:-1]
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=_without_last_axis(row.sharding, len(shape))
            )
        if isinstance(row, jax.Array):
            check_whole(self.row, row.shape[-1], ROW_LENGTH)
            number = lax.index_in_dim(row, self.index, axis=-1, keepdims=False)
        else:  # A NumPy array, of which this is a scalar, or an `nnx.Variable`.
            number = row[..., self.index][()]
        return number != 0 if self.is_flag else number


def _without_last_axis(sharding: Any, ndim: int) -> Any:
    """How a number of a row is placed, if the row is placed like this."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[:ndim])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def entries_of(cls: type[Any]) -> dict[str, Entry]:
    """The numbers of a class of states, by name."""
    return {name: e for name, e in vars(cls).items() if isinstance(e, Entry)}


def rows_of(cls: type[Any], values: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    """The rows of a state from all of its numbers, which have one shape."""
    rows: dict[str, list[Any]] = {}
    for name, entry in entries_of(cls).items():
        number = jnp.asarray(values[name]).astype(entry.dtype)
        rows.setdefault(entry.row, []).append(number)
    return {
        name: jnp.stack(
            numbers + [jnp.zeros_like(numbers[0])] * (ROW_LENGTH - len(numbers)),
            axis=-1,
        )
        for name, numbers in rows.items()
    }


def empty_rows(cls: type[Any], shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Rows of zeros, each in a buffer of its own, for donation."""
    dtypes = {entry.row: entry.dtype for entry in entries_of(cls).values()}
    return {name: jnp.zeros((*shape, ROW_LENGTH), d) for name, d in dtypes.items()}


def replace_entries(state: State, **values: ArrayLike) -> State:
    """The state with other values of the numbers that are named."""
    old = {name: getattr(state, name) for name in entries_of(type(state))}
    rows: Any = rows_of(type(state), old | values)
    return state._replace(**rows)  # pyright: ignore[reportAttributeAccessIssue]
