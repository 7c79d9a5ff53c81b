"""Figures of norms and losses; they need matplotlib.

Figures take a `History`, the rows that `optax_guard.loops.fit` returns, or rows of JSON
lines, where numbers that are not finite are strings such as ``"NaN"``. A figure belongs
to no window: save it with ``figure.savefig(path)``, or leave it as the last value of a
notebook's cell.
"""

from optax_guard._public import publish
from optax_guard.plotting._history import plot_history
from optax_guard.plotting._landscape import plot_landscape
from optax_guard.plotting._leaves import plot_leaves
from optax_guard.plotting._norm_distribution import plot_norm_distribution
from optax_guard.plotting._population import plot_population
from optax_guard.plotting._replay import plot_replay
from optax_guard.plotting._stopping import plot_early_stopping
from optax_guard.plotting._sweep import plot_sweep

__all__ = [
    "plot_early_stopping",
    "plot_history",
    "plot_landscape",
    "plot_leaves",
    "plot_norm_distribution",
    "plot_population",
    "plot_replay",
    "plot_sweep",
]


def __dir__() -> list[str]:
    return list(__all__)


publish(__name__)
