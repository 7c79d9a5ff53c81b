"""Figures of norms and losses; they need matplotlib.

Rows of a history are a `History`, what `optax_guard.flax.fit` returns, or the same read
back from JSON, where numbers that are not finite are strings such as ``"NaN"``. Figures
belong to no window: save them with ``figure.savefig(path)``, or leave one as the last
value of a notebook's cell.
"""

from optax_guard._public import publish
from optax_guard.plotting._landscape import plot_landscape
from optax_guard.plotting._leaves import plot_leaves
from optax_guard.plotting._population import plot_population
from optax_guard.plotting._runs import plot_history, plot_norms, plot_runs
from optax_guard.plotting._stopping import plot_early_stopping, plot_replay
from optax_guard.plotting._thresholds import (
    plot_norm_distribution as plot_norm_distribution,
)
from optax_guard.plotting._thresholds import plot_sweep

__all__ = [
    "plot_early_stopping",
    "plot_history",
    "plot_landscape",
    "plot_leaves",
    "plot_norm_distribution",
    "plot_norms",
    "plot_population",
    "plot_replay",
    "plot_runs",
    "plot_sweep",
]


def __dir__() -> list[str]:
    return list(__all__)


publish(__name__)
