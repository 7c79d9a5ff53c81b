"""Training loops: `fit` runs on the host, the others on the device."""

from optax_guard._public import publish
from optax_guard.loops._checkpoint import Checkpointer, load_best
from optax_guard.loops._device import train_on_device
from optax_guard.loops._fit import fit
from optax_guard.loops._population import PopulationResult as PopulationResult
from optax_guard.loops._population import train_population
from optax_guard.loops._result import FitResult as FitResult
from optax_guard.loops._rewind import Rewind

__all__ = [
    "Checkpointer",
    "Rewind",
    "fit",
    "load_best",
    "train_on_device",
    "train_population",
]
# Users meet these classes in results and never construct them.
_STATES = [
    "FitResult",
    "PopulationResult",
]


def __dir__() -> list[str]:
    return [*__all__, *_STATES]


publish(__name__, _STATES)
