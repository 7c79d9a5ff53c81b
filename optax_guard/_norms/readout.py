"""Reads norms from an optimizer state: of each leaf, and quantiles over the run."""

from typing import Any, Literal, overload

import jax
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, is_concrete, is_number
from optax_guard._norms.sketch import sketch_quantile
from optax_guard._norms.statistics import GroupStats, NormStats
from optax_guard._trees import find_states, path_names


def leaf_norms(state: Any) -> dict[str, jax.Array]:
    """Reads the norms of all leaves in the last updates, before clipping, by path.

    Works on the host and inside a jitted step. The arrays are copies, which stay when
    the state is donated afterwards.

    Args:
      state: An optimizer state with ``clip_by_leaf_norm`` or ``clip_by_unit_norm`` in
        it, a Flax ``TrainState`` or an ``nnx.Optimizer``. Of several such states the
        first in the order of ``find_states`` counts.

    Returns:
      A dict from paths such as ``"encoder/kernel"``, followed by ``"/0"`` and so on for
      layers of a stacked leaf, to float32[]; for ``clip_by_group_norm``, which has no
      norms of leaves, from labels to norms of groups. Units are those of the gradient;
      NaN or infinite where entries were; 0 after ``init``.

    Raises:
      ValueError: If nothing in ``state`` carries norms of leaves.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1), clip=og.clip_by_leaf_norm(1.0))
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> {path: norm.item() for path, norm in og.leaf_norms(state).items()}
      {'a': 5.0, 'b': 0.5}
    """
    stats = _group_stats(state)
    return _by_name(stats, stats.group_norm)


@overload
def norm_quantile(
    state: Any, q: ArrayLike, *, by_group: Literal[False] = False
) -> jax.Array: ...
@overload
def norm_quantile(
    state: Any, q: ArrayLike, *, by_group: Literal[True]
) -> dict[str, jax.Array]: ...
def norm_quantile(
    state: Any, q: ArrayLike, *, by_group: bool = False
) -> jax.Array | dict[str, jax.Array]:
    """Computes the ``q``-quantile of all finite norms so far, before clipping.

    It comes from the sketch that ``guard``, every clip and ``record_norm`` carry, which
    counts skipped steps, too. So a run that only watches tells how often a threshold
    would have clipped: ``norm_quantile(state, 0.9)`` as ``max_norm`` clips one in ten.
    Works on the host and inside a jitted step.

    Args:
      state: An optimizer state, a Flax ``TrainState`` or an ``nnx.Optimizer``. Of
        several norms in it, the first in the order of ``find_states`` counts.
      q: One or several numbers in [0, 1], shape S; may be traced.
      by_group: Whether to return a quantile for each leaf or group of a clip that was
        made with ``record_quantiles=True``, instead of that of the global norm.

    Returns:
      float32[S], in units of the gradient; within 2 % of the exact quantile for norms
      from 1e-12 to 1e12, while others count as 0 or 1e12; NaN before the first finite
      norm. With ``by_group`` a dict from the names of ``leaf_norms`` to such arrays.

    Raises:
      ValueError: If ``state`` has no such norms, or ``q`` is a concrete number out of
        range.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.record_norm()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> abs(og.norm_quantile(state, 0.5).item() - 2.0) <= 0.02 * 2.0
      True
    """
    check_flag("by_group", by_group)
    if is_concrete(q):
        q = np.asarray(jax.device_get(q))
        if not is_number(q) or np.iscomplexobj(q):
            raise TypeError(f"`q` must be a number or numbers, got {q!r}.")
        q = q.astype(np.float32)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"`q` must be in [0, 1], got {q}.")
    if not by_group:
        return sketch_quantile(_norm_sketch(state), q)
    stats = _group_stats(state)
    if stats.group_sketch is None:
        raise ValueError(
            "`state` holds no quantiles of its groups. Make the clip with "
            "`record_quantiles=True`."
        )
    quantiles = jax.vmap(lambda sketch: sketch_quantile(sketch, q))(stats.group_sketch)
    return _by_name(stats, quantiles)


def _norm_sketch(state: Any) -> jax.Array:
    """Returns the sketch of the first global norms in a state."""
    found = find_states(state, NormStats)
    if not found:
        raise ValueError(
            "`state` holds no norms. Wrap the optimizer in `guard`, or chain "
            "`clip_by_global_norm` or `record_norm` before it."
        )
    return found[0].norm_sketch


def _group_stats(state: Any) -> GroupStats:
    """Returns the first statistics of leaves or groups in a state."""
    found = find_states(state, GroupStats)
    if not found:
        raise ValueError(
            "`state` holds no norms of leaves or groups. Clip with "
            "`clip_by_leaf_norm`, `clip_by_group_norm` or `clip_by_unit_norm`. With an "
            "infinite threshold they only watch."
        )
    return found[0]


def _by_name(stats: GroupStats, values: jax.Array) -> dict[str, jax.Array]:
    """Maps the name of each group to its entry of ``values``."""
    names = path_names(stats.group_names, is_leaf=lambda x: x is None)
    return {name: values[i] for i, name in enumerate(names)}
