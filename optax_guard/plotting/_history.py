"""The figure of a run: norms, losses, shares and the learning rate over steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_guard._checks import check_iterable, check_kind, check_positive
from optax_guard._guarding.skip_readout import SkippedStep
from optax_guard._records.findings import Finding, Severity
from optax_guard._records.readers import Row
from optax_guard._records.rows import as_rows
from optax_guard.plotting import _marks as marks
from optax_guard.plotting._runs import compare_runs
from optax_guard.stop._state import EarlyStoppingState

# Key of a row -> label, style.
Curves = Mapping[str, tuple[str, dict[str, Any]]]
_NORMS: Curves = {
    "grad_norm": ("before clipping", marks.LARGEST),
    "grad_norm_mean": ("before clipping, mean", marks.MEAN),
    "clipped_norm": ("after clipping", marks.AFTER),
    "clip_threshold": ("threshold", marks.THRESHOLD),
}
# These are not finite where the norm is not: one cross stands for all of them.
_FOLLOWING = {"grad_norm_mean", "clipped_norm", "clip_threshold"}
_LOSSES: Curves = {
    "train_loss": ("training", marks.AFTER),
    "val_loss": ("validation", marks.LARGEST),
    "value": ("validation", marks.LARGEST),
}
_SHARES: Curves = {
    "clip_rate": ("clipped", marks.LARGEST),
    "skip_rate": ("skipped by the guard", marks.AFTER),
    "nonfinite_rate": ("not finite", marks.MEAN),
}
_RATES: Curves = {"learning_rate": ("learning rate", marks.LARGEST)}


class _Run(NamedTuple):
    """A run and its marks, as `plot_history` describes them."""

    rows: Sequence[Row]
    findings: Sequence[Finding]
    skipped: Sequence[SkippedStep]
    stop: EarlyStoppingState | None


def plot_history(
    history: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    findings: Sequence[Finding] = (),
    skipped_steps: Iterable[SkippedStep] = (),
    stop: EarlyStoppingState | None = None,
    loss_label: str = "loss",
    max_loss: float | None = None,
    title: str = "",
) -> marks.Figure:
    """Draws the records of a run over its steps, or compares several runs.

    One run has a panel each, if it was recorded, for: norms before and after clipping
    with the threshold (logarithmic); losses with the best evaluation; shares of steps
    clipped and skipped; the learning rate. Several runs share two panels: gradient
    norms and validation losses (training losses if there are no others), both
    logarithmic.

    Values that are not finite are crosses at the upper edge. Losses above ``max_loss``
    are hollow markers there. Warnings and errors are dotted lines where they first
    held. Skipped steps are crosses at their norm, or, with the norm in digits, at the
    upper edge if it is not finite or far above the norms of all other steps.

    Args:
      history: A `History`, or rows such as `fit` returns. For several runs, at most
        five: a dict of them by name, without ``findings``, ``skipped_steps``, ``stop``.
      findings: The findings of `optax_guard.analysis.diagnose`.
      skipped_steps: The steps that `optax_guard.skipped_steps` returned.
      stop: The state of early stopping, updated once an evaluation: once a row that has
        ``val_loss`` or ``value``, or once a row if none has. It marks the stop and the
        best evaluation. Without it the lowest evaluation is the best.
      loss_label: Label of the axis of losses, with its unit.
      max_loss: Upper end of that axis. A run that explodes then does not flatten the
        others.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If an argument is of another type.
      ValueError: If there are no rows, or no known columns in them; if ``max_loss`` is
        not positive and finite; if marks of one run are given for several runs.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "grad_norm": 1 / i, "val_loss": 2 / i} for i in (1, 2, 3)]
      >>> len(plotting.plot_history(rows).axes)  # norms and losses
      2
      >>> figure = plotting.plot_history({"as it was": rows, "shorter": rows[:2]})
      >>> [text.get_text() for text in figure.axes[0].get_legend().texts]
      ['as it was', 'shorter']
    """
    check_kind("findings", findings, Sequence, "the findings of `diagnose`")
    for finding in findings:
        check_kind("findings", finding, Finding, "the findings of `diagnose`")
    check_iterable("skipped_steps", skipped_steps, "a list of `SkippedStep`")
    skipped = list(skipped_steps)
    for each in skipped:
        check_kind("skipped_steps", each, SkippedStep, "a list of `SkippedStep`")
    if stop is not None:
        check_kind("stop", stop, EarlyStoppingState, "an `EarlyStoppingState` or None")
    if max_loss is not None:
        check_positive("max_loss", max_loss)
        if max_loss == math.inf:
            raise ValueError("`max_loss` must be finite, or None for no end, got inf.")
    if not isinstance(history, Mapping):
        run = _Run(as_rows(history), findings, skipped, stop)
        return _draw_run(run, loss_label, max_loss, title)
    given = {"findings": findings, "skipped_steps": skipped, "stop": stop is not None}
    for name in (name for name, value in given.items() if value):
        raise ValueError(
            f"`{name}` must be left out where `history` holds several runs. Draw the "
            "run that it belongs to alone."
        )
    runs = {str(name): as_rows(rows) for name, rows in history.items()}
    return compare_runs(runs, loss_label=loss_label, max_loss=max_loss, title=title)


def _draw_run(
    run: _Run, loss_label: str, max_loss: float | None, title: str
) -> marks.Figure:
    found = _recorded_panels(run, loss_label)
    size = 8, 1 + 2.4 * len(found)
    figure = marks.ShownFigure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    losses = None
    for panel, (label, curves) in zip(axes, found, strict=True):
        is_losses = bool(curves.keys() & _LOSSES.keys())
        top = max_loss if is_losses else None
        _draw_curves(panel, run.rows, curves, top)
        panel.set_ylabel(label)
        if label == marks.NORM_LABEL:
            _draw_norm_axis(panel, run)
            if not run.skipped:
                _cut_off_far_rows(panel, run.rows)
        elif marks.spans_decades(run.rows, curves):
            marks.log_scale(panel, top)
        elif top is not None:
            panel.set_ylim(top=top)
        if is_losses:
            losses = panel
            if run.stop is None:
                marks.mark_lowest(panel, run.rows, marks.value_key(run.rows))
        if curves.keys() & _SHARES.keys():
            panel.set_ylim(-0.03, 1.03)
    if run.stop is not None:
        # A loop may write a row a step, and evaluate now and then.
        key = marks.value_key(run.rows)
        evaluated = [row for row in run.rows if key in row]
        marks.mark_stop(axes, losses, evaluated or run.rows, run.stop)
    _mark_findings(axes, run.findings)
    marks.finish(*axes)
    return figure


def _recorded_panels(run: _Run, loss_label: str) -> list[tuple[str, Curves]]:
    """The label of each panel, and its curves for which there are values."""
    is_threshold_shown = marks.is_threshold_of_norms(run.rows)
    found = []
    for label, curves in (
        (marks.NORM_LABEL, _NORMS),
        (loss_label, _LOSSES),
        ("share of steps", _SHARES),
        ("learning rate", _RATES),
    ):
        shown = {
            key: curve for key, curve in curves.items() if _is_shown(run.rows, key)
        }
        if not is_threshold_shown:
            shown.pop("clip_threshold", None)
        if shown or (curves is _NORMS and run.skipped):
            found.append((label, shown))
    if not any(curves for _, curves in found):
        raise ValueError(
            "`history` must hold at least one row with a norm or a loss, got "
            f"{len(run.rows)} rows. `History.read` lists the names that are known."
        )
    return found


def _is_shown(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if key in row]
    if key == "clipped_norm":
        # Where nothing was clipped, it would hide the norm.
        return any(
            key in row and row[key] != row.get("grad_norm")
            for row in rows
            if not math.isnan(row.get(key, math.nan))
        )
    if key in ("skip_rate", "nonfinite_rate"):
        return any(values)
    return bool(values)


def _draw_curves(
    panel: marks.Axes, rows: Sequence[Row], curves: Curves, top: float | None
) -> None:
    for i, (key, (name, style)) in enumerate(curves.items()):
        style = marks.thinned(style, len(rows))
        told_by = "grad_norm" if key in _FOLLOWING else None
        # Crosses of the same step are one below the other.
        edge = 1 - 0.11 * i
        marks.line(panel, rows, key, name, style, top=top, edge=edge, told_by=told_by)


def _draw_norm_axis(panel: marks.Axes, run: _Run) -> None:
    """Crosses of the skipped steps, and the scale that leaves room for the others."""
    top = _top_of_norms(run.rows, run.skipped) if run.skipped else None
    steps = [row["step"] for row in run.rows if "step" in row]
    told: dict[str, float] = {}
    # Words are about as wide.
    width = 0.04 * (max(steps, default=0) - min(steps, default=0))
    for i, step in enumerate(run.skipped):
        # Of neighbours with the same words the first has them.
        words = f"{step.grad_norm:.0e}"
        has_words = step.update - told.get(words, -math.inf) > width
        if has_words:
            told[words] = step.update
        (mark,) = marks.cross(
            panel,
            step.update + 1,
            step.grad_norm,
            marks.VERMILLION,
            top=top,
            of=None if has_words else "",
        )
        if i == 0:
            plural = "s" * (len(run.skipped) > 1)
            mark.set_label(f"skipped: {len(run.skipped)} step{plural}")
    marks.log_scale(panel, top)


def _top_of_norms(rows: Sequence[Row], skipped: Sequence[SkippedStep]) -> float:
    """The end of the axis: ten times the largest norm of the steps that were taken."""
    norms = marks.column(rows, "grad_norm")
    norms = norms[np.isfinite(norms)]
    lost = np.array([r.grad_norm for r in skipped if math.isfinite(r.grad_norm)])
    taken = norms[~np.isclose(norms[:, None], lost[None]).any(1)]
    limits = marks.column(rows, "clip_threshold")
    known = np.concatenate([taken, limits[np.isfinite(limits)]])
    return 10 * float(known.max()) if known.size else 10.0


def _cut_off_far_rows(panel: marks.Axes, rows: Sequence[Row]) -> None:
    """Crosses at the edge for rows of skips whose norms would flatten all others."""
    far, others, before = [], [], 0.0
    for row in rows:
        count = row.get("num_skipped", before)
        # Beside a count the rate may be that of all steps so far.
        rate = 0 if "num_skipped" in row else row.get("skip_rate", 0)
        is_skip = count > before or rate > 0
        is_finite = math.isfinite(row.get("grad_norm", math.nan))
        (far if is_skip and is_finite else others).append(row)
        before = count
    top = _top_of_norms(others, [])
    far = [row for row in far if row["grad_norm"] > top]
    if not far or not np.isfinite(marks.column(others, "grad_norm")).any():
        return
    named = -math.inf
    for row in far:
        # Words are about as wide as that: those of neighbours would overlap.
        has_words = row["step"] - named > 0.05 * (rows[-1]["step"] - rows[0]["step"])
        named = row["step"] if has_words else named
        of = None if has_words else ""
        norm, color = row["grad_norm"], marks.VERMILLION
        (mark,) = marks.cross(panel, row["step"], norm, color, top=top, of=of)
        mark.set_label("row of a skipped step" if row is far[0] else "")
    marks.log_scale(panel, top)


def _mark_findings(axes: np.ndarray, findings: Sequence[Finding]) -> None:
    shown = [f for f in findings if f.severity != Severity.INFO]
    for i, finding in enumerate(sorted(shown, key=lambda f: f.step)):
        for panel in axes:
            panel.axvline(finding.step, color=marks.VERMILLION, linestyle=":", zorder=1)
        left, right = axes[0].get_xlim()
        axes[0].annotate(
            str(finding.code),
            (finding.step, 1),
            xycoords=axes[0].get_xaxis_transform(),
            # Codes are long: each has a line of its own.
            xytext=(0, 4 + 10 * (len(shown) - 1 - i)),
            textcoords="offset points",
            fontsize="x-small",
            color=marks.VERMILLION,
            ha="left" if finding.step < (left + right) / 2 else "right",
        )
