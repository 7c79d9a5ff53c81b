"""Sums and means of many numbers, kept in two words: the number, and its rest.

A number that is added to a large sum is rounded to the last place of the sum, and after
a million float32 numbers a percent of the sum is lost. Here the rest that an addition
rounds off is kept, and goes into the next. XLA does not simplify the differences below
away: it keeps the order of additions of floats.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_guard._trees import increment


class Mean(NamedTuple):
    """The mean of the finite values of a series.

    Attributes:
      words: The mean and its rest, float[2]; zeros without a value.
      num_values: Number of finite values, int32[].
    """

    words: jax.Array
    num_values: jax.Array


def no_values(dtype: Any = jnp.float32) -> Mean:
    """The mean of a series before its first value."""
    return Mean(jnp.zeros((2,), dtype), jnp.zeros((), jnp.int32))


def with_value(mean: Mean, value: jax.Array) -> Mean:
    """The mean with one more value, unless that is not finite."""
    is_finite = jnp.isfinite(value)
    count = increment(mean.num_values, is_finite)
    words = move_mean(mean.words[0], mean.words[1], value, count)
    return Mean(jnp.where(is_finite, jnp.stack(words), mean.words), count)


def mean_of(mean: Mean) -> jax.Array:
    """The mean, as one number; NaN without a value."""
    return jnp.where(mean.num_values > 0, mean.words[0], jnp.nan)


def move_mean(
    number: jax.Array, rest: jax.Array, value: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The mean of ``count`` values in two words, from that of all but the last.

    It moves by a share of the difference. So it is right for values of any size, where
    a sum would overflow, and its error does not grow with their number.
    """
    # Halves, because the difference of two numbers may overflow.
    difference = (0.5 * value - 0.5 * number) - 0.5 * rest
    share = difference * (2 / jnp.maximum(count, 1).astype(value.dtype))
    return add_in_two_words(number, rest, share)


def add_in_two_words(
    number: jax.Array, rest: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds a value to a number of two words.

    Args:
      number: The exact number, rounded.
      rest: The exact number less ``number``.
      value: Another number.

    Returns:
      The sum, rounded, and its rest: exact to the square of the dtype's precision.

    References:
      Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B
    """
    total = number + value
    added = total - number
    rest += (number - (total - added)) + (value - added)
    rounded = total + rest
    return rounded, rest - (rounded - total)
