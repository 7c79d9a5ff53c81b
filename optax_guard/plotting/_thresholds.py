"""The figure of a threshold's choice: the norms, and how many of them each clips."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optax_guard._checks import check_kind, check_positive
from optax_guard._records.rows import as_rows
from optax_guard._records.suggest import FEWEST, suggest_max_norm
from optax_guard.analysis._sweep import Sweep, axes_of
from optax_guard.plotting import _marks as marks

QUANTILES = (0.5, 0.9, 0.99)
# Shares of the norms that are clipped by the thresholds drawn if none is given.
_CLIP_RATES = (0.1, 0.01)


def plot_norm_distribution(
    history: Iterable[Mapping[str, Any]],
    *,
    max_norms: Sequence[float] = (),
    title: str = "",
) -> marks.Figure:
    """Draws how gradient norms are distributed, and how many each threshold clips.

    Above, a histogram of the norms before clipping, of the first and of the second half
    of the run, with quantiles of all. Below, the share of norms above each norm, with
    the candidates for a threshold and the share that each would clip. Norms are on a
    logarithmic scale; those that are 0 or not finite are counted in words.

    Args:
      history: A `History`, or rows such as `fit` returns, with ``grad_norm``.
      max_norms: Candidates for the threshold, in units of the gradient. If empty, what
        `optax_guard.analysis.suggest_max_norm` suggests to clip a tenth and a hundredth
        of the norms, from 20 norms on.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If no norm is finite and above 0, or a candidate is not positive.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1.0 + i % 5} for i in range(50)]
      >>> figure = plotting.plot_norm_distribution(rows, max_norms=[3.0])
      >>> figure.axes[1].get_legend().texts[-1].get_text()
      'threshold 3 clips 40.0%'
    """
    if np.ndim(max_norms) != 1:
        raise TypeError(f"`max_norms` must be a list of numbers, got {max_norms!r}.")
    max_norms = list(max_norms)
    for i, candidate in enumerate(max_norms):
        check_positive(f"max_norms[{i}]", candidate)
    rows = [row for row in as_rows(history) if "grad_norm" in row]
    found = np.array([row["grad_norm"] for row in rows], float)
    norms = found[np.isfinite(found) & (found > 0)]
    if not norms.size:
        raise ValueError(
            "`history` must have a row with a finite `grad_norm` above 0, got "
            f"{len(rows)} rows with a norm."
        )
    if not max_norms and len(norms) >= FEWEST:
        rates = [suggest_max_norm(rows, clip_rate=x).max_norm for x in _CLIP_RATES]
        max_norms = list(dict.fromkeys(rates))
    figure, (above, below) = marks.panels(rows, title)
    low, high = min([*norms, *max_norms]), max([*norms, *max_norms])
    if low == high:
        low, high = low / 2, high * 2
    edges = np.geomspace(low, high, min(60, 10 + len(norms) // 10))
    first, last = np.array_split(norms, 2)
    for half, name, curve in (
        (first, "first half of the run", marks.AFTER),
        (last, "second half", marks.LARGEST),
    ):
        above.stairs(
            np.histogram(half, edges)[0],
            edges,
            label=f"{name}, {len(half)} norms",
            color=curve["color"],
            linestyle=curve["linestyle"],
            linewidth=1.8,
        )
    for q, dashes in zip(QUANTILES, (":", "-.", "--"), strict=True):
        at = float(np.quantile(norms, q))
        above.axvline(
            at, color=marks.BLACK, linestyle=dashes, label=f"{q:.0%} are below {at:.3g}"
        )
    above.yaxis.get_major_locator().set_params(integer=True)
    above.set_ylabel("number of norms")
    _note_what_is_missing(above, found)

    ordered = np.sort(norms)
    # As steps: at a norm itself, a clip to it does nothing.
    shares = 1 - np.arange(1, len(norms) + 1) / len(norms)
    below.step(
        ordered, shares, where="post", color=marks.BLUE, label="share of norms above"
    )
    for candidate, curve in zip(max_norms, _candidate_styles(max_norms), strict=True):
        share = float(np.mean(norms > candidate))
        below.axvline(
            candidate, **curve, label=f"threshold {candidate:.3g} clips {share:.1%}"
        )
    # Linear near 0, the share above the largest norm, and logarithmic above one norm.
    below.set_yscale("symlog", linthresh=1 / len(norms), linscale=0.3)
    below.set_ylim(0, 1.1)
    ticks = [10.0**-k for k in range(math.ceil(math.log10(len(norms))))]
    below.set_yticks([0, *ticks], ["0", *(f"{100 * tick:g} %" for tick in ticks)])
    below.set_yticks([], minor=True)
    below.set_ylabel("share of steps clipped")
    below.set_xscale("log")
    marks.finish(above, below)
    below.set_xlabel(marks.NORM_LABEL.replace("\n", " "))
    return figure


def _candidate_styles(max_norms: Sequence[float]) -> list[dict[str, Any]]:
    styles = [marks.STYLES[i % len(marks.STYLES)] for i in range(len(max_norms))]
    return [{key: one[key] for key in ("color", "linestyle")} for one in styles]


def _note_what_is_missing(panel: marks.Axes, found: np.ndarray) -> None:
    counts = {
        "NaN": np.isnan(found).sum(),
        "infinite": np.isinf(found).sum(),
        "0": (found == 0).sum(),
    }
    words = [f"{count} {name}" for name, count in counts.items() if count]
    if words:
        panel.set_title(
            f"not shown: {', '.join(words)}",
            loc="right",
            fontsize="small",
            color=marks.VERMILLION,
        )


def plot_sweep(sweep: Sweep, *, title: str = "") -> marks.Figure:
    """Draws the best values and the clip rates of a sweep, a cell a run.

    Darker is worse; a cell of a run that was not stable is hatched, and the recommended
    one framed.

    Args:
      sweep: What `optax_guard.analysis.sweep_max_norm` returned.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If it is anything else.

    Examples:
      >>> from optax_guard import StopReason, analysis, plotting
      >>> ran = (0.0, 0.0, 5, StopReason.RUNNING)
      >>> low = analysis.Trial(1.0, 0.1, 0.5, True, *ran)
      >>> high = analysis.Trial(2.0, 0.1, 0.7, True, *ran)
      >>> figure = plotting.plot_sweep(analysis.Sweep((low, high), low, ()))
      >>> [axes.get_title() for axes in figure.axes]
      ['best value', 'share clipped']
    """
    check_kind("sweep", sweep, Sweep, "what `sweep_max_norm` returned")
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
    # Unstable runs may be larger by any number of magnitudes: they have no shade.
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
