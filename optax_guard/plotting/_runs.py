"""Norms, losses and shares over steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optax_guard._checks import check_iterable, check_kind, check_positive
from optax_guard._guarding.readout import SkippedStep
from optax_guard._records.findings import Finding, Severity
from optax_guard._records.rows import as_rows
from optax_guard.plotting import _marks as marks
from optax_guard.plotting._marks import (
    AFTER,
    LARGEST,
    MEAN,
    NORM_LABEL,
    STYLES,
    THRESHOLD,
    VERMILLION,
    Figure,
    Row,
    column,
    cross,
    finish,
    is_threshold_of_norms,
    line,
    log_scale,
    mark_stop,
    panels,
    value_key,
)
from optax_guard.stop._state import EarlyStoppingState

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


def plot_norms(
    history: Sequence[Row],
    *,
    skipped_steps: Iterable[SkippedStep] = (),
    stop: EarlyStoppingState | None = None,
    loss_label: str = "loss",
    title: str = "",
) -> Figure:
    """Draws norms before and after clipping against the threshold, and the losses.

    Above, on a logarithmic scale: of each row the step with the largest norm, before
    and after clipping, with the mean norm and the threshold. Steps that the guard
    skipped are crosses at their norm, or, with the norm in digits, at the upper edge
    if it is not finite or far above all steps taken. Below: the losses, the best
    evaluation and the stop. Values that are not finite are crosses at the upper edge.

    Args:
      history: Rows with ``step`` and any of ``grad_norm``, ``clipped_norm``,
        ``grad_norm_mean``, ``clip_threshold``, ``train_loss``, and ``val_loss`` or
        ``value``.
      skipped_steps: What `optax_guard.skipped_steps` returned.
      stop: The state of early stopping, updated once a row.
      loss_label: Label of the lower axis, with its unit.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If ``history`` is empty.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> plotting.plot_norms(rows).axes[0].get_yscale()
      'log'
    """
    figure, (above, below) = panels(history, title)
    check_iterable("skipped_steps", skipped_steps, "a list of `SkippedStep`")
    skipped = list(skipped_steps)
    for each in skipped:
        check_kind("skipped_steps", each, SkippedStep, "a list of `SkippedStep`")
    # Without a clip the threshold is infinite, which is no failure to be marked.
    is_clipped = np.isfinite(column(history, "clip_threshold")).any()
    line(above, history, "grad_norm", "before clipping, largest", LARGEST)
    line(above, history, "grad_norm_mean", "before clipping, mean", MEAN)
    if is_clipped:
        line(above, history, "clipped_norm", "after clipping, of the largest", AFTER)
    if is_threshold_of_norms(history):
        line(above, history, "clip_threshold", "threshold", THRESHOLD)
    above.set_ylabel(NORM_LABEL)
    top = _top_of_norms(history, skipped)
    for i, step in enumerate(skipped):
        norm = step.grad_norm
        (mark,) = cross(above, step.update + 1, norm, VERMILLION, top=top)
        if i == 0:
            many = "s" * (len(skipped) > 1)
            mark.set_label(f"skipped: {len(skipped)} step{many}")

    line(below, history, "train_loss", "training", AFTER)
    line(below, history, value_key(history), "validation", LARGEST)
    if stop is not None:
        mark_stop((above, below), below, history, stop)
    below.set_ylabel(loss_label)
    log_scale(above, top if skipped else None)
    finish(above, below)
    return figure


def plot_runs(
    histories: Mapping[str, Sequence[Row]],
    *,
    loss_label: str = "loss",
    max_loss: float | None = None,
    title: str = "",
) -> Figure:
    """Draws the gradient norms and the validation losses of several runs.

    Both scales are logarithmic. Values that are not finite are crosses at the upper
    edge; those above ``max_loss`` are hollow markers there.

    Args:
      histories: For the name of each run its rows; at most five runs.
      loss_label: Label of the lower axis, with its unit.
      max_loss: Where the lower axis ends, so that a run that explodes does not flatten
        the others.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If there are no rows.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> figure = plotting.plot_runs({"as it was": rows, "shorter": rows[:2]})
      >>> [text.get_text() for text in figure.axes[0].get_legend().texts]
      ['as it was', 'shorter']
    """
    check_kind("histories", histories, Mapping, "a dict of rows by name")
    if max_loss is not None:
        check_positive("max_loss", max_loss)
        if max_loss == math.inf:
            raise ValueError("`max_loss` must be finite, or None for no end, got inf.")
    rows = [row for history in histories.values() for row in history]
    if not rows:
        raise ValueError("`histories` must hold at least one row, got none.")
    figure, (above, below) = panels(rows, title)
    top = math.inf if max_loss is None else max_loss
    for i, (name, history) in enumerate(histories.items()):
        style, edge = STYLES[i % len(STYLES)], 1 - 0.07 * i
        line(above, history, "grad_norm", name, style, edge=edge)
        line(below, history, value_key(history), name, style, top=top, edge=edge)
    above.set_ylabel("largest " + NORM_LABEL)
    below.set_ylabel(loss_label)
    log_scale(above)
    log_scale(below, max_loss)
    if max_loss is not None:
        for axis in ("major", "minor"):
            getattr(below.yaxis, f"set_{axis}_formatter")("{x:g}")
    finish(above, below)
    return figure


def _top_of_norms(history: Sequence[Row], skipped: Sequence[SkippedStep]) -> float:
    """Where the axis ends: room above the steps that were taken."""
    norms = column(history, "grad_norm")
    norms = norms[np.isfinite(norms)]
    lost = np.array([r.grad_norm for r in skipped if math.isfinite(r.grad_norm)])
    taken = norms[~np.isclose(norms[:, None], lost[None]).any(1)]
    limits = column(history, "clip_threshold")
    known = np.concatenate([taken, limits[np.isfinite(limits)]])
    return 10 * float(known.max()) if known.size else 10.0
