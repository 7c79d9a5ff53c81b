"""The figure of a landscape: loss and gradient norm over a plane of directions."""

from typing import Any

import numpy as np

from optax_guard import _plotting_marks as marks
from optax_guard._landscape import Landscape


def plot_landscape(landscape: Landscape, *, title: str = "") -> marks.Figure:
    """Draws the loss and the gradient norm over the plane, side by side.

    Lighter is larger, on logarithmic scales where values span decades; the loss has
    contour lines too. Points prone to instability are hatched, those that are not
    finite are crosses, the parameters are a star and the training path is a line.

    Args:
      landscape: What `optax_guard.analysis.landscape` returned.
      title: Title of the figure.

    Returns:
      The figure.
    """
    figure = marks.Figure(figsize=(10, 4.9), dpi=120, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, values, label in (
        (panels[0], landscape.loss, "loss"),
        (panels[1], landscape.grad_norm, marks.NORM_LABEL.replace("\n", " ")),
    ):
        _surface(figure, panel, landscape, values, label)
        _marks(panel, landscape)
        panel.set_title(label.partition(" [")[0])
        panel.set_xlabel("first direction")
    panels[0].set_ylabel("second direction")
    # One for both panels, below, where it hides nothing.
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    if landscape.is_unstable.any():
        words = f"unstable: norm above {landscape.max_norm:.3g}, or not finite"
        handles[words] = marks.Rectangle(
            (0, 0), 1, 1, fill=False, hatch="////", linewidth=0.5
        )
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )
    return figure


def _surface(
    figure: marks.Figure,
    panel: marks.Axes,
    landscape: Landscape,
    values: np.ndarray,
    label: str,
) -> None:
    finite = np.ma.masked_invalid(values)
    norm: Any = marks.color_scale(finite)
    mesh = panel.pcolormesh(
        landscape.alphas,
        landscape.betas,
        finite,
        norm=norm,
        cmap="cividis",
        shading="nearest",
        rasterized=True,
    )
    figure.colorbar(mesh, ax=panel, label=label, shrink=0.9)
    if label == "loss" and finite.count() and finite.min() < finite.max():
        inside = np.linspace(norm(finite.min()), norm(finite.max()), 9)[1:-1]
        lines = panel.contour(
            landscape.alphas,
            landscape.betas,
            finite,
            levels=norm.inverse(inside),
            colors="white",
            linewidths=0.8,
        )
        panel.clabel(lines, fontsize="small", fmt="%.3g")


def _marks(panel: marks.Axes, landscape: Landscape) -> None:
    alphas, betas = np.meshgrid(landscape.alphas, landscape.betas)
    finite = np.isfinite(landscape.loss) & np.isfinite(landscape.grad_norm)
    width, height = (x[1] - x[0] for x in (landscape.alphas, landscape.betas))
    for alpha, beta in zip(
        alphas[landscape.is_unstable], betas[landscape.is_unstable], strict=True
    ):
        corner = alpha - width / 2, beta - height / 2
        panel.add_patch(
            marks.Rectangle(
                corner,
                width,
                height,
                fill=False,
                hatch="////",
                linewidth=0,
                edgecolor=marks.BLACK,
            )
        )
    if not finite.all():
        panel.plot(
            alphas[~finite],
            betas[~finite],
            linestyle="none",
            marker="x",
            color=marks.VERMILLION,
            markeredgewidth=1.5,
            markersize=5,
            label="not finite",
        )
    if landscape.path is not None:
        panel.plot(
            *landscape.path.T,
            color=marks.BLACK,
            marker="o",
            markersize=4,
            markerfacecolor="white",
            linewidth=1.5,
            label=f"training path, {landscape.path_share:.0%} of it in this plane",
        )
    panel.plot([0], [0], label="parameters", **marks.STAR)
    panel.set_xlim(landscape.alphas[0] - width / 2, landscape.alphas[-1] + width / 2)
    panel.set_ylim(landscape.betas[0] - height / 2, landscape.betas[-1] + height / 2)
