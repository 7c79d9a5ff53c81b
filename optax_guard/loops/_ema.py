"""A moving average of the parameters, evaluated and kept in their place."""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from optax_guard._checks import check_fraction, static_number
from optax_guard._guarding.accumulate_state import AccumulateState
from optax_guard._guarding.state import GuardState
from optax_guard._trees import increment, outermost_states
from optax_guard.loops._carrier import (
    Carrier,
    carried,
    evaluated,
    params_of_user,
    released,
)
from optax_guard.skip import SkipReason


@dataclasses.dataclass(frozen=True)
class EmaCarrier(Carrier):
    """Carries a state with the moving average of its parameters.

    To a loop the average is the parameters: a stopper and a checkpoint keep it.

    Attributes:
      state: The state as it is carried without an average.
      params: The average, in float32 where parameters are of half precision.
      num_averaged: int32[], steps in the average.
      decay: The weight of the average before, a number of Python.
    """

    state: Any
    params: Any
    num_averaged: Any
    decay: float

    @property
    def step(self) -> Any:
        return self.state.step

    @property
    def opt_state(self) -> Any:
        return self.state.opt_state

    @property
    def trained_params(self) -> Any:
        return self.state.params

    @property
    def batch_stats(self) -> Any:
        return getattr(self.state, "batch_stats", None)

    def replace(self, **fields: Any) -> Self:
        """The carrier with other values of fields."""
        own = {name: fields.pop(name) for name in ("params",) if name in fields}
        state = self.state.replace(**fields) if fields else self.state
        return dataclasses.replace(self, state=state, **own)

    def released(self) -> Any:
        """The user's state, with the parameters of the last step."""
        return released(self.state)

    def evaluated(self) -> Any:
        """The user's state, with the average for its parameters."""
        average = _cast(self.params, self.state.params)
        return evaluated(self.state.replace(params=average))

    def after_step(self, state: Any) -> Any:
        """The carrier after a step, which counts if it has changed the parameters."""
        if isinstance(self.state, Carrier):
            state = self.state.after_step(state)
        is_taken = _is_update(state.opt_state)
        number = increment(self.num_averaged, is_taken)
        # `optax.ema` divides its sum by 1 - decay**number. This is the same average.
        steps = jnp.maximum(number, 1).astype(jnp.float32)
        weight = (1 - self.decay) / -jnp.expm1(steps * math.log(self.decay))
        mix = functools.partial(_mixed, is_taken, jnp.minimum(weight, 1.0))
        average = jax.tree.map(mix, state.params, self.params)
        return EmaCarrier(state, average, number, self.decay)

    def params_of_user(self, params: Any) -> Any:
        """Averages, in the dtypes of the parameters."""
        return params_of_user(self.state, _cast(params, self.state.params))


jax.tree_util.register_dataclass(
    EmaCarrier, ["state", "params", "num_averaged"], ["decay"]
)


def with_ema(state: Any, ema: float | None) -> Any:
    """The state as a loop carries it, with an average of its parameters if asked."""
    state = carried(state)
    if ema is None:
        return state
    check_fraction("ema", ema)
    decay = float(static_number("ema", ema, "it is a constant of the step"))
    if not hasattr(state, "params"):
        return state  # `check_arguments` refuses it.
    average = jax.tree.map(lambda x: jnp.asarray(x, _wide(x)), state.params)
    return EmaCarrier(state, average, jnp.zeros((), jnp.int32), decay)


def ema_params(state: Any) -> Any:
    """The average after the last step, or ``None`` without one."""
    return state.params_of_user(state.params) if isinstance(state, EmaCarrier) else None


def _is_update(opt_state: Any) -> jax.Array:
    """Whether the last step was an update: it was not skipped, and closed a group."""
    facts = _facts_of(opt_state)
    return functools.reduce(jnp.logical_and, facts, jnp.ones((), bool))


def _facts_of(tree: Any) -> list[jax.Array]:
    kinds = GuardState, AccumulateState, optax.MultiStepsState
    facts = []
    for state in outermost_states(tree, kinds):
        if isinstance(state, GuardState):
            is_met, inner = state.skip_reason == SkipReason.NONE, state.wrapped_state
        elif isinstance(state, AccumulateState):
            is_met, inner = state.group_seen == 0, state.guard_state
        else:
            is_met, inner = jnp.asarray(state.mini_step) == 0, state.inner_opt_state
        facts += [is_met, *_facts_of(inner)]
    return facts


def _mixed(is_taken: jax.Array, weight: jax.Array, new: Any, old: Any) -> jax.Array:
    if not jnp.issubdtype(old.dtype, jnp.inexact):
        return new
    mixed: Any = optax.incremental_update(new.astype(old.dtype), old, weight)
    # A mask, because the parameters of a step that is not guarded may be NaN.
    return jnp.where(is_taken, mixed.astype(old.dtype), old)


def _wide(x: Any) -> Any:
    dtype = jnp.result_type(x)
    is_float = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.promote_types(dtype, jnp.float32) if is_float else dtype


def _cast(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)
