"""The order of judgment at an evaluation, the latch, and the best parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._rows import rows_of
from optax_guard._trees import increment
from optax_guard.stop._averaging import RecentParamsState, add_recent
from optax_guard.stop._config import Config
from optax_guard.stop._inputs import Inputs
from optax_guard.stop._observation import observe
from optax_guard.stop._rule import GONE_BAD, StopReason, as_int
from optax_guard.stop._state import (
    EarlyStoppingState,
    check_averages,
    check_like_kept,
    check_same_rule,
)


def judge(
    config: Config, inputs: Inputs, state: EarlyStoppingState
) -> EarlyStoppingState:
    """Returns the state after an evaluation; a stopped one changes no more."""
    check_same_rule(state, config.rule, config.smooth)
    check_averages(state, config.average_last is not None)
    check_like_kept("`params` of `update`", inputs.params, state)
    seen = observe(config, inputs, state)
    observation, step = seen.observation, seen.observation.step
    contender = observation.raw if config.best_on == "raw" else observation.value
    is_best = observation.valid & (contender < config.sign * state.best_value)
    verdict, rule_state = config.rule.update(observation, state.rule_state)

    streak = jnp.where(seen.is_finite, 0, increment(state.nonfinite_streak))
    should_stop, reason = verdict.fired, verdict.reason
    if config.nonfinite == "stop":
        is_bad = streak > as_int(config.max_nonfinite)
        should_stop |= is_bad
        reason = jnp.where(is_bad, int(StopReason.NONFINITE), reason)

    runs = ~state.should_stop
    numbers = {
        "num_evals": observation.num_evals,
        "best_eval": jnp.where(is_best, state.num_evals, state.best_eval),
        "best_step": jnp.where(is_best, -1 if step is None else step, state.best_step),
        "nonfinite_streak": streak,
        "stop_reason": jnp.where(should_stop, reason, int(StopReason.RUNNING)),
        "stopped_at": jnp.where(should_stop, state.num_evals, -1),
        "best_value": jnp.where(is_best, config.sign * contender, state.best_value),
        "train_seconds": seen.train_seconds[0],
        "value_rise": _rise(observation.raw, is_best, config.sign * state.best_value),
        "train_seconds_rest": seen.train_seconds[1],
    }
    new = EarlyStoppingState(
        should_stop=should_stop,
        is_best=is_best,
        is_significant=is_best if verdict.significant is None else verdict.significant,
        **rows_of(EarlyStoppingState, numbers),
        best_params=None,
        rule_state=rule_state,
        smooth_state=seen.smooth_state,
    )
    old = state._replace(best_params=None, recent_params=())
    new = optax.tree.where(runs, new, old)
    has_gone_bad = should_stop & jnp.isin(reason, jnp.array(GONE_BAD, jnp.int32))
    return new._replace(
        is_best=runs & new.is_best,
        is_significant=runs & new.is_significant,
        **_with_params(
            config,
            state,
            inputs.params,
            is_best=runs & is_best,
            is_healthy=runs & observation.valid & ~has_gone_bad,
        ),
    )


def _with_params(
    config: Config,
    state: EarlyStoppingState,
    params: Any,
    *,
    is_best: jax.Array,
    is_healthy: jax.Array,
) -> dict[str, Any]:
    """The fields that hold parameters, after an evaluation of these."""
    best, recent = state.best_params, state.recent_params
    fields: dict[str, Any] = {"best_params": best}
    if best is not None:
        fields["best_params"] = keep_or_take(is_best, best, params)
    if isinstance(recent, RecentParamsState) and config.average_last is not None:
        fields["recent_params"] = add_recent(
            recent, params, config.average_last, is_healthy
        )
    return fields


def _rise(y: jax.Array, is_best: jax.Array, best: jax.Array) -> jax.Array:
    """How much worse a value is than the best before it, as a share of that."""
    is_known = jnp.isfinite(y) & jnp.isfinite(best) & ~is_best
    size = jnp.maximum(jnp.abs(best), jnp.finfo(jnp.float32).tiny)
    rise = jnp.maximum(jnp.where(is_known, y - best, 0.0), 0.0)
    return jnp.minimum(rise / size, jnp.finfo(jnp.float32).max)


def keep_or_take(takes: jax.Array, kept: Any, params: Any) -> Any:
    """Takes the parameters or keeps the old ones, with no traffic when it keeps."""
    # Keep comes first: XLA then aliases the carry instead of copying it.
    return jax.lax.switch(
        takes.astype(jnp.int32),
        [
            lambda kept, params: kept,
            lambda kept, params: params,
        ],
        kept,
        params,
    )
