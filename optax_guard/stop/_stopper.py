"""Early stopping: the functions that a stopper is made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_leaves
from optax_guard._models import arrays_of, with_statics_of
from optax_guard._public import answers_wrong_calls
from optax_guard._rows import replace_entries, rows_of
from optax_guard.stop._averaging import (
    RecentParamsState,
    as_recent,
    average_of,
    no_recent,
)
from optax_guard.stop._config import Config, checked_config
from optax_guard.stop._inputs import Inputs, prepare_inputs
from optax_guard.stop._judging import judge, keep_or_take
from optax_guard.stop._rule import StopReason, StopRule
from optax_guard.stop._smoothing import Smoother
from optax_guard.stop._state import (
    EarlyStopping,
    EarlyStoppingState,
    check_same_params,
    check_state,
)


@answers_wrong_calls
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
    average_last: ArrayLike | None = None,
) -> EarlyStopping:
    """Builds a stopper that stops a run by a rule and keeps its best parameters.

    At an evaluation this is the order:

    1. A run that has stopped does not change, but its flags `is_best` and
       `is_significant` become False.
    2. A non-finite value changes nothing but its count.
    3. The value is smoothed.
    4. The best value and the best parameters move.
    5. The rule judges. The first rule that is true stops the run for good, and the
       state holds its reason.

    Values are judged in float32, whose neighbours differ by a part in 16 million. Of
    losses near 2e8, the stopper does not tell those apart that differ by less than 16.
    Subtract a constant from such numbers of the host: ``update(loss - 2e8, ...)``.

    All is a pure function of arrays. It runs inside `jit`, `scan`, `while_loop` and
    `vmap`, and in a Python loop, where an update is one dispatch that does not wait.

    Args:
      rule: A rule of `optax_guard.stop`. Its numbers are not part of the state: a
        resumed run uses the numbers that are given then.
      mode: "min" if smaller values are better, "max" if larger are.
      nonfinite: How a NaN or infinite value is treated: "stop" stops, "wait" counts a
        bad evaluation, "ignore" does nothing.
      max_nonfinite: With "stop", how many non-finite values in a row are tolerated.
      smooth: `stop.ema(decay)` or `stop.median(k)`: rules judge the smoothed value,
        except `target` and `divergence`.
      best_on: "raw" or "smoothed": the value that decides which parameters are best.
      warmup: How many first evaluations are ignored, also for the best. They add to
        `num_evals`, and a non-finite value among them counts as non-finite.
      key: If ``value`` is a dict, the key of the value to judge. It alone defines the
        best; `stop.monitor` judges others.
      average_last: If k, the state also keeps the mean of the parameters at the last k
        to 2k - 1 evaluations, or at all if there were fewer. A whole number of at least
        1; it may be traced.

    The mean of ``average_last=k`` is over the last block of k evaluations that is full,
    and over those since then. So it takes two copies of the parameters for any k, in
    float32 where they are of half precision. ``average(state, params)`` returns it, at
    the stop or at any evaluation; the best parameters stay what they are. Left out are
    evaluations that are not finite, in the warm-up or after the stop, the one at which
    the run goes bad (DIVERGED, SKIP_STORM), and single entries that are not finite.
    Leaves that are not floating are the newest. Batch statistics do not belong to the
    mean: estimate them anew, with training batches that go through the model in its
    training mode with the averaged parameters.

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
      >>> stopper = early_stopping(stop.patience(2), average_last=2)
      >>> state = stopper.init({"w": 0.0})
      >>> for loss, w in [(3.0, 1.0), (2.0, 2.0), (2.5, 3.0), (2.5, 4.0)]:
      ...     state = stopper.update(loss, state, {"w": w})
      >>> float(stopper.average(state, {"w": w})["w"])
      3.5

    References:
      Polyak and Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, 1992; Izmailov et al., `Averaging weights
      leads to wider optima and better generalization
      <https://arxiv.org/abs/1803.05407>`_, 2018, also on batch statistics; of the last
      checkpoints: Kaddour, `Stop wasting my time!
      <https://arxiv.org/abs/2209.14981>`_, 2022.
    """
    config = checked_config(
        rule,
        mode,
        nonfinite,
        max_nonfinite,
        smooth,
        best_on,
        warmup,
        key,
        average_last,
    )

    def init(params: Any = None) -> EarlyStoppingState:
        return _initial_state(config, params)

    @jax.jit
    def compiled_judge(inputs: Inputs, state: EarlyStoppingState) -> EarlyStoppingState:
        return judge(config, inputs, state)

    @answers_wrong_calls
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
        given = Inputs(value, params, step, seconds, train_value, opt_state)
        return compiled_judge(prepare_inputs(config, given), state)

    @answers_wrong_calls
    def reset(
        state: EarlyStoppingState, *, keep_best: bool = True
    ) -> EarlyStoppingState:
        check_state("reset", state)
        check_flag("keep_best", keep_best)
        return _restart(config, state, keep_best)

    return EarlyStopping(init, update, best, average, reset, rule.needs)


def _initial_state(config: Config, params: Any) -> EarlyStoppingState:
    numbers = {
        "num_evals": 0,
        "best_eval": -1,
        "best_step": -1,
        "nonfinite_streak": 0,
        "stop_reason": StopReason.RUNNING,
        "stopped_at": -1,
        "best_value": config.sign * np.inf,
        "train_seconds": 0.0,
        "value_rise": 0.0,
        "train_seconds_rest": 0.0,
    }
    arrays = arrays_of(params)
    averages = config.average_last is not None and params is not None
    return EarlyStoppingState(
        should_stop=jnp.asarray(False),
        is_best=jnp.asarray(False),
        is_significant=jnp.asarray(False),
        **rows_of(EarlyStoppingState, numbers),
        best_params=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), arrays),
        rule_state=config.rule.init(),
        smooth_state=() if config.smooth is None else config.smooth.init(),
        recent_params=no_recent(arrays) if averages else (),
    )


def _restart(
    config: Config, state: EarlyStoppingState, keep_best: bool
) -> EarlyStoppingState:
    """Returns a state that runs; its trees of parameters keep their structure."""
    recent = state.recent_params
    if not keep_best and isinstance(recent, RecentParamsState):
        recent = recent._replace(block_sizes=jnp.zeros_like(recent.block_sizes))
    fresh = _initial_state(config, None)._replace(
        best_params=state.best_params, recent_params=recent
    )
    if not keep_best:
        return fresh
    return replace_entries(
        fresh,
        num_evals=state.num_evals,
        best_value=state.best_value,
        best_eval=state.best_eval,
        best_step=state.best_step,
        train_seconds=state.train_seconds,
        train_seconds_rest=state.train_seconds_rest,
    )


@answers_wrong_calls
def best(state: EarlyStoppingState, default: Any) -> Any:
    """Returns the best parameters, or ``default`` if there was no finite value."""
    check_state("best", state)
    if state.best_params is None:
        raise ValueError(
            "`best` finds no parameters in `state`: it was made by `init()`. Make "
            "it by `init(params)` and pass `params` to every `update`."
        )
    arrays = arrays_of(default)
    check_leaves("default", arrays)
    chosen = _choose_params(state.best_eval >= 0, state.best_params, arrays)
    return with_statics_of(default, chosen)


@answers_wrong_calls
def average(state: EarlyStoppingState, default: Any) -> Any:
    """Returns the mean of the last parameters, or ``default`` if there were none."""
    check_state("average", state)
    recent = state.recent_params
    if not isinstance(recent, RecentParamsState):
        raise ValueError(
            "`average` finds no parameters in `state`: build the stopper with "
            "`early_stopping(rule, average_last=5)`, make the state by `init(params)`, "
            "and pass `params` to every `update`."
        )
    arrays = arrays_of(default)
    check_leaves("default", arrays)
    return with_statics_of(default, _take_average(recent, arrays))


@jax.jit
def _take_average(recent: RecentParamsState, default: Any) -> Any:
    check_same_params(
        "`default` of `average`", as_recent(default), recent.block_means[0]
    )
    return average_of(recent, default)


@jax.jit
def _choose_params(has_best: jax.Array, kept: Any, default: Any) -> Any:
    check_same_params("`default` of `best`", default, kept)
    return keep_or_take(~has_best, kept, default)
