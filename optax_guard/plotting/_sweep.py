"""The figure of a sweep: thresholds against learning rates."""

import math

import numpy as np

from optax_guard._checks import check_kind
from optax_guard.analysis._sweep import Sweep, axes_of
from optax_guard.plotting import _marks as marks


def plot_sweep(sweep: Sweep, *, title: str = "") -> marks.Figure:
    """Draws the best values and the clip rates of a sweep, with a cell for each run.

    Darker is larger. The cell of an unstable run is hatched; the recommended one has a
    frame.

    Args:
      sweep: The result of `optax_guard.analysis.sweep_max_norm`.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If ``sweep`` is anything else.

    Examples:
      >>> from optax_guard import StopReason, analysis, plotting
      >>> ran = (0.0, 0.0, 5, StopReason.RUNNING)
      >>> low = analysis.Trial(1.0, 0.1, 0.5, True, *ran)
      >>> high = analysis.Trial(2.0, 0.1, 0.7, True, *ran)
      >>> figure = plotting.plot_sweep(analysis.Sweep((low, high), low, ()))
      >>> [axes.get_title() for axes in figure.axes]
      ['best value', 'share clipped']
    """
    check_kind("sweep", sweep, Sweep, "the result of `sweep_max_norm`")
    max_norms, rates = axes_of(sweep.trials)
    shape = len(max_norms), len(rates)
    figure = marks.ShownFigure(
        figsize=(3.2 + 1.5 * len(rates), 1.6 + 0.5 * len(max_norms)),
        dpi=120,
        layout="constrained",
    )
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    values = np.array([trial.best_value for trial in sweep.trials])
    # Unstable runs have no shade: their values may be larger by many magnitudes.
    is_stable = np.array([trial.is_stable for trial in sweep.trials])
    shades = np.where(is_stable, values, math.nan)
    rates_clipped = np.array([trial.clip_rate for trial in sweep.trials])
    for ax, cells, heading, form in (
        (panels[0], shades, "best value", "{:.3g}"),
        (panels[1], rates_clipped, "share clipped", "{:.0%}"),
    ):
        ax.imshow(cells.reshape(shape), cmap="cividis_r", aspect="auto")
        finite = cells[np.isfinite(cells)]
        middle = (finite.min() + finite.max()) / 2 if len(finite) else 0
        shown = values if ax is panels[0] else cells
        for i, trial in enumerate(sweep.trials):
            row, column = divmod(i, len(rates))
            dark = trial.is_stable and np.isfinite(cells[i]) and cells[i] > middle
            ax.text(
                column,
                row,
                form.format(shown[i]) if np.isfinite(shown[i]) else "not finite",
                ha="center",
                va="center",
                color="white" if dark else marks.BLACK,
                fontsize="small",
                bbox=None if trial.is_stable else {"color": "white", "pad": 1},
            )
            corner = (column - 0.5, row - 0.5)
            if not trial.is_stable:
                ax.add_patch(
                    marks.Rectangle(corner, 1, 1, fill=False, hatch="///", linewidth=0)
                )
            if trial == sweep.recommended:
                ax.add_patch(
                    marks.Rectangle(
                        corner,
                        1,
                        1,
                        fill=False,
                        linewidth=3,
                        color=marks.VERMILLION,
                        clip_on=False,
                        zorder=3,
                    )
                )
        ax.set_title(heading)
        ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        ax.set_xlabel("learning rate")
    panels[0].set_yticks(range(len(max_norms)), [f"{norm:g}" for norm in max_norms])
    panels[0].set_ylabel("max_norm")
    return figure
