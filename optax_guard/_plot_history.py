"""The figure of one history: norms, losses, shares and learning rate, step by step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optax_guard import _plotting_marks as marks
from optax_guard._base import check_kind
from optax_guard._findings import Finding, Severity
from optax_guard._history_rows import as_rows
from optax_guard._stop_state import EarlyStoppingState

# Key -> label, style.
_NORMS = {
    "grad_norm": ("before clipping", marks.LARGEST),
    "grad_norm_mean": ("before clipping, mean", marks.MEAN),
    "clipped_norm": ("after clipping", marks.AFTER),
    "clip_threshold": ("threshold", marks.THRESHOLD),
}
# Not finite where the norm is not: one cross for all of them.
_FOLLOWING = {"grad_norm_mean", "clipped_norm", "clip_threshold"}
_LOSSES = {
    "train_loss": ("training", marks.AFTER),
    "val_loss": ("validation", marks.LARGEST),
    "value": ("validation", marks.LARGEST),
}
_SHARES = {
    "clip_rate": ("clipped", marks.LARGEST),
    "skip_rate": ("skipped by the guard", marks.AFTER),
    "nonfinite_rate": ("not finite", marks.MEAN),
}
_RATES = {"learning_rate": ("learning rate", marks.LARGEST)}


def plot_history(
    history: Iterable[Mapping[str, Any]],
    *,
    findings: Sequence[Finding] = (),
    stop: EarlyStoppingState | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws all that is known of a run, one above the other over the same steps.

    Norms before and after clipping with the threshold (logarithmic), losses with the
    best evaluation, shares of steps clipped and skipped, and the learning rate: the
    panels for which there is something. Values that are not finite are crosses at the
    upper edge; warnings and errors are dotted lines where they first held.

    Args:
      history: A `History`, or rows such as `fit` returns.
      findings: What `optax_guard.analysis.diagnose` returned.
      stop: The state of early stopping, updated once a row, to mark the stop and its
        best; without it the lowest evaluation is the best.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there are no rows, or nothing to draw in them.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> len(plotting.plot_history(rows).axes)  # of norms, and of losses
      2
    """
    check_kind("findings", findings, Sequence, "what `diagnose` returned")
    for finding in findings:
        check_kind("findings", finding, Finding, "what `diagnose` returned")
    rows = as_rows(history)
    wanted = {
        marks.NORM_LABEL: _NORMS,
        "loss": _LOSSES,
        "share of steps": _SHARES,
        "learning rate": _RATES,
    }
    found = {
        label: {key: curve for key, curve in curves.items() if _is_shown(rows, key)}
        for label, curves in wanted.items()
    }
    if not marks.is_threshold_of_norms(rows):
        found[marks.NORM_LABEL].pop("clip_threshold", None)
    found = {label: curves for label, curves in found.items() if curves}
    if not found:
        raise ValueError(
            "`history` must hold at least one row with a norm or a loss, got "
            f"{len(rows)} rows. Names that are known: `analysis.COLUMN_NAMES`."
        )
    figure = marks.ShownFigure(
        figsize=(8, 1 + 2.4 * len(found)), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (label, curves) in zip(axes, found.items(), strict=True):
        # Those that failed together are crosses one below the other.
        for i, (key, (name, style)) in enumerate(curves.items()):
            style = marks.thinned(style, len(rows))
            told_by = "grad_norm" if key in _FOLLOWING else None
            edge = 1 - 0.11 * i
            marks.line(panel, rows, key, name, style, edge=edge, told_by=told_by)
        panel.set_ylabel(label)
        if curves.keys() & _NORMS.keys() or marks.spans_decades(rows, curves):
            marks.log_scale(panel)
        if curves.keys() & _LOSSES.keys() and stop is None:
            key = "val_loss" if "val_loss" in curves else "value"
            marks.mark_lowest(panel, rows, key)
        if curves.keys() & _SHARES.keys():
            panel.set_ylim(-0.03, 1.03)
    if stop is not None:
        losses = axes[list(found).index("loss")] if "loss" in found else None
        marks.mark_stop(axes, losses, rows, stop)
    _mark_findings(axes, findings)
    marks.finish(*axes)
    return figure


def _is_shown(rows: Sequence[Mapping[str, float]], key: str) -> bool:
    values = [row[key] for row in rows if key in row]
    if key == "clipped_norm":
        # Nor is there anything to see where nothing was clipped.
        return any(
            key in row and row[key] != row.get("grad_norm")
            for row in rows
            if not math.isnan(row.get(key, math.nan))
        )
    if key in ("skip_rate", "nonfinite_rate"):
        return any(values)
    return bool(values)


def _mark_findings(axes: np.ndarray, findings: Sequence[Finding]) -> None:
    shown = [f for f in findings if f.severity != Severity.INFO]
    for i, finding in enumerate(sorted(shown, key=lambda f: f.step)):
        for panel in axes:
            panel.axvline(finding.step, color=marks.VERMILLION, linestyle=":", zorder=1)
        axes[0].annotate(
            str(finding.code),
            (finding.step, 1),
            xycoords=axes[0].get_xaxis_transform(),
            # Codes are long: each has a line of its own.
            xytext=(0, 4 + 10 * (len(shown) - 1 - i)),
            textcoords="offset points",
            fontsize="x-small",
            color=marks.VERMILLION,
            ha=_side(axes[0], finding.step),
        )


def _side(panel: marks.Axes, step: float) -> str:
    left, right = panel.get_xlim()
    return "left" if step < (left + right) / 2 else "right"
