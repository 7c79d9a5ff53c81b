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
    """Draws the runs of `plot_history` in a panel each, on logarithmic scales."""
    rows = [row for history in histories.values() for row in history]
    names = {name for row in rows for name in row}
    has_value = not names.isdisjoint(("val_loss", "value"))
    panels = [marks.NORM_LABEL] * ("grad_norm" in names)
    panels += [loss_label] * (has_value or "train_loss" in names)
    if not panels:
        raise ValueError(
            "`history` must hold at least one row with a norm or a loss, got "
            f"{len(histories)} runs with {len(rows)} rows."
        )
    figure = marks.ShownFigure(
        figsize=(8, 0.6 + 3.2 * len(panels)), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    first, last = (f(row["step"] for row in rows) for f in (min, max))
    margin = 0.05 * (last - first) or 1.0
    # Words on a cross stay within the panel, whichever run is the longest.
    axes[0].set_xlim(first - margin, last + margin)
    for panel, label in zip(axes, panels, strict=True):
        is_norms = label is marks.NORM_LABEL
        top = None if is_norms else max_loss
        for i, (name, history) in enumerate(histories.items()):
            style = marks.thinned(marks.STYLES[i % len(marks.STYLES)], len(history))
            key = marks.value_key(history) if has_value else "train_loss"
            key = "grad_norm" if is_norms else key
            edge = 1 - 0.07 * i
            marks.line(panel, history, key, name, style, top=top, edge=edge)
        panel.set_ylabel("largest " + label if is_norms else label)
        marks.log_scale(panel, top)
    marks.finish(*axes)
    return figure
