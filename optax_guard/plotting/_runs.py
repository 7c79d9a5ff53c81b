"""The comparison of several runs: norms and validation losses over steps."""

from collections.abc import Mapping, Sequence

from optax_guard.plotting import _marks as marks


def compare_runs(
    histories: Mapping[str, Sequence[marks.Row]],
    *,
    loss_label: str,
    max_loss: float | None,
    title: str,
) -> marks.Figure:
    """Draws the runs of `plot_history` in two panels, on logarithmic scales."""
    rows = [row for history in histories.values() for row in history]
    figure, (above, below) = marks.two_panels(rows, title)
    for i, (name, history) in enumerate(histories.items()):
        style, edge = marks.STYLES[i % len(marks.STYLES)], 1 - 0.07 * i
        marks.line(above, history, "grad_norm", name, style, edge=edge)
        key = marks.value_key(history)
        marks.line(below, history, key, name, style, top=max_loss, edge=edge)
    above.set_ylabel("largest " + marks.NORM_LABEL)
    below.set_ylabel(loss_label)
    marks.log_scale(above)
    marks.log_scale(below, max_loss)
    if max_loss is not None:
        for axis in ("major", "minor"):
            getattr(below.yaxis, f"set_{axis}_formatter")("{x:g}")
    marks.finish(above, below)
    return figure
