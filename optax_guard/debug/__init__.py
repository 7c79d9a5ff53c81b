"""The operation that made a NaN, and its source line."""

from optax_guard._public import publish
from optax_guard.debug._explain import explain_step
from optax_guard.debug._find import find_nonfinite
from optax_guard.debug._origin import ArraySummary as ArraySummary
from optax_guard.debug._origin import NonfiniteOrigin

__all__ = ["NonfiniteOrigin", "explain_step", "find_nonfinite"]
# A class that is met in an origin and never constructed by users.
_STATES = ["ArraySummary"]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
