"""From the inputs of an update to the observation that rules judge."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_guard._norms.two_words import add_in_two_words
from optax_guard._trees import increment
from optax_guard.stop._config import Config
from optax_guard.stop._inputs import Inputs
from optax_guard.stop._rule import Observation, as_int
from optax_guard.stop._state import EarlyStoppingState

# Of one update, so that no sum of them is infinite.
_MOST_SECONDS = 1e28


class Observed(NamedTuple):
    """An observation, and the parts of the next state that are known with it.

    Attributes:
      observation: The inputs of the rule.
      is_finite: Whether the value is finite, bool, shape ().
      train_seconds: Seconds of training so far, in two words, float32, shape () each.
      smooth_state: New state of the smoother, or ``()``.
    """

    observation: Observation
    is_finite: jax.Array
    train_seconds: tuple[jax.Array, jax.Array]
    smooth_state: Any


def observe(config: Config, inputs: Inputs, state: EarlyStoppingState) -> Observed:
    """Casts and smooths the value, and says whether it may be judged."""
    raw = config.sign * as_scalar("value", inputs.value)
    finite = jnp.isfinite(raw)
    num_evals = increment(state.num_evals)
    visible = num_evals > as_int(config.warmup)
    valid = finite & visible
    step, train_value = inputs.step, inputs.train_value
    seconds = state.train_seconds, state.train_seconds_rest
    if inputs.seconds is not None:
        passed = as_scalar("seconds", inputs.seconds)
        passed = jnp.where(passed > 0, passed, 0.0)  # NaN is no time.
        seconds = add_in_two_words(*seconds, jnp.minimum(passed, _MOST_SECONDS))
    if step is not None:
        step = as_scalar("step", step, jnp.int32)

    smoothed, smooth_state = raw, state.smooth_state
    if config.smooth is not None:
        smoothed, smooth_state = config.smooth.update(raw, state.smooth_state)
        smooth_state = optax.tree.where(valid, smooth_state, state.smooth_state)

    bad_counts = config.nonfinite == "wait"
    observation = Observation(
        value=smoothed,
        raw=raw,
        valid=valid,
        counts=(finite | bad_counts) & visible,
        num_evals=num_evals,
        sign=config.sign,
        metrics={k: as_scalar(f"value[{k!r}]", v) for k, v in inputs.metrics.items()},
        bad_counts=bad_counts,
        visible=visible,
        step=step,
        seconds=seconds[0],
        train_value=None if train_value is None else as_series(train_value),
        opt_state=inputs.opt_state,
    )
    return Observed(observation, finite, seconds, smooth_state)


def as_scalar(
    name: str, number: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Casts a real scalar to one dtype, and refuses anything else."""
    if jnp.ndim(number):
        raise ValueError(
            f"`{name}` must be a scalar, got shape {jnp.shape(number)}. Reduce it "
            "first (a mean over the data); for a population, vmap `update`."
        )
    if jnp.iscomplexobj(number):
        raise ValueError(f"`{name}` must be real, got dtype {number.dtype}.")
    return jnp.asarray(number, dtype)


def as_series(numbers: jax.Array) -> jax.Array:
    """Flattens the training values: one, or those since the last evaluation."""
    if jnp.iscomplexobj(numbers) or not jnp.size(numbers):
        raise ValueError(
            "`train_value` must be a real number or an array of some, got "
            f"{jnp.asarray(numbers).dtype}{list(jnp.shape(numbers))}."
        )
    return jnp.ravel(numbers)
