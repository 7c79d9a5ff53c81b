"""The arguments of `early_stopping`, checked."""

from typing import NamedTuple

from jax.typing import ArrayLike

from optax_guard._checks import check_choice, check_count, check_kind
from optax_guard.stop._rule import StopRule, check_rule, sign_of
from optax_guard.stop._smoothing import Smoother


class Config(NamedTuple):
    """The configuration of a stopper; its numbers may be traced."""

    rule: StopRule
    sign: float
    nonfinite: str
    max_nonfinite: ArrayLike
    smooth: Smoother | None
    best_on: str
    warmup: ArrayLike
    key: str | None
    average_last: ArrayLike | None


def checked_config(
    rule: StopRule,
    mode: str,
    nonfinite: str,
    max_nonfinite: ArrayLike,
    smooth: Smoother | None,
    best_on: str,
    warmup: ArrayLike,
    key: str | None,
    average_last: ArrayLike | None,
) -> Config:
    """Refuses arguments of `early_stopping` that are out of range."""
    check_rule(rule, "early_stopping")
    sign = sign_of(mode)
    check_choice("nonfinite", nonfinite, ("stop", "wait", "ignore"))
    check_choice("best_on", best_on, ("raw", "smoothed"))
    check_count("max_nonfinite", max_nonfinite, least=0)
    check_count("warmup", warmup, least=0)
    if average_last is not None:
        check_count("average_last", average_last)
    if key is not None:
        check_kind("key", key, str, "a string or None")
    if smooth is not None and not isinstance(smooth, Smoother):
        raise TypeError(
            "`smooth` must be a smoother such as `stop.ema(0.9)` or `stop.median(5)`, "
            f"got {smooth!r}."
        )
    return Config(
        rule,
        sign,
        nonfinite,
        max_nonfinite,
        smooth,
        best_on,
        warmup,
        key,
        average_last,
    )
