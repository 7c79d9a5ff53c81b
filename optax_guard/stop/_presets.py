"""Stoppers that stop where those of Flax, Keras and Lightning do."""

from optax_guard._checks import (
    check_choice,
    check_count,
    check_flag,
    check_kind,
    check_not_nan,
    static_count,
)
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._combinators import any_of
from optax_guard.stop._patience import patience as stop_patience
from optax_guard.stop._state import EarlyStopping
from optax_guard.stop._stopper import early_stopping
from optax_guard.stop._target import divergence, target


@answers_wrong_calls
def from_flax(min_delta: float = 0.0, patience: int = 0) -> EarlyStopping:
    """Builds the stopper that stops where `flax.training.early_stopping` does.

    Flax stops at the evaluation after the patience, so its ``patience=p`` is our
    ``p + 1``. A non-finite value is a bad evaluation, never the best.

    Args:
      min_delta: As in Flax: least improvement that counts.
      patience: As in Flax; at least 0.

    Returns:
      An `EarlyStopping`; smaller values are better.

    Raises:
      ValueError: If a concrete number is out of range.

    Examples:
      >>> import optax_guard as og
      >>> stopper = og.stop.from_flax(min_delta=1e-3, patience=0)
      >>> state = stopper.update(1.0, stopper.init())
      >>> bool(stopper.update(1.0, state).should_stop)
      True
    """
    check_count("patience", patience, least=0)
    rule = stop_patience(patience + 1, min_delta=min_delta)
    return early_stopping(rule, nonfinite="wait")


@answers_wrong_calls
def from_keras(
    monitor: str = "val_loss",
    min_delta: float = 0.0,
    patience: int = 0,
    mode: str = "auto",
    baseline: float | None = None,
    restore_best_weights: bool = False,
    start_from_epoch: int = 0,
) -> EarlyStopping:
    """Builds the stopper that stops where `keras.callbacks.EarlyStopping` does.

    Update it once an epoch, with a dict that has the key ``monitor`` or with that
    value alone. A non-finite value is a bad evaluation, never the best.

    Args:
      monitor: Key of the value to judge.
      min_delta: Least improvement that counts; as in Keras, its sign does not matter.
      patience: As in Keras, where 0 means 1.
      mode: "min", "max", or "auto": "max" if ``monitor`` ends with "acc", "accuracy"
        or "auc".
      baseline: Value that must be beaten for an improvement to count.
      restore_best_weights: Accepted so that arguments can be copied; the parameters
        are kept if `init` is given them, and `best` returns them.
      start_from_epoch: First epochs to disregard.

    Returns:
      An `EarlyStopping`.

    Raises:
      ValueError: If ``mode`` is unknown or a concrete number out of range.

    Examples:
      >>> import optax_guard as og
      >>> stopper = og.stop.from_keras("val_accuracy", patience=1)
      >>> state = stopper.update({"val_accuracy": 0.9}, stopper.init())
      >>> bool(stopper.update({"val_accuracy": 0.8}, state).should_stop)
      True
    """
    check_kind("monitor", monitor, str, "a string")
    check_flag("restore_best_weights", restore_best_weights)
    check_not_nan("min_delta", min_delta)
    check_count("start_from_epoch", start_from_epoch, least=0)
    check_choice("mode", mode, ("auto", "min", "max"))
    if mode == "auto":
        grows = monitor.endswith(("acc", "accuracy", "auc"))
        mode = "max" if grows else "min"
    patience = max(static_count("patience", patience, least=0), 1)
    rule = stop_patience(patience, min_delta=abs(min_delta), baseline=baseline)
    return early_stopping(
        rule, mode=mode, nonfinite="wait", warmup=start_from_epoch, key=monitor
    )


@answers_wrong_calls
def from_lightning(
    monitor: str,
    min_delta: float = 0.0,
    patience: int = 3,
    mode: str = "min",
    check_finite: bool = True,
    stopping_threshold: float | None = None,
    divergence_threshold: float | None = None,
) -> EarlyStopping:
    """Builds the stopper that stops where Lightning's `EarlyStopping` does.

    Update it once a validation check, with a dict that has the key ``monitor`` or
    with that value alone. Unlike Lightning, the value that reaches
    ``stopping_threshold`` becomes the best.

    Args:
      monitor: Key of the value to judge.
      min_delta: Least improvement that counts; as in Lightning, its sign does not
        matter.
      patience: As in Lightning, where 0 means 1.
      mode: "min" or "max".
      check_finite: Whether a non-finite value stops at once; otherwise it is a bad
        evaluation.
      stopping_threshold: Stop when the value is better than this.
      divergence_threshold: Stop when the value is worse than this.

    Returns:
      An `EarlyStopping`.

    Raises:
      ValueError: If ``mode`` is unknown or a concrete number out of range.

    Examples:
      >>> import optax_guard as og
      >>> stopper = og.stop.from_lightning("val_loss", patience=1)
      >>> state = stopper.update({"val_loss": 0.4}, stopper.init())
      >>> bool(stopper.update({"val_loss": 0.5}, state).should_stop)
      True
    """
    check_kind("monitor", monitor, str, "a string")
    check_not_nan("min_delta", min_delta)
    patience = max(static_count("patience", patience, least=0), 1)
    check_flag("check_finite", check_finite)
    rules = [stop_patience(patience, min_delta=abs(min_delta))]
    if stopping_threshold is not None:
        check_not_nan("stopping_threshold", stopping_threshold)
        rules.append(target(stopping_threshold, strict=True))
    if divergence_threshold is not None:
        check_not_nan("divergence_threshold", divergence_threshold)
        rules.append(divergence(divergence_threshold))
    nonfinite = "stop" if check_finite else "wait"
    return early_stopping(any_of(*rules), mode=mode, nonfinite=nonfinite, key=monitor)
