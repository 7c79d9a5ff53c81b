"""Loss and gradient norm around a point, over a plane of directions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import (
    check_iterable,
    check_kind,
    check_leaves,
    check_positive,
    static_count,
)
from optax_guard._norms.tree_norm import tree_norm
from optax_guard._records.progress import Progress, open_display
from optax_guard._trees import as_argument, is_inexact
from optax_guard.analysis._directions import (
    moved,
    principal_directions,
    project,
    random_direction,
)

# A norm so many times the typical one counts as unstable, as in the diagnosis.
UNSTABLE = 10.0
# How often a display is updated.
_NUM_REPORTS = 50


class Landscape(NamedTuple):
    """The result of `landscape`: NumPy arrays, n points along each direction.

    Attributes:
      alphas: Coordinates along the first direction, float64[n], rising.
      betas: Coordinates along the second, float64[n].
      loss: The loss at ``(alphas[j], betas[i])``, float64[n, n]; may be NaN or
        infinite.
      grad_norm: Global norm of its gradient there, float64[n, n], in units of the
        gradient.
      is_unstable: bool[n, n], whether the point is prone to instability: its loss or
        gradient is not finite, or its norm is above ``max_norm``.
      max_norm: The norm above which a point counts as unstable.
      directions: The two directions, trees like the parameters.
      path: Coordinates of the training path, float64[points, 2]; ``None`` without.
      path_share: Share of the squared distances of its points from the parameters that
        lies in the plane, in [0, 1]. It is small in a random plane, and the path drawn
        there then says little. NaN without a path.
    """

    alphas: np.ndarray
    betas: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    is_unstable: np.ndarray
    max_norm: float
    directions: tuple[Any, Any]
    path: np.ndarray | None
    path_share: float


def landscape(
    loss_fn: Callable[[Any], Any],
    params: Any,
    *,
    key: jax.Array | None = None,
    directions: tuple[Any, Any] | Literal["path"] | None = None,
    span: float | None = None,
    num_points: int = 25,
    path: Sequence[Any] = (),
    max_norm: float | None = None,
    axis: Any = None,
    exclude: Any = None,
    batch_size: int = 5,
    progress: bool | Progress = False,
) -> Landscape:
    r"""Computes loss and gradient norm over a plane through the parameters.

    They are computed at :math:`\theta + \alpha d_1 + \beta d_2` for a square grid of
    :math:`\alpha` and :math:`\beta`. One sees how far from the parameters steps
    explode, and whether the run has passed a cliff. One compiled program computes
    ``batch_size`` points at a time: memory is that of so many gradients for any grid.

    Args:
      loss_fn: ``loss_fn(params) -> scalar``. Arrays that it closes over become
        constants of the program; pass large ones by `jax.tree_util.Partial`.
      params: Any pytree. Leaves that are not floating do not move.
      key: Key of the random directions; ``jax.random.key(0)`` if ``None``.
      directions: ``None`` for two random directions in which each unit (filter, column)
        is as long as that of ``params``; ``"path"`` for the two of length 1 along which
        ``path`` varies most; or two trees like ``params``, which are used as they are.
      span: The grid goes from ``-span`` to ``span`` along both directions. ``None``
        means 1, the length of the parameters themselves; with ``"path"``, the range of
        the path and a tenth more on each side.
      num_points: Points along each direction; an odd number puts one at ``params``.
      path: Trees like ``params``, in the order of the run, to draw in the plane.
      max_norm: Gradient norm above which a point counts as unstable, such as the
        threshold of the clip. If ``None``: 10 times the geometric mean of all finite
        norms of the plane, as for ``EXPLODING`` of `diagnose`.
      axis: The axes of a unit, as for `optax_guard.clip_by_unit_norm`.
      exclude: The leaves that random directions leave as they are: a function from a
        leaf's path to a bool, or a tree prefix of bools. If ``None``: leaves with at
        most one axis longer than 1 (biases, scales of normalisation) as in the paper,
        unless there are no others.
      batch_size: Number of points that ``vmap`` computes at once.
      progress: Whether to show a progress bar, or a display of your own. The work is
        then dispatched in 50 parts instead of one.

    Returns:
      A `Landscape`; `optax_guard.plotting.plot_landscape` draws it.

    Raises:
      TypeError: If an argument is of another type.
      ValueError: If an argument is out of range; if all leaves of ``params`` are
        excluded or not floating; if ``directions`` or ``path`` are not trees like
        ``params``; if ``loss_fn`` does not return a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_guard.analysis import landscape
      >>> w = jnp.array([3.0, 4.0])
      >>> found = landscape(lambda w: jnp.sum(w**2), w, num_points=3)
      >>> found.loss[1, 1].item(), found.grad_norm[1, 1].item()
      (25.0, 10.0)

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    num_points = static_count("num_points", num_points, least=2)
    batch_size = static_count("batch_size", batch_size)
    if not callable(loss_fn):
        raise TypeError(
            f"`loss_fn` must be a function of the parameters, got {loss_fn!r}."
        )
    check_iterable("path", path, "a list of trees like `params`")
    for name, number in (("span", span), ("max_norm", max_norm)):
        if number is not None:
            check_positive(name, number)
    check_leaves("params", params)
    if not any(map(is_inexact, jax.tree.leaves(params))):
        raise ValueError("`params` must have a floating leaf, got none.")
    path = list(path)
    for i, point in enumerate(path):
        _check_like(f"path[{i}]", point, params)
    plane = _choose_plane(params, key, directions, path, axis, exclude)
    track, share = (None, math.nan) if not path else project(params, path, plane)
    alphas, betas = _make_grid(
        num_points, span, track if directions == "path" else None
    )
    points = np.stack(np.meshgrid(alphas, betas), -1).reshape(-1, 2)
    loss, grad_norm = _evaluate_points(
        loss_fn, params, plane, points, batch_size, progress
    )
    shape = num_points, num_points
    if max_norm is None:
        usable = grad_norm[np.isfinite(grad_norm) & (grad_norm > 0)]
        typical = np.exp(np.mean(np.log(usable))) if usable.size else math.inf
        max_norm = UNSTABLE * float(typical)
    is_finite = np.isfinite(loss) & np.isfinite(grad_norm)
    return Landscape(
        alphas=alphas,
        betas=betas,
        loss=loss.reshape(shape),
        grad_norm=grad_norm.reshape(shape),
        is_unstable=~(is_finite & (grad_norm <= max_norm)).reshape(shape),
        max_norm=float(max_norm),
        directions=plane,
        path=track,
        path_share=share,
    )


