"""Where other stop rules would have stopped a run that was recorded."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_guard._checks import check_kind
from optax_guard._records.readers import rename
from optax_guard._records.rows import as_rows
from optax_guard.analysis._noise import least_difference, least_fall, noise_of
from optax_guard.stop._rule import StopReason, StopRule, sign_of
from optax_guard.stop._state import EarlyStopping
from optax_guard.stop._stopper import early_stopping

# Words in the names of values of which larger ones are better.
_RISING = frozenset(
    {
        *("acc", "accuracy", "auc", "auroc", "bleu", "dice", "f1", "iou", "map"),
        *("map50", "miou", "ndcg", "precision", "psnr", "r2", "recall"),
        *("return", "returns", "reward", "rewards", "rouge", "score", "ssim"),
        *("top1", "top5", "win"),
    }
)
# Columns of the table of outcomes that hold texts: the rule and the reason.
TEXT_COLUMNS = (0, 7)


class Replayed(NamedTuple):
    """The outcome of one rule on a recorded run.

    Attributes:
      name: The rule's name.
      reason: Why it would have stopped; RUNNING if it would not.
      stopped_step: Step of the evaluation at which it would have stopped; the last step
        if it would not.
      best_step: Step of the best evaluation until then; -1 without a finite one.
      best_value: Value of that evaluation, in units of the loss; NaN without one.
      steps_saved: How many of the recorded steps would not have been trained.
      loss_given_up: How much worse that value is than the best of the whole run; 0 if
        it is the same evaluation.
      least_difference: The loss given up from which on it is more than the noise of the
        evaluations; 0 if none came after the stop, NaN if there are fewer than 8.
      undecidable: Whether a loss was given up, and noise may be all of it.
      least_fall: The power of the rule: an even fall of this much, over as many
        evaluations as it waited after the best, would be hidden by noise in one of
        twenty runs, a smaller one more often. NaN if it did not stop or did not wait.
    """

    name: str
    reason: StopReason
    stopped_step: int
    best_step: int
    best_value: float
    steps_saved: int
    loss_given_up: float
    least_difference: float
    undecidable: bool
    least_fall: float


def replay(
    history: Iterable[Mapping[str, Any]],
    rules: Mapping[str, StopRule | EarlyStopping],
    *,
    key: str | None = None,
    mode: str | None = None,
) -> list[Replayed]:
    """Plays a recorded run to stop rules: where would each stop, save and lose?

    One can then choose a patience from a table, without a rerun. Each rule gets the
    rows in their order, in the stopper of `early_stopping` itself. The record ends
    where the run ended: if that was an early stop, a longer patience looks as good as
    no rule.

    Evaluations are noisy, and the best of many is better by luck. What a rule gives up
    is *undecidable* unless it is above ``noise * sqrt(2) * z``. Here ``noise`` is
    ``median(abs(diff(values, n=2))) / (0.6745 * sqrt(6))``, and ``z`` the normal
    quantile of ``1 - 0.05 / n`` with the ``n`` evaluations after the stop. So where
    there is only noise, a difference is taken for real in at most one of twenty runs.
    The rule may also stop too early by bad luck; ``least_fall`` tells how large a fall
    it would have seen.

    Args:
      history: A `History`, or rows such as `fit` returns.
      rules: Rules of `optax_guard.stop`, or stoppers of `early_stopping`, by names of
        your choice.
      key: Column of the value to judge. If ``None``, the one that is recorded of
        ``val_loss`` and ``value``. Rows without it are not evaluations.
      mode: "min" if smaller values are better, "max" if larger values are; "min" if
        ``None``. A ``key`` that names an accuracy, a reward or the like needs a mode.
        The mode of a stopper should agree.

    Returns:
      A `Replayed` for each rule, in their order; `table` prints them.

    Raises:
      TypeError: If one of ``rules`` is neither a rule nor a stopper.
      ValueError: If no row has the value; if ``key`` needs a ``mode``; if a rule needs
        a column that evaluations lack, as ``overfitting`` needs ``train_loss``; if it
        needs seconds or the optimizer's state, which no history records.

    Examples:
      >>> import optax_guard as og
      >>> from optax_guard.analysis import History, replay, table
      >>> history = History()
      >>> for step, loss in enumerate([3.0, 2.0, 2.1, 2.2, 1.0, 1.1], 1):
      ...     history.append(10 * step, val_loss=loss)
      >>> rules = {f"patience {n}": og.stop.patience(n) for n in (2, 3)}
      >>> print(table(replay(history, rules)))
      rule        stops at  steps saved  best at  best value        given up  ...
      patience 2        40           20       20           2  1, undecidable  ...
      patience 3        60            0       50           1               0  ...
    """
    check_kind("rules", rules, Mapping, "a dict of rules by name")
    if not rules:
        raise ValueError("`rules` must have at least one rule, got none.")
    mode = _mode_for(key) if mode is None else mode
    sign = sign_of(mode)
    evaluations, key = evaluations_of(as_rows(history), key)
    steps = [int(row["step"]) for row in evaluations]
    outcomes = []
    for name, rule in rules.items():
        if isinstance(rule, EarlyStopping):
            stopper, keys = rule, frozenset()
        elif isinstance(rule, StopRule):
            keys = rule.keys
            stopper = early_stopping(rule, mode=mode, key=key if keys else None)
        else:
            raise TypeError(
                f"`rules[{name!r}]` must be a rule of `optax_guard.stop` or a stopper "
                f"of `early_stopping`, got {rule!r}."
            )
        columns = _needed_columns(name, stopper.needs, keys, key, evaluations)
        outcomes.append(_play_to_rule(name, stopper, sign, key, keys, columns, steps))
    return outcomes


def _mode_for(key: str | None) -> str:
    """The mode of a column, unless its name may be of a value that should rise."""
    words = re.split(r"[^a-z0-9]+", str(key).lower())
    if rising := sorted(_RISING.intersection(words)):
        raise ValueError(
            f"`mode` must be given for {key!r}: larger is better of most columns that "
            f"are called {rising[0]!r}. Give `mode=max`, or `mode=min` if smaller is "
            "better."
        )
    return "min"


def replay_cells(replayed: Iterable[Replayed]) -> list[list[str]]:
    """The texts of the table of outcomes: the heading, then a list for each rule."""
    heading = ["rule", "stops at", "steps saved", "best at", "best value", "given up"]
    lines = [[*heading, "sees a fall of", "reason"]]
    for one in replayed:
        known = (one.stopped_step, one.steps_saved, one.best_step)
        numbers = (one.best_value, one.loss_given_up, one.least_fall)
        value, given_up, fall = (f"{number:.4g}" for number in numbers)
        given_up += ", undecidable" if one.undecidable else ""
        fall = "" if math.isnan(one.least_fall) else fall
        cells = [*map(str, known), value, given_up, fall]
        lines.append([one.name, *cells, one.reason.name])
    return lines


def evaluations_of(
    rows: list[dict[str, float]], key: str | None
) -> tuple[list[dict[str, float]], str]:
    """The rows that have the value to judge, and its name."""
    if key is not None:
        check_kind("key", key, str, "a string or None")
    wanted = ("val_loss", "value") if key is None else (key,)
    # A column that was renamed is also known by its name in the file.
    renamed = () if key is None else rename({key: 0.0})
    for name in (*wanted, *renamed):
        found = [row for row in rows if name in row]
        if found:
            return found, name
    known = sorted({name for row in rows for name in row})
    raise ValueError(
        f"`history` must have rows with {' or '.join(map(repr, wanted))}, the value to "
        f"judge, got {len(rows)} rows with {known}. Name its column with `key=`."
    )


def _needed_columns(
    name: str,
    needs: frozenset[str],
    keys: frozenset[str],
    key: str,
    evaluations: list[dict[str, float]],
) -> dict[str, np.ndarray]:
    """The values that a rule reads of each evaluation, by the names of a history."""
    if unknown := needs - {"step", "train_value"}:
        raise ValueError(
            f"`rules[{name!r}]` needs {' and '.join(sorted(unknown))}, which a history "
            "does not record."
        )
    wanted = {key, *keys} | ({"train_loss"} if "train_value" in needs else set())
    for column in sorted(wanted):
        if not all(column in row for row in evaluations):
            raise ValueError(
                f"`rules[{name!r}]` needs {column!r} in every row with {key!r}."
            )
    columns = {
        column: np.array([row[column] for row in evaluations], np.float32)
        for column in wanted
    }
    steps = np.array([row["step"] for row in evaluations], np.float64)
    if "step" in needs and steps[-1] >= 2**31:
        raise ValueError(
            f"`rules[{name!r}]` counts steps, which must be below 2**31, got "
            f"{steps[-1]:.0f}. Count evaluations instead."
        )
    # Tokens or frames may be counted as steps, more than the stopper's int32 holds.
    numbers = steps if "step" in needs else np.arange(len(steps))
    return columns | {"step": numbers.astype(np.int32)}


def _play_to_rule(
    name: str,
    stopper: EarlyStopping,
    sign: float,
    key: str,
    keys: frozenset[str],
    columns: dict[str, np.ndarray],
    steps: list[int],
) -> Replayed:
    def judge(state: Any, row: dict[str, jax.Array]) -> Any:
        value = {name: row[name] for name in {key, *keys}} if keys else row[key]
        train_value = row.get("train_loss")
        state = stopper.update(value, state, step=row["step"], train_value=train_value)
        return state, None

    play = jax.jit(lambda rows: jax.lax.scan(judge, stopper.init(), rows)[0])
    state = play(columns)
    values = columns[key]
    stopped, best = int(state.stopped_at), int(state.best_eval)
    usable = sign * values[np.isfinite(values)]
    best_value = float(values[best]) if best >= 0 else math.nan
    given_up = float(sign * best_value - np.min(usable, initial=math.inf))
    noise = noise_of(values)
    later = np.isfinite(values[stopped + 1 :]) if stopped >= 0 else np.zeros(0)
    difference = least_difference(noise, int(later.sum()))
    waited = stopped - best if stopped >= 0 and best >= 0 else 0
    return Replayed(
        name=name,
        reason=StopReason(int(state.stop_reason)),
        stopped_step=int(steps[stopped]),
        best_step=int(steps[best]) if best >= 0 else -1,
        best_value=best_value,
        steps_saved=int(steps[-1] - steps[stopped]),
        loss_given_up=given_up,
        least_difference=difference,
        undecidable=given_up > 0 and not given_up > difference,
        least_fall=least_fall(noise, waited) if waited else math.nan,
    )
