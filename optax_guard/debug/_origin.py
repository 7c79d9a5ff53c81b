"""The record of an origin: one operation, its line and the numbers that it read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._trees import is_inexact


class ArraySummary(NamedTuple):
    """The numbers of one array, in short.

    Attributes:
      shape: Its shape; under ``shard_map``, that of the part on one device.
      dtype: Name of its dtype.
      smallest: Its smallest entry that is no NaN, for complex numbers the smallest
        magnitude; ``None`` if there is no such entry.
      largest: Its largest entry, likewise.
      num_nan: Number of entries that are NaN.
      num_inf: Number of entries that are infinite.
    """

    shape: tuple[int, ...]
    dtype: str
    smallest: float | None
    largest: float | None
    num_nan: int
    num_inf: int

    def __str__(self) -> str:
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.smallest is not None:
            text += f" from {self.smallest:.6g} to {self.largest:.6g}"
        counts = {"NaN": self.num_nan, "Inf": self.num_inf}
        return text + "".join(f", {n} {name}" for name, n in counts.items() if n)


class NonfiniteOrigin(NamedTuple):
    """The operation that made a NaN or an Inf. ``str`` tells it as text for people.

    Attributes:
      kind: ``"nan"`` or ``"inf"``.
      primitive: Name of the JAX primitive, such as ``"div"``; ``"input"`` if an
        argument was bad already. The line is then one that reads it.
      filename: File of the line, never one of JAX or of a library on top of it as long
        as a caller is known.
      line: Number of the line. In the backward pass it is the forward line that is
        differentiated.
      function: Name of the function around it.
      source: Text of the line; empty if the file cannot be read.
      scope: Path of Linen modules and ``jax.named_scope``; empty if there is none.
      is_backward: Whether the operation belongs to the backward pass.
      operands: An `ArraySummary` of each operand.
      result: An `ArraySummary` of the result.
      num_bad: Number of entries of ``kind`` in the result.
      first_bad: Index of the first such entry.
      iteration: Iterations of the loops around it, outermost first, counted from 0; of
        ``lax.scan`` the index into its inputs. ``()`` outside of loops.
      advice: The usual cure; empty if none is known.
    """

    kind: str
    primitive: str
    filename: str
    line: int
    function: str
    source: str
    scope: str
    is_backward: bool
    operands: tuple[ArraySummary, ...]
    result: ArraySummary
    num_bad: int
    first_bad: tuple[int, ...]
    iteration: tuple[int, ...]
    advice: str

    def __str__(self) -> str:
        name = {"nan": "NaN", "inf": "Inf"}[self.kind]
        where = f"{self.filename}:{self.line}, in {self.function}"
        pass_name = "backward" if self.is_backward else "forward"
        lines = [f"{name} from `{self.primitive}` in the {pass_name} pass at {where}"]
        lines += [f"    {self.source}"] if self.source else []
        lines += [f"  scope: {self.scope}"] if self.scope else []
        if self.iteration:
            lines.append(f"  iteration: {', '.join(map(str, self.iteration))}")
        lines += [f"  operand {i}: {x}" for i, x in enumerate(self.operands)]
        lines.append(f"  result: {self.result}, the first at {list(self.first_bad)}")
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])


def is_bad(kind: str, x: jax.Array) -> jax.Array:
    """Which entries are of this kind; integers, bools and keys have none."""
    if not is_inexact(x):
        return jnp.zeros(x.shape, bool)
    return jnp.isnan(x) if kind == "nan" else jnp.isinf(x)


def first_bad_entry(kind: str, x: jax.Array) -> tuple[int, ...]:
    """The index of the first entry of this kind."""
    flat = int(jnp.argmax(is_bad(kind, x)))
    return tuple(int(i) for i in np.unravel_index(flat, x.shape))


def summarize(x: jax.Array) -> ArraySummary:
    """Counts and range, reduced on the device."""
    smallest = largest = None
    is_number = x.dtype == bool or jnp.issubdtype(x.dtype, np.number) or is_inexact(x)
    if is_number and x.size:
        size = jnp.abs(x) if jnp.iscomplexobj(x) else x
        is_nan = is_bad("nan", size)
        if size.dtype == bool or is_inexact(size):
            size = size.astype(jnp.promote_types(size.dtype, jnp.float32))
        if not bool(is_nan.all()):
            smallest = float(jnp.min(size, initial=jnp.inf, where=~is_nan))
            largest = float(jnp.max(size, initial=-jnp.inf, where=~is_nan))
    counts = (int(is_bad(kind, x).sum()) for kind in ("nan", "inf"))
    return ArraySummary(x.shape, str(x.dtype), smallest, largest, *counts)
