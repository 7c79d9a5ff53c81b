"""A trial of thresholds and learning rates, all in one compiled program."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_guard._checks import check_positive
from optax_guard._guarding.readout import metrics
from optax_guard._records.progress import Progress
from optax_guard._records.table import aligned
from optax_guard.loops._population import PopulationResult, train_population
from optax_guard.stop._rule import StopReason

_TROUBLES = (StopReason.DIVERGED, StopReason.NONFINITE, StopReason.SKIP_STORM)


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
      max_norm: Its threshold.
      learning_rate: Its learning rate.
      best_value: The lowest evaluation, in units of the loss; NaN without a finite one.
      is_stable: Whether every evaluation was finite and the last not above the first,
        and the run was not ended by DIVERGED, NONFINITE, SKIP_STORM or the guard.
      clip_rate: Share of its updates that were clipped; NaN if the state has no norm.
      skip_rate: Share of its steps that the guard skipped; NaN without a guard.
      num_evals: How many evaluations it made.
      reason: Why it stopped; RUNNING if it took all its steps.
    """

    max_norm: float
    learning_rate: float
    best_value: float
    is_stable: bool
    clip_rate: float
    skip_rate: float
    num_evals: int
    reason: StopReason


class Sweep(NamedTuple):
    """The result of `sweep_max_norm`; printed, it gives a table and the reasons.

    Attributes:
      trials: All runs: those of the first threshold, then those of the next.
      recommended: The best choice; ``None`` if no run was stable.
      reasons: Sentences that give the reasons for that choice.
    """

    trials: tuple[Trial, ...]
    recommended: Trial | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Best values, a line for each threshold; * is recommended, ! is unstable."""
        max_norms, rates = axes_of(self.trials)
        lines = [["max_norm", *(f"rate {rate:g}" for rate in rates)]]
        for max_norm in max_norms:
            cells = [self._cell(t) for t in self.trials if t.max_norm == max_norm]
            lines.append([f"{max_norm:g}", *cells])
        return "\n".join([aligned(lines), *self.reasons])

    def _cell(self, trial: Trial) -> str:
        mark = "*" if trial == self.recommended else " " if trial.is_stable else "!"
        return f"{trial.best_value:.4g}{mark}"


def axes_of(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """The thresholds and the learning rates, each once, in their order."""
    max_norms = list(dict.fromkeys(trial.max_norm for trial in trials))
    return max_norms, list(dict.fromkeys(trial.learning_rate for trial in trials))


def sweep_max_norm(
    build: Callable[[Any], Mapping[str, Any]],
    max_norms: Sequence[float],
    learning_rates: Sequence[float],
    *,
    num_steps: int,
    eval_every: int,
    tolerance: float = 0.02,
    progress: bool | Progress = False,
) -> Sweep:
    """Trains a short run for each pair of threshold and learning rate, all at once.

    The runs are one `train_population`; each stops at its own time if ``build`` gives a
    stopper. The recommended threshold is the one under which most learning rates come
    within ``tolerance`` of the best run, and among equals the one with the lowest
    value; with its best learning rate. Such a choice depends little on the learning
    rate. Short runs rank short runs: the best after 200 steps need not be the best
    after 200,000.

    Args:
      build: As for `train_population`, with ``evaluate``; called with a dict of
        ``max_norm`` and ``learning_rate``, float32[] each.
      max_norms: Thresholds to try, positive; ``inf`` for none.
      learning_rates: Learning rates to try, positive.
      num_steps: Steps of each run.
      eval_every: Steps between evaluations; lower is better.
      tolerance: Relative difference of two values that count as equal.
      progress: As for `train_population`.

    Returns:
      A `Sweep`.

    Raises:
      TypeError: If a threshold or learning rate is not a number.
      ValueError: If one is not positive or occurs twice, or ``build`` gives no
        ``evaluate``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.analysis import sweep_max_norm
      >>> from optax_guard.flax import TrainState
      >>> def train_step(state, batch):
      ...     loss, grads = jax.value_and_grad(lambda p: p**2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> def build(member):
      ...     tx = og.guard(optax.sgd(member["learning_rate"]), clip=member["max_norm"])
      ...     return {
      ...         "state": TrainState.create(apply_fn=None, params=jnp.ones(()), tx=tx),
      ...         "train_step": train_step,
      ...         "batches": lambda step: None,
      ...         "evaluate": lambda state: state.params**2,
      ...     }
      >>> sweep = sweep_max_norm(build, [1, 9], [0.1, 3], num_steps=8, eval_every=1)
      >>> print(str(sweep).partition(":")[0])
      max_norm  rate 0.1  rate 3
             1  0.06554       1
             9  0.02815*     25!
      max_norm 9 with learning rate 0.1

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    _check_numbers("max_norms", max_norms)
    _check_numbers("learning_rates", learning_rates)
    check_positive("tolerance", tolerance)
    pairs = [(norm, rate) for norm in max_norms for rate in learning_rates]
    columns = np.array(pairs, np.float32).T
    result = train_population(
        build,
        {"max_norm": columns[0], "learning_rate": columns[1]},
        num_steps=num_steps,
        eval_every=eval_every,
        progress=progress,
    )
    if "value" not in result.history:
        raise ValueError("`build` must give `evaluate`: the sweep compares its values.")
    trials = _read_trials(pairs, result)
    return Sweep(tuple(trials), *_recommend(trials, tolerance))


def _check_numbers(name: str, values: Sequence[float]) -> None:
    if np.ndim(values) != 1 or isinstance(values, str):
        raise TypeError(f"`{name}` must be a list of numbers, got {values!r}.")
    for i, value in enumerate(values):
        check_positive(f"{name}[{i}]", value)
    if not len(values) or len(set(map(float, values))) < len(values):
        raise ValueError(f"`{name}` must be different numbers, got {values}.")


def _read_trials(
    pairs: Sequence[tuple[float, float]], result: PopulationResult
) -> list[Trial]:
    values, counts, ends = jax.device_get(
        (result.history["value"], result.num_rows, jax.vmap(metrics)(result.state))
    )
    unknown = np.full(len(pairs), math.nan)
    reasons = np.zeros(len(pairs), int)
    if result.stop is not None:
        reasons = jax.device_get(result.stop.stop_reason)
    trials = []
    is_exhausted = ends.get("guard_exhausted", np.zeros(len(pairs), bool))
    for i, (max_norm, rate) in enumerate(pairs):
        seen = values[i, : counts[i]]
        finite = seen[np.isfinite(seen)]
        is_stable = len(finite) == len(seen) > 0 and seen[-1] <= seen[0]
        is_stable &= reasons[i] not in _TROUBLES
        trials.append(
            Trial(
                max_norm=float(max_norm),
                learning_rate=float(rate),
                best_value=float(finite.min()) if len(finite) else math.nan,
                is_stable=bool(is_stable and not is_exhausted[i]),
                clip_rate=float(ends.get("clip_rate", unknown)[i]),
                skip_rate=float(ends.get("skip_rate", unknown)[i]),
                num_evals=int(counts[i]),
                reason=StopReason(int(reasons[i])),
            )
        )
    return trials


def _recommend(
    trials: list[Trial], tolerance: float
) -> tuple[Trial | None, tuple[str, ...]]:
    stable = [trial for trial in trials if trial.is_stable]
    if not stable:
        return None, ("No run was stable: try lower learning rates.",)
    best = min(trial.best_value for trial in stable)
    near = [t for t in stable if t.best_value <= best + tolerance * abs(best)]
    by_norm: dict[float, list[Trial]] = {}
    for trial in near:
        by_norm.setdefault(trial.max_norm, []).append(trial)

    def rank(found: list[Trial]) -> tuple[int, float]:
        return -len(found), min(trial.best_value for trial in found)

    chosen = min(min(by_norm.values(), key=rank), key=lambda trial: trial.best_value)
    width = len(by_norm[chosen.max_norm])
    max_norms, rates = axes_of(trials)
    reasons = [
        f"max_norm {chosen.max_norm:g} with learning rate {chosen.learning_rate:g}: "
        f"{width} of {len(rates)} learning rates come within {100 * tolerance:g} % of "
        f"the best value, {best:.4g}, and none of the other thresholds has more.",
        f"It clipped {100 * chosen.clip_rate:.3g} % of the updates.",
    ]
    edges = {
        "max_norm": (chosen.max_norm, max_norms),
        "learning rate": (chosen.learning_rate, rates),
    }
    for name, (value, tried) in edges.items():
        if len(tried) > 1 and value in (min(tried), max(tried)):
            reasons.append(f"That {name} is at the edge of the range: try a wider one.")
    return chosen, tuple(reasons)
