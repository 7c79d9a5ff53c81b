"""From a bad entry of a result to the entry of an operand that made it bad."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._trees import is_inexact
from optax_guard.debug._execution import Devices, Operation
from optax_guard.debug._origin import first_bad_entry, is_bad
from optax_guard.debug._program import Step

# Each entry of the result depends on the same entry of the operands.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp conj convert_element_type copy copy_p cos cosh digamma div erf
    erf_inv erfc exp exp2 expm1 floor igamma igamma_grad_a igammac imag integer_pow
    is_finite lgamma log log1p logistic max mesh_cast min mul neg nextafter not
    optimization_barrier pcast polygamma pow pvary real reduce_precision
    regularized_incomplete_beta rem reshard round rsqrt sharding_constraint sign sin
    sinh sqrt square stop_gradient sub tan tanh zeta
    """.split()  # noqa: SIM905 - a list of strings would take seventy lines
)
# They make a NaN from some finite operands, so replacing entries would prove nothing;
# or, as `pmap` of older JAX, they cannot run under `jit`.
_SOLVERS = frozenset(
    """
    cholesky custom_linear_solve eig eigh geqrf householder_product linear_solve lu qr
    schur svd triangular_solve tridiagonal tridiagonal_solve xla_pmap
    """.split()  # noqa: SIM905 - as above
)


class Entry(NamedTuple):
    """One entry of one of several arrays: which array, and the index in it."""

    position: int
    at: tuple[int, ...]


class Scene(NamedTuple):
    """One operation with its numbers, and the function that walks through a body.

    Attributes:
      walk_back: The function of that name.
      step: The operation.
      devices: Where it runs.
      operands: Its operands.
      kind: ``"nan"`` or ``"inf"``.
    """

    walk_back: Callable[..., Any]
    step: Step
    devices: Devices
    operands: Sequence[jax.Array]
    kind: str


def find_source(scene: Scene, entry: Entry) -> Entry | None:
    """The entry of an operand from which a bad entry of a result comes.

    Args:
      scene: The operation.
      entry: A bad entry of one of its results.

    Returns:
      A bad entry of an operand; ``None`` if the operation made it itself.
    """
    _, step, devices, operands, kind = scene
    name = step.eqn.primitive.name
    bad = [k for k, x in enumerate(operands) if bool(is_bad(kind, x).any())]
    if not bad:
        return None
    if name == "select_n":
        chosen = operands[0]
        which = int(chosen[entry.at[: chosen.ndim]]) + 1
        return Entry(which, entry.at)
    if name in _ELEMENTWISE:
        return _same_entry(operands, bad, entry.at, kind)
    if name in _SOLVERS:
        return Entry(bad[0], first_bad_entry(kind, operands[bad[0]]))
    stays_bad = functools.partial(
        _stays_bad,
        devices,
        Operation(step.eqn),
        kind,
        entry.position,
        np.array(entry.at, np.int32),
        tuple(operands),
    )
    return _search(stays_bad, operands, bad, entry.at, kind)


def _same_entry(
    operands: Sequence[jax.Array], bad: list[int], index: tuple[int, ...], kind: str
) -> Entry | None:
    """The first operand that is bad at the same index."""
    for k in bad:
        at = index[: operands[k].ndim]  # An operand may be a scalar.
        if bool(is_bad(kind, operands[k])[at]):
            return Entry(k, at)
    return None


def _search(
    stays_bad: Any,
    operands: Sequence[jax.Array],
    bad: list[int],
    index: tuple[int, ...],
    kind: str,
) -> Entry | None:
    """Replaces bad entries by ones until one is left that makes the result bad."""
    kept = np.zeros((len(operands), 2), np.int32)
    if stays_bad(kept):
        return None
    chosen = bad[0]
    for k in bad:
        kept[:] = 0
        kept[k, 1] = operands[k].size
        chosen = k
        if stays_bad(kept):
            break
    else:  # None is enough alone, such as one of two infinities in a sum of maxima.
        kept[:, 1] = [x.size for x in operands]
        chosen = bad[0]
    shape = operands[chosen].shape
    if shape and len(shape) == len(index) and all(map(int.__lt__, index, shape)):
        flat = int(np.ravel_multi_index(index, shape))
        guess = kept.copy()
        guess[chosen] = flat, flat + 1
        if bool(is_bad(kind, operands[chosen])[index]) and stays_bad(guess):
            return Entry(chosen, index)
    while kept[chosen, 1] - kept[chosen, 0] > 1:
        half = kept.copy()
        half[chosen, 1] = kept[chosen].sum() // 2
        if not stays_bad(half):
            half = kept.copy()
            half[chosen, 0] = kept[chosen].sum() // 2
            if not stays_bad(half):  # It takes entries of both halves.
                break
        kept = half
    low, high = (int(x) for x in kept[chosen])
    flags = np.asarray(is_bad(kind, operands[chosen])).reshape(-1)
    flat = low + int(np.argmax(flags[low:high]))
    return Entry(chosen, tuple(int(i) for i in np.unravel_index(flat, shape)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _stays_bad(
    devices: Devices,
    operation: Operation,
    kind: str,
    position: int,
    index: jax.Array,
    operands: tuple[jax.Array, ...],
    kept: jax.Array,
) -> jax.Array:
    """Whether an entry of a result is bad with only some bad entries of the operands.

    Args:
      devices: Where the operation runs.
      operation: The operation.
      kind: ``"nan"`` or ``"inf"``.
      position: Which of its results.
      index: int32[ndim], the entry of the result.
      operands: The operands.
      kept: int32[num_operands, 2], the range of entries, counted through the array,
        in which bad ones are kept. Others become 1.
    """
    cleaned = [
        _replaced(kind, x, kept[k, 0], kept[k, 1]) for k, x in enumerate(operands)
    ]
    result = devices.apply(operation, cleaned, operation.varying())[position]
    return is_bad(kind, result)[tuple(index)]


def _replaced(kind: str, x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    if not is_inexact(x):
        return x
    number = lax.iota(np.int32, x.size).reshape(x.shape)
    is_replaced = is_bad(kind, x) & ((number < low) | (number >= high))
    return jnp.where(is_replaced, jnp.ones((), x.dtype), x)
