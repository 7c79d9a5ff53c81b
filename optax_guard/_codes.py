"""Codes for numbers that are not finite, so that a state holds finite numbers only.

Others read a state: a check of replicas, a monitor of checkpoints. To them a NaN is a
fault, also in a mere record of a step that was skipped. So a state holds the last
finite number in its place, and beside it a code of two bits that says what the number
is. One int32 holds the codes of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The codes. They are saved with states, and never change.
_FINITE, _NAN, _INF, _MINUS_INF = range(4)
_BITS = 2


def code_of(number: jax.Array) -> jax.Array:
    """Says whether a number is finite, and otherwise what it is."""
    sign = jnp.where(number < 0, _MINUS_INF, _NAN)
    infinite = jnp.where(number > 0, _INF, sign)
    return jnp.where(jnp.isfinite(number), _FINITE, infinite).astype(jnp.int32)


def packed(code: Any, place: int) -> Any:
    """A word with the code at one place; words are joined by ``|``."""
    return code << (_BITS * place)


def code_at(word: Any, place: int) -> Any:
    """The code at one place of a word."""
    return (word >> (_BITS * place)) & ((1 << _BITS) - 1)


def decoded(last: Any, code: Any) -> Any:
    """The number, from the last finite one and a code; of NumPy's arrays by NumPy."""
    if isinstance(last, (np.ndarray, np.generic)):
        others = np.array([0, np.nan, np.inf, -np.inf], last.dtype)
        return np.where(code == _FINITE, last, others[code])[()]
    return _decoded(last, code)


# Jitted for callers outside of `jit`: the constants would alarm a debugger of NaNs.
@jax.jit
def _decoded(last: jax.Array, code: jax.Array) -> jax.Array:
    others = [jnp.full_like(last, x) for x in (jnp.nan, jnp.inf, -jnp.inf)]
    return lax.select_n(code, last, *others)
