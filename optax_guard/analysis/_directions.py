"""Directions in the space of parameters: random, or along a path."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_flag
from optax_guard._norms.axis_norms import ratio, stacked_norms
from optax_guard._norms.groups import each_part, unit_axes
from optax_guard._norms.mesh_axes import layouts
from optax_guard._trees import dtype_of, for_each_leaf, is_inexact


def random_direction(
    params: Any, key: jax.Array, *, axis: Any = None, exclude: Any = None
) -> Any:
    r"""Draws a random direction with units as long as those of the parameters.

    For a unit (a filter, a column of a matrix) :math:`w` and normal numbers :math:`d`
    of its shape, it is :math:`d \|w\| / \|d\|`. Planes of networks with different
    scales of weights can then be compared.

    Args:
      params: Any pytree; the direction is 0 in leaves that are not floating.
      key: Key of the normal numbers.
      axis: As for `optax_guard.clip_by_unit_norm`.
      exclude: As for `landscape`.

    Returns:
      A tree like ``params``; floating leaves are float32 or wider.

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, section 4
    """
    leaves, structure = jax.tree.flatten(params)
    axes = unit_axes(params, axis)
    fixed = _is_excluded(params, exclude)
    groups = each_part(params, axes, layouts(params, None))
    drawn = list(map(jnp.zeros_like, leaves))
    for i, x in zip(groups.indices, groups.floating(params), strict=True):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        drawn[i] = jnp.zeros(x.shape, wide)
        if fixed[i]:
            continue
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, wide)
        shape = [1 if a in axes[i] else n for a, n in enumerate(x.shape)]
        lengths, sizes = (
            stacked_norms([y], (axes[i],)).reshape(shape) for y in (noise, x)
        )
        # A unit of zeros has length 0 and does not move.
        factor = jnp.where(lengths > 0, ratio(sizes, jnp.maximum(lengths, 1e-30)), 0.0)
        drawn[i] = noise * factor.astype(wide)
    return jax.tree.unflatten(structure, drawn)


def _is_excluded(params: Any, exclude: Any) -> list[bool]:
    """For each leaf, whether the direction leaves it as it is."""
    leaves = jax.tree.leaves(params)
    is_floating = [is_inexact(x) for x in leaves]
    if exclude is not None:
        fixed = for_each_leaf("exclude", exclude, params)
        for each in fixed:
            check_flag("exclude", each)
    else:
        fixed = [sum(n != 1 for n in np.shape(x)) <= 1 for x in leaves]
        if all(f for f, floats in zip(fixed, is_floating, strict=True) if floats):
            fixed = [False] * len(leaves)
    if not any(floats and not f for f, floats in zip(fixed, is_floating, strict=True)):
        raise ValueError(
            "`params` must have a floating leaf that is not excluded, got none."
        )
    return fixed


def principal_directions(params: Any, path: Sequence[Any]) -> tuple[Any, Any]:
    """The two directions of length 1 along which a path varies most from ``params``.

    They come from the eigenvectors of the inner products [points, points] of the path's
    differences to ``params``. A matrix [parameters, parameters] is never needed.
    """
    steps = [difference(point, params) for point in path]
    sizes, vectors = np.zeros(2), np.eye(2)
    if len(steps) >= 2:
        sizes, vectors = np.linalg.eigh(_products(steps, steps))
    # A second direction within the rounding of float32 is none.
    if not sizes[-2] > 1e-6 * sizes[-1]:
        raise ValueError(
            "`path` must turn off the straight line through `params` for "
            f"`directions='path'`; its {len(steps)} points do not. Use random "
            "directions."
        )

    def combined(i: int) -> Any:
        weights = vectors[:, i] / np.sqrt(sizes[i])
        return jax.tree.map(
            lambda *xs: sum(float(w) * x for w, x in zip(weights, xs, strict=True)),
            *steps,
        )

    return combined(-1), combined(-2)


def project(
    params: Any, path: Sequence[Any], directions: tuple[Any, Any]
) -> tuple[np.ndarray, float]:
    """Projects the points of a path onto a plane.

    Args:
      params: The origin of the plane.
      path: Trees like ``params``.
      directions: The two that span the plane, at any angle.

    Returns:
      Coordinates of the nearest points of the plane, float64[points, 2]; and the share
      of the squared distances from the origin that lies in the plane, in [0, 1].
    """
    steps = [difference(point, params) for point in path]
    products = _products(steps, directions)
    # Least squares: directions need not be orthogonal, nor of length 1.
    inverse = np.linalg.pinv(_products(directions, directions))
    coordinates = products @ inverse
    inside = np.sum(coordinates * products)
    total = sum(_products([step], [step]).item() for step in steps)
    return coordinates, float(min(1.0, inside / total)) if total > 0 else 1.0


def _products(some: Sequence[Any], others: Sequence[Any]) -> np.ndarray:
    """Inner products of trees over floating leaves, float64[some, others]."""

    def product(a: Any, b: Any) -> Any:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        parts = [jnp.real(jnp.vdot(x, y)) for x, y in pairs if is_inexact(x)]
        return sum(parts)

    table = [[product(a, b) for b in others] for a in some]
    return np.array(jax.device_get(table), np.float64)


def difference(point: Any, params: Any) -> Any:
    """The point minus ``params``, float32 or wider; 0 in leaves that do not float."""
    return _map_floating(lambda x, y: _wide(x) - _wide(y), point, params)


def moved(params: Any, directions: tuple[Any, Any], at: jax.Array) -> Any:
    """The parameters at coordinates ``at`` (float[2]) of a plane, in their dtypes."""

    def move(w: Any, a: Any, b: Any) -> jax.Array:
        new = _wide(w) + at[0] * _wide(a) + at[1] * _wide(b)
        return new.astype(dtype_of(w))

    return jax.tree.map(
        lambda w, a, b: move(w, a, b) if is_inexact(w) else w, params, *directions
    )


def _map_floating(f: Callable[..., Any], tree: Any, other: Any) -> Any:
    return jax.tree.map(
        lambda x, y: f(x, y) if is_inexact(x) else jnp.zeros_like(x), tree, other
    )


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(dtype_of(x), jnp.float32))
