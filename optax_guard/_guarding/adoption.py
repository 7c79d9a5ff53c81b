"""States of others: of an unguarded optimizer, and of versions before this one."""

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import jax
import optax

from optax_guard._checks import check_leaves, check_transformation
from optax_guard._guarding.accumulation import AccumulateState
from optax_guard._guarding.state import GuardState
from optax_guard._guarding.step import StepParts
from optax_guard._transformation import parts_of
from optax_guard._trees import first_difference, opt_state_of, outermost_states


def wrap_state(
    tx: optax.GradientTransformation, params: optax.Params, old_opt_state: Any
) -> Any:
    """Puts the optimizer state of a run into a guard.

    Guard, clip and thresholds start afresh. The state of the optimizer inside is
    ``old_opt_state``. On clean data below the threshold the run goes on as it would
    have without the guard.

    Args:
      tx: The ``guard``, or the ``accumulate`` around one, from now on.
      params: The parameters that belong to ``old_opt_state``.
      old_opt_state: State of the optimizer that is now inside of ``tx``. First parts of
        a chain that have no state, such as ``optax.clip_by_global_norm`` in
        ``chain(clip_by_global_norm(c), adamw)``, are left out if ``tx`` does not have
        them, as in ``guard(adamw, clip=c)``. To restore it from a checkpoint, use the
        unguarded optimizer's ``init(params)`` as the target.

    Returns:
      State of ``tx``. It holds the same arrays as ``old_opt_state``, with their
      shardings: if one is donated, the other is too. Under ``jit`` donate
      ``old_opt_state``; otherwise the arrays are copied.

    Raises:
      TypeError: If ``tx`` has no guard outermost, or a leaf is no array.
      ValueError: If ``old_opt_state`` does not fit; the message names the first leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> params, adam = jnp.ones(2), optax.adam(0.1)
      >>> updates, opt_state = adam.update(jnp.ones(2), adam.init(params), params)
      >>> opt_state = og.wrap_state(og.guard(adam, clip=1.0), params, opt_state)
      >>> opt_state.num_skipped.item(), og.unwrap_state(opt_state)[0].count.item()
      (0, 1)
    """
    check_transformation("tx", tx)
    check_leaves("params", params)
    check_leaves("old_opt_state", old_opt_state)
    parts = parts_of(tx, StepParts)
    if parts is None:
        raise TypeError(
            "`tx` must be a `guard`, or an `accumulate` around one, not inside of "
            f"another transformation, got {tx!r}."
        )
    expected = unwrap_state(jax.eval_shape(tx.init, params))
    fitting = jax.tree.structure(expected)
    for state in _without_outer_parts(old_opt_state):
        if jax.tree.structure(state) == fitting:
            break
    else:
        state = old_opt_state
    if difference := first_difference(state, expected):
        raise ValueError(
            "`old_opt_state` must be the state of the optimizer inside of `tx`, for "
            f"these `params`: {difference}. {_advice(old_opt_state)}"
        )
    return parts.wrap_state(params, state)


def unwrap_state(opt_state: Any) -> Any:
    """Takes the optimizer state out of a guard, to go on without the guard.

    It is the reverse of ``wrap_state``.

    Args:
      opt_state: State of a ``guard``, or of an ``accumulate`` around one; a
        ``TrainState`` or an ``nnx.Optimizer`` with such a state. Micro-batches of a
        group that is not closed are lost.

    Returns:
      The state of ``inner``, of the last step that was taken. The arrays are those in
      ``opt_state``, not copies.

    Raises:
      ValueError: If ``opt_state`` is that of anything else; the state of a guard inside
        another transformation is found by ``find_state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> adam = optax.adam(0.1)
      >>> opt_state = og.unwrap_state(og.guard(adam, clip=1.0).init(jnp.ones(2)))
      >>> updates, opt_state = adam.update(jnp.ones(2), opt_state)
    """
    found = outermost_states(opt_state, (AccumulateState, GuardState))
    whole = len(jax.tree.leaves(opt_state_of(opt_state)))
    if len(found) != 1 or len(jax.tree.leaves(found[0])) != whole:
        raise ValueError(
            "`opt_state` must be the state of a `guard`, or of an `accumulate` around "
            f"one, with nothing around it, got a `{type(opt_state).__name__}` with "
            f"{len(found)} of them."
        )
    [state] = found
    if isinstance(state, AccumulateState):
        state = state.guard_state
    return state.wrapped_state


def _without_outer_parts(state: Any) -> Iterator[Any]:
    """The state of a chain, and of what is left of it without its first parts."""
    yield state
    while type(state) is tuple and state and isinstance(state[0], optax.EmptyState):
        state = state[1:]
        yield state
        if len(state) == 1:
            yield state[0]


def _advice(old: Any) -> str:
    for name in ("wrapped_state", "guard_state", "inner_state", "inner_opt_state"):
        if hasattr(old, name):
            return f"Take it out of what was around it: `old_opt_state.{name}`."
    return (
        "If that optimizer was part of a chain, build `tx` around the same chain; if "
        "it was restored from a checkpoint, restore it with its own target."
    )


# Fields of states that had another name when they were saved, and that name.
OLD_NAMES = {
    "skip_log": "rejections",  # Until 0.1.0; all that follow, too.
    "skipped_update": "rejected_update",
    "skipped_norm": "rejected_norm",
    "skipped_value": "rejected_value",
    "skipped_reason": "rejected_reason",
    "skipped_leaf": "rejected_leaf",
    "skipped_num_leaves": "rejected_num_leaves",
}
_NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}


def with_new_names(saved: Any) -> Any:
    """A state dict of an earlier version under today's names of fields.

    Flax's ``msgpack_restore`` gives such a dict; then ``from_state_dict(target, ...)``
    restores it.
    """
    if not isinstance(saved, dict):
        return saved
    # Parameters may be called like a field. Only a guard has this field beside its log.
    is_state = "skip_streak" in saved or saved.keys() <= _NEW_NAMES.keys()
    names = _NEW_NAMES if is_state else {}
    return {names.get(k, k): with_new_names(v) for k, v in saved.items()}


def with_old_names(tree: Any) -> Any:
    """The same leaves in the same order, under the names that were saved before."""

    def is_renamed(x: Any) -> bool:
        return not OLD_NAMES.keys().isdisjoint(getattr(x, "_fields", ()))

    def rename(x: Any) -> Any:
        if not is_renamed(x):
            return x
        names = [OLD_NAMES.get(name, str(name)) for name in x._fields]
        return namedtuple(type(x).__name__, names)(*map(with_old_names, x))

    return jax.tree.map(rename, tree, is_leaf=is_renamed)
