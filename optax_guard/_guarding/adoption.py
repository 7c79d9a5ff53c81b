"""States of others: of an unguarded optimizer, and of versions before this one."""

from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._checks import check_leaves, check_transformation
from optax_guard._clipping.value import ClipByValueState
from optax_guard._guarding.accumulation import AccumulateState
from optax_guard._guarding.state import GuardState, SkipLog
from optax_guard._guarding.step import StepParts
from optax_guard._norms.marks import marks_of_leaf
from optax_guard._norms.statistics import GroupStats, NormStats
from optax_guard._rows import entries_of, replace_entries, rows_of
from optax_guard._transformation import parts_of
from optax_guard._trees import (
    children_of,
    first_difference,
    opt_state_of,
    outermost_states,
)
from optax_guard.stop._state import EarlyStoppingState


def wrap_state(
    tx: optax.GradientTransformation, params: optax.Params, old_opt_state: Any
) -> Any:
    """Puts the optimizer state of a run into a guard.

    Guard, clip and thresholds start afresh, but ``threshold.relative_to_params`` in
    ``max_update`` counts on from the optimizer's ``count``. The state of the optimizer
    inside is ``old_opt_state``. On clean data below the threshold the run goes on as it
    would have without the guard.

    Args:
      tx: The ``guard``, or the ``accumulate`` around one, from now on.
      params: The parameters that belong to ``old_opt_state``.
      old_opt_state: State of the optimizer that is now inside of ``tx``. Left out, if
        ``tx`` does not have them, at any depth, are

        * first parts of a chain that keep nothing but hyperparameters, such as
          ``optax.clip_by_global_norm(c)``, also in ``masked`` or
          ``inject_hyperparams``, and clips of this library;
        * ``apply_if_finite`` and ``inject_hyperparams`` around the optimizer;
        * ``MultiSteps`` around it, if ``tx`` is an ``accumulate``: ``num_groups`` goes
          on from ``gradient_step``, and the micro-batches of a group that is not
          closed are lost.

        To restore it from a checkpoint, use the unguarded optimizer's ``init(params)``
        as the target, then call this function. Flax's ``from_state_dict`` with the
        state of ``tx`` as the target raises instead, because the names do not match.

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
    whole = jax.eval_shape(tx.init, params)
    expected = unwrap_state(whole)
    removed = _AROUND
    if isinstance(whole, AccumulateState):
        removed = (*_AROUND, optax.MultiStepsState)
    state = _fitted(old_opt_state, expected, removed)
    if state is _NO_FIT:
        state = old_opt_state
    if difference := first_difference(state, expected):
        raise ValueError(
            "`old_opt_state` must be the state of the optimizer inside of `tx`, for "
            f"these `params`: {difference}. {_advice(old_opt_state, expected)}"
        )
    wrapped = parts.wrap_state(params, state)
    groups = outermost_states(old_opt_state, optax.MultiStepsState)
    is_removed = groups and not outermost_states(expected, optax.MultiStepsState)
    if isinstance(wrapped, AccumulateState) and is_removed:
        return replace_entries(wrapped, num_groups=groups[0].gradient_step)
    return wrapped


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


# What may be around an optimizer, with nothing in its state that a guard needs.
_AROUND = (
    optax.ApplyIfFiniteState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)
_NO_FIT = object()


def _fitted(old: Any, expected: Any, removed: tuple[type[Any], ...]) -> Any:
    """The part of an old state that has the structure of the expected one."""
    if jax.tree.structure(old) == jax.tree.structure(expected):
        return old
    is_same_kind = type(old) is type(expected)
    if is_same_kind and (fits := _fitted_below(old, expected, removed)) is not _NO_FIT:
        return fits
    if isinstance(old, removed):
        return _fitted(_inside(old), expected, removed)
    if type(old) is tuple and old and _is_stateless(old[0]):
        found = _fitted(old[1:], expected, removed)
        if found is _NO_FIT and len(old) == 2:
            found = _fitted(old[1], expected, removed)
        return found
    return _NO_FIT


def _fitted_below(old: Any, expected: Any, removed: tuple[type[Any], ...]) -> Any:
    """The same of each node below, one for one."""
    nodes = list(children_of(old)), list(children_of(expected))
    if len(nodes[0]) != len(nodes[1]) or not nodes[0]:
        return _NO_FIT
    found = [_fitted(a, b, removed) for a, b in zip(*nodes, strict=True)]
    if any(x is _NO_FIT for x in found):
        return _NO_FIT
    above = jax.tree.structure(old, is_leaf=lambda x: x is not old)
    return above.unflatten(found)


def _inside(state: Any) -> Any:
    """The state of the optimizer around which this one is."""
    if isinstance(state, optax.MultiStepsState):
        return state.inner_opt_state
    return state.inner_state


def _is_stateless(state: Any) -> bool:
    """Whether a transformation keeps nothing but hyperparameters, as a clip does."""
    if isinstance(state, (*_AROUND[1:], optax.MaskedState)):
        return _is_stateless(state.inner_state)
    if type(state) is tuple:
        return all(map(_is_stateless, state))
    is_clip = hasattr(type(state), "stats") and isinstance(state.stats, NormStats)
    return isinstance(state, optax.EmptyState) or is_clip


def _advice(old: Any, expected: Any) -> str:
    for name in ("wrapped_state", "guard_state", "inner_opt_state"):
        inside = getattr(old, name, _NO_FIT)
        if _fitted(inside, expected, _AROUND) is not _NO_FIT:
            return f"Take it out of what was around it: `old_opt_state.{name}`."
    return (
        "If that optimizer was part of a chain, build `tx` around the same chain; if "
        "it was restored from a checkpoint, restore it with its own target."
    )


# The classes of states whose numbers were arrays of their own until 0.1.0, with the
# names of their fields then; where a field has another name today, it follows.
_OLD_FIELDS: dict[type[Any], str] = {
    GuardState: "num_skipped skip_streak skip_reason guard_exhausted num_vanished "
    "rejections:skip_log clip_state rule_states wrapped_state",
    SkipLog: "rejected_update:skipped_update rejected_norm:skipped_norm "
    "rejected_value:skipped_value rejected_reason:skipped_reason "
    "rejected_leaf:skipped_leaf rejected_num_leaves:skipped_num_leaves",
    AccumulateState: "group_seen group_kept num_groups num_micro_batches num_dropped "
    "drop_reason value_mean grad_mean guard_state",
    EarlyStoppingState: "num_evals best_value best_eval best_step is_best "
    "is_significant nonfinite_streak train_seconds should_stop stop_reason stopped_at "
    "best_params rule_state smooth_state",
    NormStats: "num_updates num_clipped num_nonfinite grad_norm clipped_norm "
    "clip_threshold norm_mean norm_var norm_max norm_sketch",
    GroupStats: "group_names group_num_clipped group_num_nonfinite group_norm "
    "group_clipped_norm group_threshold group_norm_mean group_norm_var group_norm_max "
    "group_sketch",
    ClipByValueState: "stats entries_clipped update_cosine threshold",
}


def _names(fields: str) -> dict[str, str]:
    """Today's names by the old ones."""
    pairs = (field.partition(":") for field in fields.split())
    return {old: now or old for old, _, now in pairs}


