"""The figure of a landscape: loss and gradient norm over a plane of directions."""

from typing import Any

import numpy as np

from optax_guard._checks import check_kind
from optax_guard.analysis._landscape import Landscape
from optax_guard.plotting import _marks as marks


def plot_landscape(landscape: Landscape, *, title: str = "") -> marks.Figure:
    """Draws the loss and the gradient norm over the plane, side by side.

    Lighter is larger. Scales are logarithmic where values span decades. The lowest 3 %
    share one colour, and the loss also has contour lines. Points prone to instability
    are hatched, points that are not finite are crosses, the parameters are a star and
    the training path is a line.

    Args:
      landscape: The result of `optax_guard.analysis.landscape`.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If ``landscape`` is anything else.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_guard import analysis, plotting
      >>> params = jnp.array([1.0, 2.0])
      >>> found = analysis.landscape(lambda p: jnp.sum(p**2), params, num_points=3)
      >>> [axes.get_title() for axes in plotting.plot_landscape(found).axes[:2]]
      ['loss', 'gradient norm ...']
    """
    check_kind("landscape", landscape, Landscape, "the result of `landscape`")
    figure = marks.ShownFigure(figsize=(10, 4.9), dpi=120, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    # Where the loss is not finite, its gradient means nothing.
    norms = np.where(np.isfinite(landscape.loss), landscape.grad_norm, np.nan)
    for panel, values, label in (
        (panels[0], landscape.loss, "loss"),
        (panels[1], norms, marks.NORM_LABEL.replace("\n", " ")),
    ):
        _draw_surface(figure, panel, landscape, values, has_lines=label == "loss")
        _draw_marks(panel, landscape)
        panel.set_title(label)
        panel.set_xlabel("first direction")
        panel.locator_params(nbins=5)
    panels[0].set_ylabel("second direction")
    # One legend serves both panels. Below them it hides nothing.
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


def _draw_surface(
    figure: marks.Figure,
    panel: marks.Axes,
    landscape: Landscape,
    values: np.ndarray,
    *,
    has_lines: bool,
) -> None:
    x, y = landscape.alphas, landscape.betas
    # A point at a minimum may be smaller by many orders of magnitude. A scale down to
    # it would give all other points one colour.
    known = values[np.isfinite(values)]
    lowest = np.quantile(known, 0.03) if known.size else 0.0
    shown, scale = marks.colors(np.where(values < lowest, lowest, values))
    how: Any = {"norm": scale, "cmap": "cividis", "shading": "nearest"}
    mesh = panel.pcolormesh(x, y, shown, rasterized=True, **how)
    figure.colorbar(mesh, ax=panel, shrink=0.9)
    if has_lines and shown.count() and shown.min() < shown.max():
        inside = scale.inverse(np.linspace(0, 1, 9)[1:-1])
        lines = panel.contour(x, y, shown, inside, colors="white", linewidths=0.8)
        for text in panel.clabel(lines, fontsize="small", fmt="%.2g"):
            text.set_path_effects(marks.OUTLINE)


def _draw_marks(panel: marks.Axes, landscape: Landscape) -> None:
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
