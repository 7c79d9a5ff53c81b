"""Sums over the steps between two evaluations, kept on the device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import in_range
from optax_guard._guarding.readout import metrics
from optax_guard._guarding.state import GuardState
from optax_guard._norms.statistics import NormStats
from optax_guard._norms.two_words import Mean, mean_of, no_values, with_value
from optax_guard._trees import find_states
from optax_guard.loops._carrier import on_carrier, shown
from optax_guard.loops._compiled import CompiledFor
from optax_guard.loops._group import stacked

# Skipped steps, and the micro-batches that an accumulation has dropped.
_TOTALS = ("num_skipped", "num_dropped")
# Measurements of a step that only some clips make, or the bound on updates.
_OF_CLIPS = ("update_cosine", "entries_clipped", "units_clipped", "update_ratio")
_MEAN_NORM = "grad_norm_mean"


class Norms(NamedTuple):
    """Counts of updates, and the largest of their finite norms.

    Attributes:
      num_updates: int32[].
      num_clipped: int32[].
      num_nonfinite: int32[].
      grad_norm: float32[], largest norm before clipping; -1 before the first.
      clipped_norm: float32[], after clipping, of that same update.
      clip_threshold: float32[], in force at that same update.
    """

    num_updates: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    grad_norm: jax.Array
    clipped_norm: jax.Array
    clip_threshold: jax.Array


class Interval(NamedTuple):
    """Means and counts since the last evaluation.

    Attributes:
      means: The mean of each metric of the step, by its name in the row, in float32 or
        wider.
      norms: A `Norms`, or ``None`` if nothing in the state measures norms.
      num_skipped: int32[], steps skipped, or ``None`` without a guard.
    """

    means: dict[str, Mean]
    norms: Norms | None
    num_skipped: jax.Array | None


def first_interval(
    train_step: Callable[[Any, Any], Any], state: Any, batch: Any
) -> Interval:
    """An empty interval for the results of this step, which are checked."""
    # With `jit`, the step is traced here and not a second time later.
    result = jax.eval_shape(jax.jit(train_step), state, batch)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "`train_step` must return `(state, metrics)`, got a "
            f"`{type(result).__name__}`."
        )
    _check_same_state(state, result[0])
    found = _as_dict(result[1])
    for name, value in found.items():
        if not hasattr(value, "shape") or value.shape != ():
            raise ValueError(
                f"`train_step` must return scalars as metrics, got {value} for "
                f"{name!r}. Take the mean over the batch."
            )
    if "loss" not in found:
        raise ValueError(
            "`train_step` must return the loss, alone or in a dict under the key "
            f"'loss'; got the keys {sorted(found)}."
        )
    stats = find_states(state, NormStats)
    # Its names alone: the host must not wait for the numbers.
    known = set(jax.eval_shape(metrics, state)) if stats else set()
    dtypes = {
        f"train_{name}": jnp.promote_types(value.dtype, jnp.float32)
        for name, value in found.items()
        if name not in known
    }
    measured = [name for name in _OF_CLIPS if name in known]
    if stats:
        measured.append(_MEAN_NORM)
    dtypes |= dict.fromkeys(measured, jnp.dtype(jnp.float32))
    return _empty(dtypes, bool(stats), bool(find_states(state, GuardState)))


def totals(found: Mapping[str, Any]) -> dict[str, Any]:
    """The counts among `metrics` that go into a row of the history unchanged."""
    return {name: found[name] for name in _TOTALS if name in found}


def with_metrics_in_range(
    train_step: Callable[[Any, Any], Any],
) -> Callable[[Any, Any], Any]:
    """The function of the carried state, with no number that JAX would refuse."""
    train_step = on_carrier(train_step)

    def step(state: Any, batch: Any) -> Any:
        result = train_step(state, batch)
        if not (isinstance(result, tuple) and len(result) == 2):
            return result  # `first_interval` refuses it.
        as_traced = functools.partial(in_range, "metrics")
        return result[0], jax.tree.map(as_traced, result[1])

    return step


def add_step(
    train_step: Callable[[Any, Any], Any], state: Any, interval: Interval, batch: Any
) -> tuple[Any, Interval]:
    """Takes one step and adds it to the interval."""
    new_state, found = jax.jit(train_step, inline=True)(state, batch)
    return new_state, _add(interval, _as_dict(found), state, new_state)


class Step(NamedTuple):
    """The step of a run.

    Attributes:
      train_step: The user's function. It is the same object for each run, as a bound
        method is not, so that it is traced once.
      run_step: `add_step` with it, compiled. State and interval are donated.
      run_steps: The same for the first batches of a `Group`, as many as its last
        argument says. It also returns an array that is there when they are done.
    """

    train_step: Callable[[Any, Any], Any]
    run_step: Callable[[Any, Interval, Any], tuple[Any, Interval]]
    run_steps: Callable[[Any, Interval, Any, ArrayLike], tuple[Any, Interval, Any]]


@CompiledFor
def compiled_step(get_train_step: Callable[[], Any]) -> Step:
    """The step of runs with one ``train_step``."""

    @with_metrics_in_range
    def train_step(state: Any, batch: Any) -> Any:
        return get_train_step()(state, batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run_step(state: Any, interval: Interval, batch: Any) -> tuple[Any, Interval]:
        return add_step(train_step, state, interval, batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run_steps(
        state: Any, interval: Interval, batches: Any, num_steps: jax.Array
    ) -> tuple[Any, Interval, Any]:
        new = _add_steps(train_step, state, interval, batches, num_steps)
        # A copy, because JAX may hand out an argument itself, which is there at once.
        return *new, jnp.copy(num_steps)

    return Step(train_step, run_step, run_steps)


def _add_steps(
    train_step: Callable[[Any, Any], Any],
    state: Any,
    interval: Interval,
    batches: Any,
    num_steps: jax.Array,
) -> tuple[Any, Interval]:
    batches = stacked(batches)

    def add(i: jax.Array, carry: tuple[Any, Interval]) -> tuple[Any, Interval]:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        return add_step(train_step, *carry, jax.tree.map(take, batches))

    # The number is traced, so the compiler makes one loop for all numbers.
    return jax.lax.fori_loop(0, num_steps, add, (state, interval))


def close(interval: Interval) -> tuple[dict[str, jax.Array], Interval]:
    """The interval's row of means, rates and norms, and an empty interval."""
    row = {name: mean_of(mean) for name, mean in interval.means.items()}
    norms = interval.norms
    if norms is not None:
        num_finite = norms.num_updates - norms.num_nonfinite
        worst = norms.grad_norm, norms.clipped_norm, norms.clip_threshold
        before, after, threshold = (
            jnp.where(num_finite > 0, x, jnp.nan) for x in worst
        )
        row |= {
            "grad_norm": before,
            "clipped_norm": after,
            "clip_threshold": threshold,
            "clip_rate": _share(norms.num_clipped, norms.num_updates),
            "nonfinite_rate": _share(norms.num_nonfinite, norms.num_updates),
        }
        if interval.num_skipped is not None:
            row["skip_rate"] = _share(interval.num_skipped, norms.num_updates)
    dtypes = {name: mean.words.dtype for name, mean in interval.means.items()}
    return row, _empty(dtypes, norms is not None, interval.num_skipped is not None)


