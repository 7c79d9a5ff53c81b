"""Where the units of each leaf lie: what one output of a layer depends on."""

import operator
from typing import Any

from optax_guard._mesh_axes import AxisName, layouts
from optax_guard._paths import for_each_leaf, path_names

# The axes along which a unit lies, by the rank of a leaf: inputs come before outputs.
AXES_BY_RANK = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}


def unit_axes(
    tree: Any, axis: Any, axis_name: AxisName = None
) -> list[tuple[int, ...]]:
    """For each leaf the axes along which its units lie."""
    rules = for_each_leaf("axis", axis if callable(axis) else lambda _: axis, tree)
    axes = []
    for i, (layout, rule) in enumerate(
        zip(layouts(tree, axis_name), rules, strict=True)
    ):
        shape = layout.shape
        if rule is not None:
            try:
                axes.append(_normalized(rule, len(shape)))
            except (TypeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"`axis` must name axes of each leaf, got {rule} for "
                    f"{path_names(tree)[i]!r} of shape {shape}."
                ) from error
        elif not layout.is_whole and len(shape) > 1 >= sum(n != 1 for n in shape):
            raise ValueError(
                "`axis` must be given with `axis_name` for a leaf of which a device "
                f"has one row or column, got None for {path_names(tree)[i]!r} of local "
                f"shape {shape}. Its rank alone does not tell its units."
            )
        elif sum(n != 1 for n in shape) <= 1:
            axes.append(tuple(range(len(shape))))
        elif len(shape) in AXES_BY_RANK:
            axes.append(AXES_BY_RANK[len(shape)])
        else:
            raise ValueError(
                f"`axis` must be given for a leaf of more than 5 axes, got None for "
                f"{path_names(tree)[i]!r} of shape {shape}."
            )
    return axes


def _normalized(axis: Any, ndim: int) -> tuple[int, ...]:
    named = axis if isinstance(axis, tuple | list) else (axis,)
    axes = tuple(range(ndim)[operator.index(a)] for a in named)
    if len(set(axes)) < len(axes):
        raise ValueError("an axis is named twice")
    return axes
