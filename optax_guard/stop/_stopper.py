"""Early stopping: the order of judgment, the latch, the best parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import (
    check_choice,
    check_count,
    check_flag,
    check_kind,
    check_leaves,
    check_number,
)
from optax_guard._trees import increment
from optax_guard.stop._inputs import (
    as_scalar,
    as_series,
    check_needs,
    check_same_params,
    check_same_rule,
    check_state,
    fixed,
    split,
)
from optax_guard.stop._rule import Observation, StopRule, as_int, check_rule, sign_of
from optax_guard.stop._rule import StopReason as StopReason
from optax_guard.stop._smoothing import Smoother
from optax_guard.stop._state import EarlyStopping as EarlyStopping
from optax_guard.stop._state import EarlyStoppingState as EarlyStoppingState
from optax_guard.stop._state import explain as explain


def early_stopping(
    rule: StopRule,
    *,
    mode: str = "min",
    nonfinite: str = "stop",
    max_nonfinite: ArrayLike = 0,
    smooth: Smoother | None = None,
    best_on: str = "raw",
    warmup: ArrayLike = 0,
    key: str | None = None,
) -> EarlyStopping:
    """Builds a stopper that stops a run by a rule and keeps its best parameters.

    At an evaluation, in this order: a stopped run changes no more (but the flags of
    the last update go to False); a non-finite value touches nothing but its count;
    the value is smoothed; the best moves; the rule is judged; the first to fire is
    latched with its reason. Everything is a pure function of arrays: it runs in a
    Python loop, where an update is one dispatch that waits for nothing, and inside
    `jit`, `scan`, `while_loop` and `vmap`.

    Args:
      rule: A rule of `optax_guard.stop`. Its numbers live here, not in the state, so
        that a resumed run follows the numbers it is given.
      mode: "min" if smaller values are better, "max" if larger are.
      nonfinite: What a NaN or infinite value means: "stop" stops, "wait" counts a
        bad evaluation, "ignore" does nothing.
      max_nonfinite: With "stop", non-finite values in a row to tolerate.
      smooth: `stop.ema(decay)` or `stop.median(k)`: rules judge the smoothed value,
        except `target` and `divergence`.
      best_on: "raw" or "smoothed": the value that decides which parameters are best.
      warmup: First evaluations to disregard, for the best as well; they are counted,
        and a non-finite value among them is still one.
      key: If ``value`` is a dict, the key of the value to judge. It alone defines the
        best; `stop.monitor` judges others.

    Returns:
      An `EarlyStopping` whose state is an `EarlyStoppingState`.

    Raises:
      TypeError: If ``rule`` is not a stop rule.
      ValueError: If an option is unknown or a concrete number out of range.

    Examples:
      >>> from optax_guard import early_stopping, stop
      >>> stopper = early_stopping(stop.patience(2))
      >>> state = stopper.init({"w": 0.0})
      >>> for loss, w in [(3.0, 1.0), (2.0, 2.0), (2.5, 3.0), (2.5, 4.0)]:
      ...     state = stopper.update(loss, state, {"w": w})
      >>> bool(state.should_stop), float(stopper.best(state, {"w": w})["w"])
      (True, 2.0)
    """
    check_rule(rule, "early_stopping")
    sign = sign_of(mode)
    check_choice("nonfinite", nonfinite, ("stop", "wait", "ignore"))
    check_choice("best_on", best_on, ("raw", "smoothed"))
    check_count("max_nonfinite", max_nonfinite, least=0)
    check_count("warmup", warmup, least=0)
    if key is not None:
        check_kind("key", key, str, "a string or None")
    if smooth is not None and not isinstance(smooth, Smoother):
        raise TypeError(
            "`smooth` must be a smoother such as `stop.ema(0.9)` or `stop.median(5)`, "
            f"got {smooth!r}."
        )

    def init(params: Any = None) -> EarlyStoppingState:
        return EarlyStoppingState(
            num_evals=jnp.asarray(0, jnp.int32),
            best_value=jnp.asarray(sign * np.inf, jnp.float32),
            best_eval=jnp.asarray(-1, jnp.int32),
            best_step=jnp.asarray(-1, jnp.int32),
            is_best=jnp.asarray(False),
            is_significant=jnp.asarray(False),
            nonfinite_streak=jnp.asarray(0, jnp.int32),
            train_seconds=jnp.asarray(0.0, jnp.float32),
            should_stop=jnp.asarray(False),
            stop_reason=jnp.asarray(int(StopReason.RUNNING), jnp.int32),
            stopped_at=jnp.asarray(-1, jnp.int32),
            best_params=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params),
            rule_state=rule.init(),
            smooth_state=() if smooth is None else smooth.init(),
        )

    def judge(
        value: jax.Array,
        metrics: dict[str, jax.Array],
        state: EarlyStoppingState,
        params: Any,
        step: jax.Array | None,
        seconds: jax.Array | None,
        train_value: jax.Array | None,
        opt_state: Any,
    ) -> EarlyStoppingState:
        check_same_rule(state, rule, smooth)
        check_same_params("`params` of `update`", params, state.best_params)
        raw = sign * as_scalar("value", value)
        finite = jnp.isfinite(raw)
        num_evals = increment(state.num_evals, True)
        visible = num_evals > as_int(warmup)
        valid = finite & visible
        train_seconds = state.train_seconds
        if seconds is not None:
            passed = as_scalar("seconds", seconds)
            train_seconds += jnp.where(passed > 0, passed, 0.0)  # NaN is no time.
        if step is not None:
            step = as_scalar("step", step, jnp.int32)

        smoothed, smooth_state = raw, state.smooth_state
        if smooth is not None:
            smoothed, smooth_state = smooth.update(raw, state.smooth_state)
            smooth_state = _select(valid, smooth_state, state.smooth_state)

        observation = Observation(
            value=smoothed,
            raw=raw,
            valid=valid,
            counts=(finite | (nonfinite == "wait")) & visible,
            num_evals=num_evals,
            sign=sign,
            metrics={k: as_scalar(f"value[{k!r}]", v) for k, v in metrics.items()},
            bad_counts=nonfinite == "wait",
            visible=visible,
            step=step,
            seconds=train_seconds,
            train_value=None
            if train_value is None
            else as_series("train_value", train_value),
            opt_state=opt_state,
        )
        contender = raw if best_on == "raw" else smoothed
        is_best = valid & (contender < sign * state.best_value)
        verdict, rule_state = rule.update(observation, state.rule_state)

        streak = jnp.where(finite, 0, increment(state.nonfinite_streak, True))
        should_stop, reason = verdict.fired, verdict.reason
        if nonfinite == "stop":
            is_bad = streak > as_int(max_nonfinite)
            should_stop |= is_bad
            reason = jnp.where(is_bad, int(StopReason.NONFINITE), reason)

        runs = ~state.should_stop
        new = EarlyStoppingState(
            num_evals=num_evals,
            best_value=jnp.where(is_best, sign * contender, state.best_value),
            best_eval=jnp.where(is_best, state.num_evals, state.best_eval),
            best_step=jnp.where(is_best, -1 if step is None else step, state.best_step),
            is_best=is_best,
            is_significant=(
                is_best if verdict.significant is None else verdict.significant
            ),
            nonfinite_streak=streak,
            train_seconds=train_seconds,
            should_stop=should_stop,
            stop_reason=jnp.where(should_stop, reason, int(StopReason.RUNNING)),
            stopped_at=jnp.where(should_stop, state.num_evals, -1),
            best_params=None,
            rule_state=rule_state,
            smooth_state=smooth_state,
        )
        new = _select(runs, new, state._replace(best_params=None))
        return new._replace(
            is_best=runs & new.is_best,
            is_significant=runs & new.is_significant,
            best_params=_keep_or_take(runs & is_best, state.best_params, params),
        )

    compiled_judge = jax.jit(judge)

    def update(
        value: ArrayLike | Mapping[str, ArrayLike],
        state: EarlyStoppingState,
        params: Any = None,
        *,
        step: ArrayLike | None = None,
        seconds: ArrayLike | None = None,
        train_value: ArrayLike | None = None,
        opt_state: Any = None,
    ) -> EarlyStoppingState:
        check_state("update", state)
        check_needs(
            rule.needs,
            step=step,
            seconds=seconds,
            train_value=train_value,
            opt_state=opt_state,
        )
        if isinstance(step, jax.Array):
            check_number("step", step)  # The host would wait for its value.
        elif step is not None:
            check_count("step", step, least=0)
        check_leaves("params", params)
        if "opt_state" in rule.needs:
            check_leaves("opt_state", opt_state)
        value, metrics = split(value, key, rule.keys)
        return compiled_judge(
            fixed("value", value),
            metrics,
            state,
            params,
            fixed("step", step, np.int32),
            fixed("seconds", seconds),
            fixed("train_value", train_value) if "train_value" in rule.needs else None,
            opt_state if "opt_state" in rule.needs else None,
        )

    @jax.jit
    def choose(has_best: jax.Array, best_params: Any, default: Any) -> Any:
        check_same_params("`default` of `best`", default, best_params)
        return _keep_or_take(~has_best, best_params, default)

    def best(state: EarlyStoppingState, default: Any) -> Any:
        check_state("best", state)
        if state.best_params is None:
            raise ValueError(
                "`best` finds no parameters in `state`: it was made by `init()`. Make "
                "it by `init(params)` and pass `params` to every `update`."
            )
        check_leaves("default", default)
        return choose(state.best_eval >= 0, state.best_params, default)

    def reset(
        state: EarlyStoppingState, *, keep_best: bool = True
    ) -> EarlyStoppingState:
        check_state("reset", state)
        check_flag("keep_best", keep_best)
        fresh = init()._replace(best_params=state.best_params)
        if not keep_best:
            return fresh
        return fresh._replace(
            num_evals=state.num_evals,
            best_value=state.best_value,
            best_eval=state.best_eval,
            best_step=state.best_step,
            train_seconds=state.train_seconds,
        )

    return EarlyStopping(init, update, best, reset, rule.needs)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _keep_or_take(takes: jax.Array, kept: Any, params: Any) -> Any:
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