# Fields that came later, and are empty in states from before.
_LATER: Any = {GuardState: "bound_state", EarlyStoppingState: "recent_params"}
_TODAY = {cls: _names(fields) for cls, fields in _OLD_FIELDS.items()}


def in_old_layout(tree: Any) -> Any:
    """The state as version 0.1.0 kept it: each number in an array of its own."""

    def old(x: Any) -> Any:
        if not _has_rows(x) or getattr(x, "recent_params", ()):
            return x
        names = _TODAY[type(x)]
        values = [in_old_layout(getattr(x, name)) for name in names.values()]
        return namedtuple(type(x).__name__, list(names))(*values)

    return jax.tree.map(old, tree, is_leaf=_has_rows)


def in_new_layout(saved: Any) -> Any:
    """The state of ``in_old_layout``, or a state dict of 0.1.0, as it is kept today.

    Flax's ``msgpack_restore`` gives such a dict; then ``from_state_dict(target, ...)``
    restores it.
    """

    def new(x: Any) -> Any:
        named = x if isinstance(x, dict) else x._asdict()
        named = {name: in_new_layout(value) for name, value in named.items()}
        cls = _class_of_old(x)
        if cls is None:
            return named
        values: dict[str, Any] = {
            _TODAY[cls][name]: value for name, value in named.items()
        }
        fields = {name: values[name] for name in values.keys() & set(cls._fields)}
        if cls is SkipLog:
            first, size = values["skipped_leaf"], values["skipped_num_leaves"]
            fields["skipped_leaves"] = marks_of_leaf(first, size)
        known: dict[str, Any] = {k: values[k] for k in values.keys() & entries_of(cls)}
        if cls is AccumulateState:  # There were no weights: each was 1.
            known["group_weight"] = known["group_kept"]
        # For numbers that came later.
        zero = jnp.zeros_like(next(iter(known.values())), jnp.int32)
        numbers: dict[str, Any] = dict.fromkeys(entries_of(cls), zero)
        fields |= rows_of(cls, numbers | known)
        if cls in _LATER:
            fields[_LATER[cls]] = {} if isinstance(x, dict) else ()
        return fields if isinstance(x, dict) else cls(**fields)

    def is_old(x: Any) -> bool:
        return isinstance(x, dict) or _class_of_old(x) is not None

    return jax.tree.map(lambda x: new(x) if is_old(x) else x, saved, is_leaf=is_old)


def _has_rows(x: Any) -> bool:
    return type(x) in _TODAY


def _class_of_old(x: Any) -> type[Any] | None:
    """Today's class of a state in the old layout; ``None`` if it is none."""
    names = set(x if isinstance(x, dict) else getattr(x, "_fields", ()))
    for cls, today in _TODAY.items():
        if names == today.keys():
            return cls
    return None
