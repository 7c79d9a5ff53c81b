"""Heat maps over steps with a line for each leaf: gradient norms and update ratios."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from optax_guard._records.rows import as_rows
from optax_guard.analysis._leaf_columns import LEAF_NORM, UPDATE_RATIO, leaf_table
from optax_guard.plotting import _marks as marks

_HEADINGS = {
    LEAF_NORM: marks.NORM_LABEL,
    UPDATE_RATIO: "norm of the update /\nnorm of the parameters",
}
# Darker is larger.
_COLORS = "cividis_r"
_GLOBAL = "all (global norm)"
# More names than this would overlap.
_MOST_NAMES = 40


def plot_leaves(
    history: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    title: str = "",
) -> marks.Figure:
    """Draws the norm of each leaf, and the ratio of update to parameters, over steps.

    Each of the two has a heat map, if it was recorded, on a logarithmic scale. The
    first line of the norms is the global norm, so that one sees which leaf makes it.
    Several runs, such as one clipped by global norm and one by the norm of leaves,
    stand side by side in the same colours; a few huge values do not change them. NaN
    and infinite values have marks of their own. A step without a record is blank.

    Args:
      history: A `History` or rows with the columns of
        `optax_guard.analysis.leaf_columns`; for several runs, a dict of them by name.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: If no row has such a column.

    Examples:
      >>> from optax_guard import plotting
      >>> rows = [{"step": i, "leaf_norm/a": 1 / i, "leaf_norm/b": 1.0} for i in (1, 2)]
      >>> figure = plotting.plot_leaves(rows, title="norms of leaves")
    """
    named: Any = history if isinstance(history, Mapping) else {"": history}
    runs = {str(name): as_rows(rows) for name, rows in named.items()}
    tables = {prefix: _tables_of_runs(runs, prefix) for prefix in _HEADINGS}
    tables = {prefix: found for prefix, found in tables.items() if found[0]}
    if not tables:
        raise ValueError(
            f"`history` must have columns {LEAF_NORM}<path> or {UPDATE_RATIO}<path>, "
            "got none. Record the columns that `analysis.leaf_columns` returns."
        )
    # The labels of the colours need three inches.
    sizes = [min(45, len(names)) for names, _ in tables.values()]
    heights = [max(3.0, 1.3 + 0.2 * size) for size in sizes]
    figure = marks.ShownFigure(
        figsize=(3.5 + 4.5 * len(runs), sum(heights)), dpi=120, layout="constrained"
    )
    figure.suptitle(title)
    grid = figure.subplots(
        len(tables), len(runs), sharey="row", squeeze=False, height_ratios=heights
    )
    legend: dict[str, Any] = {}
    for line, (prefix, (names, values)) in zip(grid, tables.items(), strict=True):
        every = np.ma.concatenate([x.ravel() for x in values])
        _, scale = marks.colors(_without_outliers(every))
        for panel, run, shown in zip(line, runs, values, strict=True):
            _draw_heat_map(panel, runs[run], shown, scale)
            legend |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
            if names[0] == _GLOBAL:
                panel.axhline(0.5, color=marks.BLACK, linewidth=2)
        stride = -(-len(names) // _MOST_NAMES)
        places = range(0, len(names), stride)
        line[0].set_yticks(places, names[::stride], fontsize="small")
        line[0].set_ylim(len(names) - 0.5, -0.5)
        # The layout makes room for colours beside one panel, not beside several.
        colors = marks.ScalarMappable(scale, _COLORS)
        top = np.ma.masked_invalid(every).max()
        extend: Any = (
            "max" if scale.vmax is not None and top > scale.vmax else "neither"
        )
        figure.colorbar(colors, ax=line[-1], label=_HEADINGS[prefix], extend=extend)
    for run, top, bottom in zip(runs, grid[0], grid[-1], strict=True):
        top.set_title(run)
        bottom.set_xlabel("steps done")
    if legend:
        place: Any = {"loc": "outside lower right", "ncols": 2, "fontsize": "small"}
        figure.legend(legend.values(), legend.keys(), **place)
    return figure


def _without_outliers(values: Any) -> Any:
    """Values cut where a few huge ones would give all others one colour."""
    known = np.ma.masked_invalid(values).compressed()
    if not known.size:
        return values
    top = 10 * np.quantile(known, 0.98)
    return np.ma.minimum(values, known[known <= top].max()) if top > 0 else values


def _tables_of_runs(
    runs: Mapping[str, list[dict[str, float]]], prefix: str
) -> tuple[list[str], list[Any]]:
    """Names of the leaves of all runs, and for each run the values [names, rows]."""
    found = [leaf_table(rows, prefix) for rows in runs.values()]
    names = list(dict.fromkeys(name for known, _ in found for name in known))
    first = []
    if names and prefix == LEAF_NORM:
        every = [row for rows in runs.values() for row in rows]
        first = [_GLOBAL] * any("grad_norm" in row for row in every)
    tables = []
    for rows, (known, values) in zip(runs.values(), found, strict=True):
        full = np.ma.masked_all((len(first) + len(names), len(rows)))
        for name, line in zip(known, values, strict=True):
            full[len(first) + names.index(name)] = line
        for j, row in enumerate(rows):
            if first and "grad_norm" in row:
                full[0, j] = row["grad_norm"]
        tables.append(full)
    return first + names, tables


def _draw_heat_map(
    panel: marks.Axes, rows: list[dict[str, float]], values: Any, scale: Any
) -> None:
    # A row without any of these values would be a blank column.
    known = ~np.ma.getmaskarray(values).all(0)
    if not known.any():
        words: Any = {"ha": "center", "va": "center", "transform": panel.transAxes}
        panel.text(0.5, 0.5, "not recorded", **words)
        return
    steps, values = marks.column(rows, "step")[known], values[:, known]
    shown = np.ma.masked_invalid(values)
    if isinstance(scale, marks.LogNorm) and scale.vmin is not None:
        shown = np.ma.maximum(shown, scale.vmin)
    how: Any = {"norm": scale, "cmap": _COLORS, "rasterized": True}
    lines = np.arange(len(values) + 1) - 0.5
    panel.pcolormesh(_cell_edges(steps), lines, shown, **how)
    is_known, raw = ~np.ma.getmaskarray(values), np.ma.getdata(values)
    style: Any = {"color": marks.VERMILLION, "linestyle": "none", "markersize": 5}
    for label, marker, is_marked in (
        ("NaN", "x", np.isnan(raw)),
        ("infinite", "^", np.isinf(raw)),
    ):
        line, row = np.nonzero(is_known & is_marked)
        if line.size:
            panel.plot(steps[row], line, marker=marker, label=label, **style)


def _cell_edges(centers: np.ndarray) -> np.ndarray:
    """The edges between cells around these centers."""
    if len(centers) < 2:
        return np.array([-0.5, 0.5]) + centers[0]
    middles = (centers[1:] + centers[:-1]) / 2
    first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])
