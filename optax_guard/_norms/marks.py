"""Marks tell which leaves of a tree are not finite, with a bit for each.

They are int32[2, 4]. A bit of the first four words tells of a NaN, a bit of the last
four of an infinity. Both tell that it is not known which.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# To name bad leaves, devices must exchange a mark for each leaf. One all-reduce takes
# up to this many marks; in a tree with more leaves, a run of neighbours shares one.
MAX_RUNS = 128
# So long a run holds the same leaf of several layers, which one reduction adds up.
_RUN_LENGTH = 32
_BITS = 32
NUM_WORDS = MAX_RUNS // _BITS
_PLACES = np.arange(_BITS, dtype=np.int32)


def run_size(num_leaves: Any, xp: Any = np) -> Any:
    """Says how many neighbouring leaves make a run, for NumPy or ``jax.numpy``."""
    longer = xp.maximum(_RUN_LENGTH, -(-num_leaves // MAX_RUNS))
    return xp.where(num_leaves <= MAX_RUNS, 1, longer)[()]


def no_marks() -> jax.Array:
    return jnp.zeros((2, NUM_WORDS), jnp.int32)


def marks_of(values: jax.Array, runs: Sequence[int] | np.ndarray) -> jax.Array:
    """Marks the runs with a value that is not finite.

    Args:
      values: float[n].
      runs: For each value the number of its run.
    """
    number = jnp.asarray(np.asarray(runs, np.int32))[None]
    is_of_word = number // _BITS == jnp.arange(NUM_WORDS, dtype=jnp.int32)[:, None]
    bits = jnp.where(is_of_word, jnp.left_shift(jnp.int32(1), number % _BITS), 0)
    kinds = jnp.stack([jnp.isnan(values), jnp.isinf(values)])
    return lax.reduce_or(jnp.where(kinds[:, None], bits[None], 0), (2,))


def marks_of_leaf(leaf: Any, num_leaves: Any) -> jax.Array:
    """Marks of unknown kind in rows, int32[..., 8], as ``first_leaf`` reads them."""
    run = jnp.asarray(leaf // run_size(num_leaves, jnp))[..., None]
    is_run = (run == jnp.arange(MAX_RUNS)).reshape(*run.shape[:-1], NUM_WORDS, _BITS)
    words = packed(is_run)
    return jnp.concatenate([words, words], axis=-1)


def of_unknown_kind(marks: jax.Array) -> jax.Array:
    """The same marks, where a NaN cannot be told from an infinity."""
    return marks | marks[::-1]


def unpacked(words: Any) -> Any:
    """The bits of words along a new last axis; of NumPy's arrays by NumPy."""
    return (words[..., None] >> _PLACES.reshape((1,) * words.ndim + (_BITS,))) & 1


def packed(bits: jax.Array) -> jax.Array:
    """The words of bools along the last axis."""
    powers = jnp.left_shift(jnp.int32(1), _PLACES)
    powers = powers.reshape((1,) * (bits.ndim - 1) + (_BITS,))
    return jnp.sum(jnp.where(bits, powers, 0), axis=-1, dtype=jnp.int32)


def kinds_of_runs(rows: Any) -> Any:
    """For marks in rows, int32[..., 8], which runs are bad: bool[..., 2, 128]."""
    return (unpacked(rows) != 0).reshape(*rows.shape[:-1], 2, MAX_RUNS)


def first_leaf(rows: Any, num_leaves: Any) -> Any:
    """The first leaf of the first run that is marked, -1 if there is none.

    Args:
      rows: int32[..., 8], marks.
      num_leaves: int32[...], leaves of the tree.
    """
    xp = np if isinstance(rows, np.ndarray) else jnp
    is_bad = xp.any(kinds_of_runs(rows), axis=-2)
    first = xp.argmax(is_bad, axis=-1) * run_size(num_leaves, xp)
    return xp.where(xp.any(is_bad, axis=-1), first, -1).astype(np.int32)
