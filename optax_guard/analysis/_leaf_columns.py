"""Columns of a history that hold a value for each leaf."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_leaves
from optax_guard._norms.axis_norms import ratio, stacked_norms
from optax_guard._norms.readout import leaf_norms
from optax_guard._trees import is_inexact, path_names

LEAF_NORM, UPDATE_RATIO = "leaf_norm/", "update_ratio/"
# `fit` puts this before the names of the metrics of a step.
_STEP_PREFIX = "train_"


def leaf_columns(
    *, state: Any = None, grads: Any = None, params: Any = None, new_params: Any = None
) -> dict[str, jax.Array]:
    r"""Measures the norm of each leaf, and the ratio of its update to its parameters.

    The columns are scalars for a row of a history, which
    `optax_guard.plotting.plot_leaves` draws. ``evaluate`` may return them, or
    ``train_step`` among its metrics (`fit` records their means as
    ``train_leaf_norm/...``). This works on the host and inside a jitted step, and never
    waits for the device. Norms from ``state`` cost nothing; norms of ``grads`` cost one
    more read of them, ratios one read of both parameters.

    Args:
      state: A state that holds norms of leaves, as for `optax_guard.leaf_norms`: those
        of the last update, before clipping.
      grads: A tree of gradients in place of ``state``, for example if the clip is
        global.
      params: Tree of parameters before an update.
      new_params: The same tree after the update.

    Returns:
      A dict of float32[] or wider. ``leaf_norm/<path>``, in units of the gradient, if
      ``state`` or ``grads`` is given. ``update_ratio/<path>``, the norm
      :math:`\|w' - w\| / \|w\|`, if both parameters are given; infinite if only
      :math:`\|w\|` is 0, and NaN if both norms are. About 1e-3 is common. If all are
      1e-1, the learning rate is too high; at 1e-6 a layer does not move.

    Raises:
      TypeError: If an argument holds a leaf that is not an array.
      ValueError: If no argument is given, or both ``state`` and ``grads``, or only one
        of the parameters; if ``state`` holds no norms of leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_guard.analysis import leaf_columns
      >>> old, new = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([3.0, 4.5])}
      >>> columns = leaf_columns(grads=old, params=old, new_params=new)
      >>> {name: round(value.item(), 6) for name, value in columns.items()}
      {'leaf_norm/w': 5.0, 'update_ratio/w': 0.1}
    """
    if (params is None) != (new_params is None):
        raise ValueError("`params` and `new_params` must be given together.")
    if state is not None and grads is not None:
        raise ValueError("`grads` must be left out where `state` has their norms.")
    trees = {"grads": grads, "params": params, "new_params": new_params}
    for name, tree in trees.items():
        check_leaves(name, tree)
    if jax.tree.structure(params) != jax.tree.structure(new_params):
        raise ValueError(
            "`new_params` must have the structure of `params`, "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(new_params)}."
        )
    columns = {}
    if state is not None:
        norms = leaf_norms(state)
        columns |= {LEAF_NORM + path: norm for path, norm in norms.items()}
    if grads is not None:
        norms = _norms_by_path(grads)
        columns |= {LEAF_NORM + path: norm for path, norm in norms.items()}
    if params is not None:
        sizes = _norms_by_path(params)
        steps = _norms_by_path(
            jax.tree.map(
                lambda new, old: new - old if is_inexact(old) else old,
                new_params,
                params,
            )
        )
        for path, size in sizes.items():
            share = ratio(steps[path], jnp.where(size > 0, size, 1.0))
            nothing = jnp.where(steps[path] > 0, jnp.inf, jnp.nan)
            columns[UPDATE_RATIO + path] = jnp.where(size > 0, share, nothing)
    if not columns:
        raise ValueError(
            "One of `state`, `grads`, or `params` with `new_params` must be given, got "
            "none."
        )
    return columns


def has_leaves(names: Iterable[str]) -> bool:
    """Whether `plot_leaves` draws one of these columns."""
    plain = [name.removeprefix(_STEP_PREFIX) for name in names]
    return any(name.startswith((LEAF_NORM, UPDATE_RATIO)) for name in plain)


def leaf_table(
    rows: Sequence[Mapping[str, Any]], prefix: str
) -> tuple[list[str], np.ndarray]:
    """The leaves that have columns with a prefix, and their values.

    Args:
      rows: Rows of a history.
      prefix: `LEAF_NORM` or `UPDATE_RATIO`; a ``train_`` before it is ignored.

    Returns:
      Paths, and float64[paths, rows]; masked where a row has no value.
    """
    names: dict[str, str] = {}
    for row in rows:
        for name in row:
            plain = name.removeprefix(_STEP_PREFIX)
            if plain.startswith(prefix):
                names.setdefault(plain.removeprefix(prefix), name)
    values = np.ma.masked_all((len(names), len(rows)))
    for i, name in enumerate(names.values()):
        for j, row in enumerate(rows):
            if name in row:
                values[i, j] = float(row[name])
    return list(names), values


def _norms_by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves(tree)
    known = [i for i, x in enumerate(leaves) if is_inexact(x)]
    floating = [jnp.asarray(leaves[i]) for i in known]
    norms = stacked_norms(floating, tuple(tuple(range(x.ndim)) for x in floating))
    paths = path_names(tree)
    return {paths[i]: norms[k] for k, i in enumerate(known)}
