"""The figures of a report by name: each thing is drawn once."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from optax_guard._records.findings import Finding
from optax_guard._records.history import History
from optax_guard._records.suggest import FEWEST, usable_norms
from optax_guard.analysis._leaf_columns import has_leaves
from optax_guard.analysis._replay import evaluations_of, replay
from optax_guard.stop import patience

# More curves cannot be told apart.
MOST_RUNS = 5
# These patiences are played to a run that has enough evaluations to tell their noise.
_PATIENCES = (3, 5, 10, 20)
_FEWEST_EVALUATIONS = 8


class Drawn(NamedTuple):
    """A figure: its caption, and its PNG file."""

    caption: str
    png: bytes


def figures_of(history: History, findings: list[Finding]) -> dict[str, Drawn]:
    """The figures of what was recorded; none of one row, or without matplotlib."""
    plotting = _plotting()
    if plotting is None or len(history) < 2:
        return {}
    figures = {
        "history.png": _drawn(
            "Norms, losses and shares over the steps",
            plotting.plot_history(history, findings=findings),
        )
    }
    if len(usable_norms(history)) >= FEWEST:
        figures["norms.png"] = _drawn(
            "Distribution of the norms, and the share that each threshold clips",
            plotting.plot_norm_distribution(history),
        )
    if stopping := _stopping(history):
        figures["stopping.png"] = stopping
    if has_leaves(name for row in history for name in row):
        figures["leaves.png"] = _drawn(
            "Norms and updates of each leaf over the steps",
            plotting.plot_leaves(history),
        )
    return figures


def figure_of_runs(histories: Mapping[str, History]) -> dict[str, Drawn]:
    """The figure of the first runs side by side; none without matplotlib."""
    plotting = _plotting()
    curves = {name: history for name, history in histories.items() if len(history) > 1}
    if plotting is None or not curves:
        return {}
    shown = {_plain(name): curves[name] for name in list(curves)[:MOST_RUNS]}
    left = len(curves) - len(shown)
    caption = (
        f"The first {MOST_RUNS} runs side by side" if left else "All runs side by side"
    )
    return {"runs.png": _drawn(caption, plotting.plot_history(shown))}


def _stopping(history: History) -> Drawn | None:
    """The figure of gap and rules; None if there is nothing to draw."""
    from optax_guard.plotting._outlook import plot_outlook

    if not any(row.keys() & {"val_loss", "value"} for row in history):
        return None
    evaluations, _ = evaluations_of(list(history), None)
    has_gap = any("train_loss" in row for row in evaluations)
    rules = {
        f"patience({n})": patience(n)
        for n in _PATIENCES
        if _FEWEST_EVALUATIONS <= len(evaluations) > n
    }
    words = ["the gap between validation and training loss"] * has_gap
    words += ["where other rules would have stopped"] * bool(rules)
    if not words:
        return None
    caption = ", and ".join(words)
    figure = plot_outlook(evaluations, replay(evaluations, rules) if rules else [])
    return _drawn(caption[0].upper() + caption[1:], figure)


def _plotting() -> Any:
    try:
        from optax_guard import plotting
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    return plotting


def _plain(name: str) -> str:
    """A name in which nothing begins a formula, and which a legend shows."""
    return name.replace("$", r"\$").lstrip("_") or "_"


def _drawn(caption: str, figure: Any) -> Drawn:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return Drawn(caption, image.getvalue())
