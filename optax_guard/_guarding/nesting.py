"""A guard inside of a transformation whose own state changes on skipped steps."""

import os
import sys
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_guard._trees import children_of, opt_state_of

# Fields that only states with a guard have. Their classes are in files above this one.
_GUARD_FIELDS = {"skip_counts", "guard_state"}
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# Structures of states that were found in order. After a warning nothing is looked at.
_checked: set[Hashable] = set()
_has_warned = False


def warn_if_nested(state: Any, *, is_of_one: bool = False) -> None:
    """Warns once per process if a guard is inside of what a bad step spoils.

    That is state outside of it which changes on a skipped step, or the accumulator of
    ``optax.MultiSteps``. It looks at types, so that under `jit` it costs nothing after
    tracing.

    Args:
      state: An optimizer state, or a state that holds one.
      is_of_one: Whether the state is known to be that of one optimizer. A dict or a
        list may otherwise hold anything: several optimizers, or parameters.
    """
    global _has_warned
    # A named tuple may be a train state: no state of Optax has this field.
    if isinstance(state, tuple):
        state = getattr(state, "opt_state", state)
    opt_state = opt_state_of(state)
    if _has_warned or _is_guarded(opt_state):
        return
    leaves, treedef = jax.tree.flatten(opt_state)
    structure = treedef, tuple(getattr(x, "dtype", type(x)) for x in leaves)
    if structure in _checked:
        return
    is_mixed = not is_of_one and isinstance(opt_state, dict | list)
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: x is not opt_state)
    found = map(names_outside_of_guard, parts if is_mixed else [opt_state])
    names = sorted({name for names in found for name in names})
    if names:
        message = (
            "The guard is inside of a transformation whose own state "
            f"({', '.join(names)}) changes on a skipped step, when that of the guard "
            "does not. Put the guard outermost: `guard(optax.chain(...))`."
        )
    elif any(map(keeps_nan, parts if is_mixed else [opt_state])):
        message = (
            "The guard is inside of `optax.MultiSteps`, which keeps a NaN in its "
            "accumulator for good: no step is taken after it. Use "
            "`accumulate(guard(...), every_k)`, which drops the bad micro-batch; or "
            "give `MultiSteps` `should_skip_update_fn=optax.skip_not_finite`."
        )
    else:
        _checked.add(structure)
        return
    _has_warned = True
    warnings.warn(message, stacklevel=_frames_inside())


def keeps_nan(opt_state: Any) -> bool:
    """Whether a guard is inside of ``MultiSteps`` that lets a NaN into its sum."""
    if isinstance(opt_state, optax.MultiStepsState):
        # A function that judges micro-batches leaves something here.
        is_judging = jax.tree.leaves(opt_state.skip_state)
        return not is_judging and _survey(opt_state.inner_opt_state, "")[0]
    below = () if _is_guarded(opt_state) else children_of(opt_state)
    return any(map(keeps_nan, below))


def names_outside_of_guard(opt_state: Any) -> list[str]:
    """Names the states that change on a step which a guard beside them skips.

    Only floating leaves count: whole numbers count calls, as schedules do. Statistics
    of this library and hyperparameters change without harm.

    Returns:
      Sorted names of classes; empty if there is no guard or nothing is outside of it.
    """
    has_guard, names = _survey(opt_state, type(opt_state).__name__)
    return sorted(names) if has_guard else []


def _survey(node: Any, owner: str) -> tuple[bool, set[str]]:
    """Says whether a node holds a guard, and which classes hold floats outside of it.

    Args:
      node: A part of the optimizer state.
      owner: Name of the class that holds it.
    """
    if _is_guarded(node):
        return True, set()
    if type(node).__module__.partition(".")[0] == "optax_guard":
        return False, set()
    if isinstance(node, optax.MultiStepsState):
        return _survey(node.inner_opt_state, owner)
    if isinstance(node, optax.MaskedState):
        return _survey(node.inner_state, owner)
    if hasattr(node, "hyperparams") and hasattr(node, "inner_state"):
        return _survey(node.inner_state, owner)
    if isinstance(node, optax.PartitionState):
        return _survey_apart(list(node.inner_states.values()), owner)
    children = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    if any(child is node for child in children):
        dtype = getattr(node, "dtype", np.dtype(np.int32))
        return False, {owner} if jnp.issubdtype(dtype, jnp.inexact) else set()
    name = type(node).__name__ if hasattr(node, "_fields") else owner
    # Masks in one chain are for parameters of their own, as the parts of a partition.
    masked = [child for child in children if isinstance(child, optax.MaskedState)]
    found = [_survey_apart(masked, name)]
    found += [
        _survey(child, name)
        for child in children
        if not isinstance(child, optax.MaskedState)
    ]
    return any(has for has, _ in found), set().union(*(names for _, names in found))


def _survey_apart(nodes: list[Any], owner: str) -> tuple[bool, set[str]]:
    """As `_survey`, of states for different parameters: each has a guard or none."""
    found = [_survey(node, owner) for node in nodes]
    guarded = [names for has, names in found if has]
    return bool(guarded), set().union(*(guarded or [names for _, names in found]))


def _is_guarded(node: Any) -> bool:
    return not _GUARD_FIELDS.isdisjoint(getattr(node, "_fields", ()))


def _frames_inside() -> int:
    """Counts the frames of this package above the caller, for `stacklevel`."""
    frame, count = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, count = frame.f_back, count + 1
    return count
