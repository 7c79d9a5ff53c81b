"""The functions and the state of early stopping, and checks that a state fits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._rows import Entry
from optax_guard.stop._averaging import RecentParamsState, as_recent
from optax_guard.stop._rule import StopRule
from optax_guard.stop._smoothing import Smoother


class EarlyStoppingState(NamedTuple):
    """State of `early_stopping`; all of it belongs in a checkpoint.

    Evaluations are counted from 0. The numbers have shape (). The counts and the values
    are attributes, and share two arrays.

    Attributes:
      should_stop: Whether a rule has fired, bool; stays True until `reset`.
      is_best: Whether the last update set a new best, bool; False at first.
      is_significant: Whether the value of the last update improved by enough to
        count for the rules (as ``is_best`` if they do not say), bool; False at first.
      stop_counts: int32[8], the row of the six counts.
      stop_values: float32[8], the row of the three values.
      best_params: Parameters of the best evaluation, a copy of the tree given to
        `init` until there is one, or None if `init` was given none.
      rule_state: State of the rule.
      smooth_state: State of the smoother, or ``()``.
      recent_params: With ``average_last``, and if `init` was given parameters, a
        `stop.RecentParamsState`: the means that ``average`` is made of; else ``()``.
      num_evals: Evaluations seen, int32; 0 at first. Updates after the stop are not
        counted.
      best_value: Best value so far in the user's own sign, float32; at first the
        worst there is: +inf, or -inf for ``mode="max"``.
      best_eval: Evaluation that gave it, int32; -1 at first.
      best_step: ``step`` at that evaluation, int32; -1 at first and if not given.
      nonfinite_streak: Non-finite values in a row, int32; 0 at first.
      train_seconds: Sum of the ``seconds`` given, float32, however many there were; 0
        at first.
      value_rise: How much worse the last value is than the best, float32, as a share of
        the best's magnitude; 0 at first, at a best, and if it is not finite.
      train_seconds_rest: The rest of that sum, which float32 cannot hold beside it,
        float32; 0 at first.
      stop_reason: `StopReason` of the stop, int32; 0 (RUNNING) until then.
      stopped_at: Evaluation at which it fired, int32; -1 until then.
    """

    should_stop: jax.Array
    is_best: jax.Array
    is_significant: jax.Array
    stop_counts: jax.Array
    stop_values: jax.Array
    best_params: Any
    rule_state: Any
    smooth_state: Any
    recent_params: Any = ()

    num_evals = Entry("stop_counts", 0)
    best_eval = Entry("stop_counts", 1)
    best_step = Entry("stop_counts", 2)
    nonfinite_streak = Entry("stop_counts", 3)
    stop_reason = Entry("stop_counts", 4)
    stopped_at = Entry("stop_counts", 5)
    best_value = Entry("stop_values", 0, jnp.float32)
    train_seconds = Entry("stop_values", 1, jnp.float32)
    value_rise = Entry("stop_values", 2, jnp.float32)
    train_seconds_rest = Entry("stop_values", 3, jnp.float32)


class _Update(Protocol):
    def __call__(
        self,
        value: ArrayLike | Mapping[str, ArrayLike],
        state: EarlyStoppingState,
        params: Any = None,
        *,
        step: ArrayLike | None = None,
        seconds: ArrayLike | None = None,
        train_value: ArrayLike | None = None,
        opt_state: Any = None,
    ) -> EarlyStoppingState: ...


class _Reset(Protocol):
    def __call__(
        self, state: EarlyStoppingState, *, keep_best: bool = True
    ) -> EarlyStoppingState: ...


class EarlyStopping(NamedTuple):
    """Pure functions that decide when to stop and keep the best parameters.

    Attributes:
      init: ``init(params=None) -> state``. With parameters (any tree of arrays) the
        state carries copies of the best ones.
      update: ``update(value, state, params=None, *, step=None, seconds=None,
        train_value=None, opt_state=None) -> state``: tells the stopper the value of
        an evaluation, which is judged in float32, and the parameters it was computed
        with. ``step`` counts steps, below 2**31; ``seconds`` is the training time since
        the update before, also in float32, and is added up without loss;
        ``train_value`` is a number, or an array of those since then. An argument that
        is no number raises a ``TypeError``, one out of range a ``ValueError``.
      best: ``best(state, default) -> params``: the best parameters, or ``default``
        if there was no finite value.
      average: ``average(state, default) -> params``: the mean of the parameters at the
        last evaluations, for ``early_stopping(average_last=k)``, or ``default`` if
        none has entered it.
      reset: ``reset(state, *, keep_best=True) -> state``: lets a stopped run go on.
        Rules start afresh; totals and, unless ``keep_best=False``, the best and the
        average stay.
      needs: The names among ``step``, ``seconds``, ``train_value`` and ``opt_state``
        that `update` cannot do without.
    """

    init: Callable[..., EarlyStoppingState]
    update: _Update
    best: Callable[[EarlyStoppingState, Any], Any]
    average: Callable[[EarlyStoppingState, Any], Any]
    reset: _Reset
    needs: frozenset[str]


def check_state(where: str, state: object) -> None:
    """Refuses anything but a state of early stopping."""
    if not isinstance(state, EarlyStoppingState):
        raise TypeError(
            f"`state` of `{where}` must be the `EarlyStoppingState` that `init` "
            f"returned, got {type(state).__name__}. The order is update(value, state, "
            "params); a checkpoint is restored into `init(params)` as its target."
        )


def check_same_rule(
    state: EarlyStoppingState, rule: StopRule, smooth: Smoother | None
) -> None:
    """Refuses the state of a stopper with another rule or smoothing."""
    expected = (rule.init(), () if smooth is None else smooth.init())
    got = (state.rule_state, state.smooth_state)
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise ValueError(
            "`state` belongs to another stopper: its rule or smoothing has a state of "
            f"{jax.tree.structure(got)}, this one's is "
            f"{jax.tree.structure(expected)}. Make it with this stopper's `init`."
        )


def check_averages(state: EarlyStoppingState, averages: bool) -> None:
    """Refuses the state of a stopper that averages, if this one does not, and so on."""
    has_means = isinstance(state.recent_params, RecentParamsState)
    keeps_params = has_means or state.best_params is not None
    if keeps_params and has_means != averages:
        raise ValueError(
            "`state` belongs to another stopper: that one was built "
            f"{'with' if has_means else 'without'} `average_last`, this one was not so."
            " Make it with this stopper's `init`."
        )


def check_like_kept(name: str, params: Any, state: EarlyStoppingState) -> None:
    """Refuses parameters that are not like those of which the state keeps some."""
    kept, recent = state.best_params, state.recent_params
    if kept is None and isinstance(recent, RecentParamsState):
        # The best are on disk.
        params, kept = as_recent(params), recent.block_means[0]
    check_same_params(name, params, kept)


def check_same_params(name: str, params: Any, kept: Any) -> None:
    """Refuses parameters that are not like those kept in the state."""
    if params is None and kept is not None:
        raise ValueError(
            f"{name} are missing: `init` was given parameters, so every "
            "call needs those that gave the value. To keep none, call `init()`."
        )
    if kept is None and params is not None:
        raise ValueError(
            f"{name} have no place in `state`: it was made by `init()`. "
            "Make it by `init(params)` to keep the best, or pass none."
        )
    if jax.tree.structure(params) != jax.tree.structure(kept):
        raise ValueError(
            f"{name} must have the structure given to `init`, "
            f"{jax.tree.structure(kept)}, got {jax.tree.structure(params)}."
        )
    pairs = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(kept), strict=True)
    for (path, leaf), old in pairs:
        if (leaf.shape, leaf.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"{name} must be like those given to `init`: at "
                f"{jax.tree_util.keystr(path)} {old.dtype}{list(old.shape)}, got "
                f"{leaf.dtype}{list(leaf.shape)}."
            )
