"""The reasons for which a run is over."""

from collections.abc import Mapping
from typing import Any

from optax_guard._guarding.exhaustion import GuardExhaustedError, raise_if_exhausted
from optax_guard.stop._rule import GONE_BAD, StopReason

# The metrics that `raise_if_exhausted` reads.
_EXHAUSTION = ("guard_exhausted", "skip_reason", "skip_streak")


def why_gone_bad(flags: Mapping[str, Any], state: Any) -> str | None:
    """The reason for which the run has gone bad, in words, or ``None``."""
    if flags.get("should_stop", False):
        reason = int(flags["stop_reason"])
        if reason not in GONE_BAD:
            return None
        return f"{StopReason(reason).name}: {StopReason(reason).message}"
    exhaustion = {k: v for k, v in flags.items() if k.startswith(_EXHAUSTION)}
    if not exhaustion:
        return None
    try:
        raise_if_exhausted(exhaustion, state)
    except GuardExhaustedError as error:
        return str(error)
    return None


def is_over(flags: Mapping[str, Any], state: Any) -> bool:
    """Whether the stopper stops the run. If it does not, an exhausted guard raises."""
    if flags.get("should_stop", False):
        return True
    if (message := why_gone_bad(flags, state)) is not None:
        raise GuardExhaustedError(message)
    return False


def flags_of_guard(totals: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that tell whether a guard is exhausted."""
    return {k: v for k, v in totals.items() if k.startswith(_EXHAUSTION)}
