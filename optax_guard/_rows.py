"""Numbers of a state that share one array, and are read by their names.

Each array of an optimizer state costs a step some microseconds of dispatch, whatever
its size. On a small model, twenty scalars in twenty arrays cost more than the norm. So
a state keeps its scalars of one dtype in one row, the last axis of one array, and each
number has a name by an `Entry` of the state's class. To add a number, give the class an
`Entry` at the next free index, and give its value to `rows_of`. A row has room for 8
numbers, so the shape stays and saved states still load; unused numbers are zero.

A number that may be NaN or infinite names a row of whole numbers in `codes=`. The row
then holds the last finite number that was in its place, and the last number of the
other row holds the codes. Read it by its name: the attribute is the number itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from optax_guard._checks import check_whole
from optax_guard._codes import code_at, code_of, decoded, packed

ROW_LENGTH = 8
# In a row of whole numbers, the index of the codes of another row.
_CODES = ROW_LENGTH - 1

State = TypeVar("State", bound=tuple[Any, ...])


class Kept(NamedTuple):
    """A number as a state keeps it: the last finite one, and its code."""

    last: jax.Array
    code: jax.Array


class Entry:
    """The number at one index of a row, as an attribute of the state.

    Attributes:
      row: Name of the field that holds the row.
      index: Position in the row.
      dtype: The dtype of the row.
      is_flag: Whether the number is a bool, kept as 0 or 1.
      codes: Name of the row with the code of the number; ``None`` if it is always
        finite.
    """

    def __init__(
        self,
        row: str,
        index: int,
        dtype: Any = jnp.int32,
        *,
        is_flag: bool = False,
        codes: str | None = None,
    ) -> None:
        self.row = row
        self.index = index
        self.dtype = dtype
        self.is_flag = is_flag
        self.codes = codes

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
        if self.codes is None or _is_shape(getattr(state, self.row)):
            return self._of(getattr(state, self.row))
        return decoded(*self.kept_in(state))

    def kept_in(self, state: tuple[Any, ...]) -> Kept:
        """The number as the state keeps it, if it has a code."""
        assert self.codes is not None
        word = _number_of(getattr(state, self.codes), self.codes, _CODES)
        return Kept(self._of(getattr(state, self.row)), code_at(word, self.index))

    def _of(self, row: Any) -> Any:
        if _is_shape(row):
            dtype = jnp.bool_ if self.is_flag else row.dtype
            shape = row.shape[:-1]
            return jax.ShapeDtypeStruct(
                shape, dtype, sharding=_without_last_axis(row.sharding, len(shape))
            )
        number = _number_of(row, self.row, self.index)
        return number != 0 if self.is_flag else number


def _is_shape(row: Any) -> bool:
    return isinstance(row, jax.ShapeDtypeStruct)


def _number_of(row: Any, name: str, index: int) -> Any:
    if isinstance(row, jax.Array):
        check_whole(name, row.shape[-1], ROW_LENGTH)
        return lax.index_in_dim(row, index, axis=-1, keepdims=False)
    # A NumPy array, of which this is a scalar, or an `nnx.Variable`.
    return row[..., index][()]


def _without_last_axis(sharding: Any, ndim: int) -> Any:
    """How a number of a row is placed, if the row is placed like this."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[:ndim])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def entries_of(cls: type[Any]) -> dict[str, Entry]:
    """The numbers of a class of states, by name."""
    return {name: e for name, e in vars(cls).items() if isinstance(e, Entry)}


def rows_of(
    cls: type[Any], values: Mapping[str, Any], before: Any = None
) -> dict[str, jax.Array]:
    """The rows of a state from all of its numbers, which have one shape.

    Args:
      cls: The class of the state.
      values: The numbers by name; those that a state keeps already may be ``Kept``.
      before: The state before. Where a number is not finite, the row holds its number;
        zero if there is none.
    """
    rows: dict[str, dict[int, Any]] = {}
    for name, entry in entries_of(cls).items():
        number = values[name]
        if entry.codes is not None:
            if not isinstance(number, Kept):
                number = _kept(jnp.asarray(number).astype(entry.dtype), entry, before)
            codes = rows.setdefault(entry.codes, {})
            word = packed(number.code, entry.index)
            codes[_CODES] = codes[_CODES] | word if _CODES in codes else word
            number = number.last
        number = jnp.asarray(number).astype(entry.dtype)
        rows.setdefault(entry.row, {})[entry.index] = number
    return {name: _stacked(numbers) for name, numbers in rows.items()}


def _kept(number: jax.Array, entry: Entry, before: Any) -> Kept:
    last = jnp.zeros_like(number) if before is None else entry.kept_in(before).last
    return Kept(jnp.where(jnp.isfinite(number), number, last), code_of(number))


def _stacked(numbers: dict[int, jax.Array]) -> jax.Array:
    zero = jnp.zeros_like(next(iter(numbers.values())))
    return jnp.stack([numbers.get(i, zero) for i in range(ROW_LENGTH)], axis=-1)


def empty_rows(cls: type[Any], shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Rows of zeros, each in a buffer of its own, for donation."""
    entries = entries_of(cls).values()
    dtypes = {entry.row: entry.dtype for entry in entries}
    dtypes |= {entry.codes: jnp.int32 for entry in entries if entry.codes is not None}
    return {name: jnp.zeros((*shape, ROW_LENGTH), d) for name, d in dtypes.items()}


def replace_entries(state: State, **values: ArrayLike) -> State:
    """The state with other values of the numbers that are named."""
    old: dict[str, Any] = {
        name: getattr(state, name) if entry.codes is None else entry.kept_in(state)
        for name, entry in entries_of(type(state)).items()
    }
    rows: Any = rows_of(type(state), old | values, state)
    return state._replace(**rows)  # pyright: ignore[reportAttributeAccessIssue]