def _empty(dtypes: dict[str, Any], is_measured: bool, is_guarded: bool) -> Interval:
    def zero(dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros((), dtype)

    norms = Norms(
        num_updates=zero(),
        num_clipped=zero(),
        num_nonfinite=zero(),
        grad_norm=jnp.full((), -1, jnp.float32),
        clipped_norm=zero(jnp.float32),
        clip_threshold=zero(jnp.float32),
    )
    return Interval(
        means={name: no_values(dtype) for name, dtype in dtypes.items()},
        norms=norms if is_measured else None,
        num_skipped=zero() if is_guarded else None,
    )


def _share(part: jax.Array, count: jax.Array) -> jax.Array:
    """A part of a count, as a fraction; NaN if the count is 0."""
    share = part.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, share, jnp.nan)


def _check_same_state(old: Any, new: Any) -> None:
    old, new = shown(old), shown(new)
    was, now = jax.tree.structure(old), jax.tree.structure(new)
    if was != now:
        raise TypeError(
            "`train_step` must return a state of the structure it was given, "
            f"got {now} for {was}."
        )
    pairs = zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True)
    for (path, x), y in pairs:
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise TypeError(
                "`train_step` must keep shapes and dtypes of the state, but turned "
                f"`state{jax.tree_util.keystr(path)}` from {x.dtype}{list(x.shape)} "
                f"into {y.dtype}{list(y.shape)}."
            )


def _as_dict(found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, Mapping) else {"loss": found}


def _add(interval: Interval, found: dict[str, Any], old: Any, new: Any) -> Interval:
    values = {f"train_{name}": value for name, value in found.items()}
    if interval.norms is not None:
        known, is_measured = metrics(new), _is_measured(old, new)
        known[_MEAN_NORM] = find_states(new, NormStats)[0].grad_norm
        measured = [n for n in (*_OF_CLIPS, _MEAN_NORM) if n in interval.means]
        values |= {n: jnp.where(is_measured, known[n], jnp.nan) for n in measured}
    means = {
        name: with_value(mean, jnp.asarray(values[name], mean.words.dtype))
        for name, mean in interval.means.items()
    }
    norms, num_skipped = interval.norms, interval.num_skipped
    if norms is not None:
        norms = _add_norms(norms, old, new)
    if num_skipped is not None:
        num_skipped += (
            find_states(new, GuardState)[0].num_skipped
            - find_states(old, GuardState)[0].num_skipped
        )
    return Interval(means, norms, num_skipped)


def _is_measured(old_state: Any, new_state: Any) -> jax.Array:
    """Whether the step was an update, with a finite norm."""
    old, new = (find_states(state, NormStats)[0] for state in (old_state, new_state))
    # With gradient accumulation a step may only add to the next update.
    return (new.num_updates > old.num_updates) & jnp.isfinite(new.grad_norm)


def _add_norms(norms: Norms, old_state: Any, new_state: Any) -> Norms:
    old, new = (find_states(state, NormStats)[0] for state in (old_state, new_state))
    is_finite = _is_measured(old_state, new_state)
    is_worst = is_finite & (new.grad_norm > norms.grad_norm)

    def worst(now: jax.Array, before: jax.Array) -> jax.Array:
        return jnp.where(is_worst, now, before)

    return Norms(
        num_updates=norms.num_updates + new.num_updates - old.num_updates,
        num_clipped=norms.num_clipped + new.num_clipped - old.num_clipped,
        num_nonfinite=norms.num_nonfinite + new.num_nonfinite - old.num_nonfinite,
        grad_norm=worst(new.grad_norm, norms.grad_norm),
        clipped_norm=worst(new.clipped_norm, norms.clipped_norm),
        clip_threshold=worst(new.clip_threshold, norms.clip_threshold),
    )
