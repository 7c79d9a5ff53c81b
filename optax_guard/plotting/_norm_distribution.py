"""The figure of the choice of a threshold: the norms, and the share that it clips."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optax_guard._checks import check_positive
from optax_guard._records.readers import Row
from optax_guard._records.rows import as_rows
from optax_guard._records.suggest import FEWEST, suggest_max_norm
from optax_guard.plotting import _marks as marks

QUANTILES = (0.5, 0.9, 0.99)
# Without candidates, the thresholds that clip these shares of the norms are drawn.
_CLIP_RATES = (0.1, 0.01)


def plot_norm_distribution(
    history: Iterable[Mapping[str, Any]],
    *,
    max_norms: Sequence[float] = (),
    title: str = "",
) -> marks.Figure:
    """Draws how gradient norms are distributed, and how many each threshold clips.

    Above is a histogram of the norms before clipping for each half of the run, with
    quantiles of all norms. Below is the share of norms above each norm, with the
    candidates for a threshold and the share that each would clip. Norms are on a
    logarithmic scale; those that are 0 or not finite are counted in words.

    Args:
      history: A `History`, or rows such as `fit` returns, with ``grad_norm``.
      max_norms: Candidates for the threshold, in units of the gradient. If empty and
        there are 20 norms: the suggestions of `optax_guard.analysis.suggest_max_norm`
        for a tenth and a hundredth of the norms.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If ``max_norms`` is not a list of numbers.
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
    candidates = list(max_norms)
    for i, candidate in enumerate(candidates):
        check_positive(f"max_norms[{i}]", candidate)
    rows = [row for row in as_rows(history) if "grad_norm" in row]
    found = np.array([row["grad_norm"] for row in rows], float)
    norms = found[np.isfinite(found) & (found > 0)]
    if not norms.size:
        raise ValueError(
            "`history` must have a row with a finite `grad_norm` above 0, got "
            f"{len(rows)} rows with a norm."
        )
    candidates = candidates or _suggested_thresholds(rows, len(norms))
    figure, (above, below) = marks.two_panels(rows, title)
    _draw_histograms(above, norms, candidates)
    above.yaxis.get_major_locator().set_params(integer=True)
    _note_missing_norms(above, found, _limits(norms, candidates))
    _draw_clipped_shares(below, norms, candidates)
    marks.name_ticks(below.xaxis)
    marks.finish(above, below)
    below.set_xlabel(marks.NORM_LABEL.replace("\n", " "))
    return figure


def _suggested_thresholds(rows: Sequence[Row], num_norms: int) -> list[float]:
    if num_norms < FEWEST:
        return []
    found = [suggest_max_norm(rows, clip_rate=rate).max_norm for rate in _CLIP_RATES]
    return list(dict.fromkeys(found))


def _draw_histograms(
    panel: marks.Axes, norms: np.ndarray, candidates: Sequence[float]
) -> None:
    low, high = _limits(norms, candidates)
    edges = np.geomspace(low, high, min(60, 10 + len(norms) // 10))
    first, last = np.array_split(norms, 2)
    for half, name, curve in (
        (first, "first half of the run", marks.AFTER),
        (last, "second half", marks.LARGEST),
    ):
        panel.stairs(
            np.histogram(np.clip(half, low, high), edges)[0],
            edges,
            label=f"{name}, {len(half)} norms",
            color=curve["color"],
            linestyle=curve["linestyle"],
            linewidth=1.8,
        )
    for q, dashes in zip(QUANTILES, (":", "-.", "--"), strict=True):
        at = float(np.quantile(norms, q))
        panel.axvline(
            at, color=marks.BLACK, linestyle=dashes, label=f"{q:.0%} are below {at:.3g}"
        )
    panel.set_xlim(low / 1.1, high * 1.1)
    panel.set_ylabel("number of norms")


def _limits(norms: np.ndarray, candidates: Sequence[float]) -> tuple[float, float]:
    """The range of the histogram: a few huge norms do not make it flat."""
    low, high = np.quantile(norms, [0.02, 0.98])
    # All that is within 10 times of nearly all norms is shown where it is.
    low = min(float(norms[norms >= low / 10].min()), *candidates, low)
    high = max(float(norms[norms <= high * 10].max()), *candidates, high)
    return (low / 2, high * 2) if low == high else (float(low), float(high))


def _note_missing_norms(
    panel: marks.Axes, found: np.ndarray, limits: tuple[float, float]
) -> None:
    finite = found[np.isfinite(found) & (found > 0)]
    beyond = np.sum(finite < limits[0]) + np.sum(finite > limits[1])
    if beyond:
        panel.set_title(
            f"in the outermost bars: {beyond} beyond, at most {finite.max():.3g}",
            loc="left",
            fontsize="small",
        )
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


def _draw_clipped_shares(
    panel: marks.Axes, norms: np.ndarray, candidates: Sequence[float]
) -> None:
    # A step after each norm: a threshold that equals a norm does not clip it.
    shares = 1 - np.arange(1, len(norms) + 1) / len(norms)
    label = "share of norms above"
    panel.step(np.sort(norms), shares, where="post", color=marks.BLUE, label=label)
    for i, candidate in enumerate(candidates):
        curve = marks.STYLES[i % len(marks.STYLES)]
        share = float(np.mean(norms > candidate))
        panel.axvline(
            candidate,
            color=curve["color"],
            linestyle=curve["linestyle"],
            label=f"threshold {candidate:.3g} clips {share:.1%}",
        )
    # Linear near 0, the share above the largest norm, and logarithmic above one norm.
    panel.set_yscale("symlog", linthresh=1 / len(norms), linscale=0.3)
    panel.set_ylim(0, 1.1)
    ticks = [10.0**-k for k in range(math.ceil(math.log10(len(norms))))]
    panel.set_yticks([0, *ticks], ["0", *(f"{100 * tick:g} %" for tick in ticks)])
    panel.set_yticks([], minor=True)
    panel.set_ylabel("share of steps clipped")
    panel.set_xscale("log")
