"""The norms that a run has seen: of each leaf, and their quantiles."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax.typing import ArrayLike

from optax_guard._checks import check_flag, check_kind, is_concrete, is_number
from optax_guard._norms.sketch import sketch_merge, sketch_quantile
from optax_guard._norms.statistics import GroupStats, NormStats
from optax_guard._trees import find_states, path_names


def leaf_norms(state: Any) -> dict[str, jax.Array]:
    """The norms of all leaves in the last updates, before clipping, by path.

    Works on the host and inside a jitted step; the arrays are copies, so a state that
    is donated afterwards does not take them along.

    Args:
      state: An optimizer state with ``clip_by_leaf_norm`` or ``clip_by_unit_norm`` in
        it, a Flax ``TrainState`` or an ``nnx.Optimizer``. Where there are several, the
        first in ``find_states``' order counts.

    Returns:
      A dict from paths such as ``"encoder/kernel"``, followed by ``"/0"`` and so on for
      layers of a stacked leaf, to float32[]; from ``clip_by_group_norm``, which has no
      norms of leaves, from labels. Units are those of the gradient; NaN or infinite
      where entries were; 0 after ``init``.

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
    state: Any,
    q: ArrayLike,
    *,
    by_group: Literal[False] = False,
    merge: Sequence[Any] = (),
) -> jax.Array: ...
@overload
def norm_quantile(
    state: Any, q: ArrayLike, *, by_group: Literal[True], merge: Sequence[Any] = ()
) -> dict[str, jax.Array]: ...
def norm_quantile(
    state: Any, q: ArrayLike, *, by_group: bool = False, merge: Sequence[Any] = ()
) -> jax.Array | dict[str, jax.Array]:
    """The ``q``-quantile of all finite norms so far, before clipping.

    From the sketch that ``guard``, every clip and ``record_norm`` carry; it counts
    skipped steps, too. A run that only watches so tells which threshold would have
    clipped how often: ``norm_quantile(state, 0.9)`` as ``max_norm`` clips one in ten.
    Works on the host and inside a jitted step.

    Args:
      state: An optimizer state, a Flax ``TrainState`` or an ``nnx.Optimizer``. Where it
        holds several, the first in ``find_states``' order counts.
      q: One or several numbers in [0, 1], shape S; may be traced.
      by_group: Whether to return a quantile for each leaf or group of a clip that was
        made with ``record_quantiles=True``, instead of that of the global norm.
      merge: Further states, of other runs or of hosts that each saw other gradients:
        the quantile is that of the norms of all, to the same error.

    Returns:
      float32[S], in units of the gradient; within 2 % of the exact quantile for norms
      from 1e-12 to 1e12, beyond which they count as 0 or 1e12; NaN before the first
      finite norm. With ``by_group`` a dict of such from the names of ``leaf_norms``.

    Raises:
      ValueError: If nothing in ``state`` carries such norms, or ``q`` is a Python
        number out of range.

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
    check_kind("merge", merge, (list, tuple), "a list of states")
    if is_concrete(q):
        q = np.asarray(jax.device_get(q))
        if not is_number(q) or np.iscomplexobj(q):
            raise TypeError(f"`q` must be a number or numbers, got {q!r}.")
        q = q.astype(np.float32)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"`q` must be in [0, 1], got {q}.")
    if by_group:
        merged = _merged(_group_sketch, state, merge)
        each = jax.vmap(lambda sketch: sketch_quantile(sketch, q))(merged)
        return _by_name(_group_stats(state), each)
    return sketch_quantile(_merged(_norm_sketch, state, merge), q)


def _merged(
    sketch_of: Callable[[str, Any], jax.Array], state: Any, others: Sequence[Any]
) -> jax.Array:
    sketches = [sketch_of("state", state)]
    sketches += [sketch_of(f"merge[{i}]", each) for i, each in enumerate(others)]
    shapes = [sketch.shape for sketch in sketches]
    if len(set(shapes)) > 1:
        raise ValueError(
            "`merge` must hold states of the same groups as `state`, got sketches of "
            f"the shapes {shapes}."
        )
    return functools.reduce(sketch_merge, sketches)


def _norm_sketch(name: str, state: Any) -> jax.Array:
    all_stats = find_states(state, NormStats)
    if not all_stats:
        raise ValueError(
            f"`{name}` holds no norms. Wrap the optimizer in `guard`, or chain "
            "`clip_by_global_norm` or `record_norm` before it."
        )
    return all_stats[0].norm_sketch


def _group_sketch(name: str, state: Any) -> jax.Array:
    sketch = _group_stats(state, name).group_sketch
    if sketch is None:
        raise ValueError(
            f"`{name}` holds no quantiles of its groups. Make the clip with "
            "`record_quantiles=True`."
        )
    return sketch


def _group_stats(state: Any, name: str = "state") -> GroupStats:
    found = find_states(state, GroupStats)
    if not found:
        raise ValueError(
            f"`{name}` holds no norms of leaves or groups. Clip with "
            "`clip_by_leaf_norm`, whose threshold may be infinite, "
            "`clip_by_group_norm` or `clip_by_unit_norm`."
        )
    return found[0]


def _by_name(stats: GroupStats, values: jax.Array) -> dict[str, jax.Array]:
    names = path_names(stats.group_names, is_leaf=lambda x: x is None)
    return {name: values[i] for i, name in enumerate(names)}