def _choose_plane(
    params: Any,
    key: jax.Array | None,
    directions: Any,
    path: Sequence[Any],
    axis: Any,
    exclude: Any,
) -> tuple[Any, Any]:
    if directions is None:
        key = jax.random.key(0) if key is None else key
        _check_key(key)
        one, two = jax.random.split(key)
        draw = functools.partial(random_direction, axis=axis, exclude=exclude)
        # Without `jit` each operation would be compiled for each shape of a leaf.
        draw = jax.jit(draw)
        return draw(params, one), draw(params, two)
    if isinstance(directions, str):
        if directions != "path":
            raise ValueError(
                "`directions` must be None, 'path' or two trees like `params`, got "
                f"{directions!r}."
            )
        return principal_directions(params, path)
    check_kind("directions", directions, (tuple, list), "None, 'path' or two trees")
    if len(directions) != 2:
        raise ValueError(f"`directions` must be two trees, got {len(directions)}.")
    for i, direction in enumerate(directions):
        _check_like(f"directions[{i}]", direction, params)
    return directions[0], directions[1]


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", np.dtype(object))
    is_new = jnp.issubdtype(dtype, jax.dtypes.prng_key) and np.ndim(key) == 0
    if not is_new and not (dtype == np.uint32 and np.ndim(key) == 1):
        raise TypeError(f"`key` must be a key of `jax.random`, got {key!r}.")


def _check_like(name: str, tree: Any, params: Any) -> None:
    is_like = jax.tree.structure(tree) == jax.tree.structure(params)
    shapes, wanted = ([np.shape(x) for x in jax.tree.leaves(t)] for t in (tree, params))
    if not is_like or shapes != wanted:
        raise ValueError(
            f"`{name}` must be a tree like `params` with leaves of its shapes, got "
            f"{jax.tree.structure(tree)} with {shapes} for "
            f"{jax.tree.structure(params)} with {wanted}."
        )


def _make_grid(
    num_points: int, span: float | None, track: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    if span is not None or track is None:
        ends = 1.0 if span is None else float(span)
        line = np.linspace(-ends, ends, num_points)
        return line, line.copy()
    low, high = np.minimum(track.min(0), 0), np.maximum(track.max(0), 0)
    room = 0.1 * (high - low).max()
    lines = [
        np.linspace(a - room, b + room, num_points)
        for a, b in zip(low, high, strict=True)
    ]
    return lines[0], lines[1]


def _evaluate_points(
    loss_fn: Any,
    params: Any,
    plane: Any,
    points: np.ndarray,
    batch_size: int,
    progress: bool | Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm at each point, float64[points]."""
    num_points = len(points)
    num_parts = min(_NUM_REPORTS, num_points) if progress is not False else 1
    batch_size = min(batch_size, -(-num_points // num_parts))
    num_batches = -(-num_points // (num_parts * batch_size))
    per_part = num_batches * batch_size
    # All parts have one size, so that one program serves them all.
    filled = np.resize(points, (-(-num_points // per_part) * per_part, 2))
    parts = filled.reshape(-1, num_batches, batch_size, 2)
    function = as_argument(loss_fn)
    found = []
    with open_display(progress, num_points) as display:
        for i, part in enumerate(parts):
            # Wait for each part, so that the display shows the true progress.
            found.append(jax.device_get(_compute_points(function, params, plane, part)))
            display.advance(min(per_part, num_points - i * per_part))
    loss, norm = (np.concatenate(x)[:num_points] for x in zip(*found, strict=True))
    return loss.astype(np.float64), norm.astype(np.float64)


@jax.jit
def _compute_points(
    loss_fn: Any, params: Any, plane: Any, points: jax.Array
) -> tuple[jax.Array, jax.Array]:
    leaves, structure = jax.tree.flatten(params)
    where = [i for i, x in enumerate(leaves) if is_inexact(x)]

    def loss_of(floating: list[jax.Array], rest: list[Any]) -> jax.Array:
        for i, x in zip(where, floating, strict=True):
            rest[i] = x
        loss = jnp.asarray(loss_fn(jax.tree.unflatten(structure, rest)))
        if loss.shape:
            raise ValueError(
                f"`loss_fn` must return a scalar, got shape {loss.shape}. Take the "
                "mean over the batch."
            )
        return loss

    def of_point(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = jax.tree.leaves(moved(params, plane, at))
        loss, grads = jax.value_and_grad(loss_of)([here[i] for i in where], here)
        return loss, tree_norm(grads).value

    losses, norms = jax.lax.map(jax.vmap(of_point), points)
    return losses.reshape(-1), norms.reshape(-1)
