"""Columns of a history with a value for each leaf."""

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
# What `fit` puts before the names of a step's metrics.
_OF_STEPS = "train_"


def leaf_columns(
    *, state: Any = None, grads: Any = None, params: Any = None, new_params: Any = None
) -> dict[str, jax.Array]:
    r"""Norms of all leaves, and how much of their parameters the update is.

    For `optax_guard.plotting.plot_leaves`. Scalars for the row of a history: in what
    ``evaluate`` returns, or in the metrics of ``train_step`` (whose means `fit` records
    as ``train_leaf_norm/...``). Works on the host and inside a jitted step, and never
    waits for the device. Norms from ``state`` cost nothing; those of ``grads`` one more
    read of them, ratios one of both parameters.

    Args:
      state: A state that carries norms of leaves, as for `optax_guard.leaf_norms`:
        of the last update, before clipping.
      grads: Instead of it, a tree of gradients, as where the clip is global.
      params: Parameters before an update, a tree.
      new_params: The same after it.

    Returns:
      A dict of float32[] or wider: ``leaf_norm/<path>``, in units of the gradient, if
      ``state`` or ``grads`` is given; ``update_ratio/<path>``, the norm
      :math:`\|w' - w\| / \|w\|`, if both parameters are, infinite where only
      :math:`\|w\|` is 0 and NaN where both are. About 1e-3 is common; 1e-1 throughout
      is a learning rate too high, 1e-6 a layer that stands still.

    Raises:
      ValueError: If there is nothing to measure, both of ``state`` and ``grads``, or
        one of the parameters without the other; if ``state`` carries no such norms.

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
            "`state`, `grads`, or `params` with `new_params` must be given, got none."
        )
    return columns


def has_leaves(names: Iterable[str]) -> bool:
    """Whether one of these columns is for `plot_leaves`."""
    plain = [name.removeprefix(_OF_STEPS) for name in names]
    return any(name.startswith((LEAF_NORM, UPDATE_RATIO)) for name in plain)


def leaf_table(
    rows: Sequence[Mapping[str, Any]], prefix: str
) -> tuple[list[str], np.ndarray]:
    """The leaves in columns with a prefix, and their values.

    Args:
      rows: Rows of a history.
      prefix: `LEAF_NORM` or `UPDATE_RATIO`; with ``train_`` before it, too.

    Returns:
      Paths, and float64[paths, rows]; masked, that is no value, where a row has none.
    """
    names: dict[str, str] = {}
    for row in rows:
        for name in row:
            plain = name.removeprefix(_OF_STEPS)
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
