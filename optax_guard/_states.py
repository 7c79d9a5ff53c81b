"""Finding a transformation's state wherever it was wrapped."""

from typing import Any, TypeVar

import jax

from optax_guard._base import check_kind

State = TypeVar("State")


def find_states(tree: Any, cls: type[State] | tuple[type[State], ...]) -> list[State]:
    """All states of one class, outermost first and then in the order of the chain.

    Args:
      tree: An optimizer state, nested in any way (``optax.chain``, ``guard``,
        ``optax.MultiSteps``, ``optax.masked``, ``optax.partition``,
        ``optax.inject_hyperparams``); or what holds one as ``opt_state``: a Flax
        ``TrainState`` or an ``nnx.Optimizer``.
      cls: The state's class, such as ``GuardState``, or a tuple of classes.

    Returns:
      The states, with plain arrays as leaves; empty if there are none.

    Raises:
      TypeError: If ``cls`` is no class.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = optax.chain(optax.sgd(0.1), og.record_norm())
      >>> state = tx.init(jnp.zeros(2))
      >>> [type(s).__name__ for s in og.find_states(state, og.RecordNormState)]
      ['RecordNormState']
    """
    for each in cls if isinstance(cls, tuple) else (cls,):
        check_kind("cls", each, type, "a class or a tuple of classes")
    return _find(tree, cls, within_found=True)


def outermost_states(
    tree: Any, cls: type[State] | tuple[type[State], ...]
) -> list[State]:
    """Those of ``find_states`` that are in no other of them."""
    return _find(tree, cls, within_found=False)


def _find(tree: Any, cls: Any, *, within_found: bool) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, cls):
            found.append(jax.tree.map(_unwrap, node, is_leaf=_is_variable))
            if not within_found:
                return
        children = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        for child in children:
            if child is not node:
                visit(child)

    visit(opt_state_of(tree))
    return found


def opt_state_of(tree: Any) -> Any:
    """The optimizer state of a ``TrainState`` or an ``nnx.Optimizer``, or itself."""
    # A tuple is an optimizer state itself, whatever its fields are called.
    return tree if isinstance(tree, tuple) else getattr(tree, "opt_state", tree)


def find_state(tree: Any, cls: type[State]) -> State:
    """The only state of one class; see ``find_states``.

    Args:
      tree: As for ``find_states``.
      cls: The state's class.

    Returns:
      The state.

    Raises:
      ValueError: If there is none, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.adam(0.1), clip=1.0)
      >>> og.find_state(tx.init(jnp.zeros(2)), og.GuardState).num_skipped.item()
      0
    """
    return only_state("tree", tree, cls)


def only_state(argument: str, tree: Any, cls: type[State]) -> State:
    """The only state of one class in an argument of that name."""
    states = find_states(tree, cls)
    if len(states) != 1:
        advice = (
            "use `find_states` to choose"
            if states
            else "was the optimizer built with the transformation that makes it?"
        )
        names = [c.__name__ for c in (cls if isinstance(cls, tuple) else (cls,))]
        raise ValueError(
            f"`{argument}` must hold one {' or '.join(f'`{name}`' for name in names)}, "
            f"found {len(states)}: {advice}"
        )
    return states[0]


def _is_variable(node: Any) -> bool:
    # What nnx.Optimizer keeps its state in; told by its methods, not to import flax.
    return hasattr(node, "get_metadata") and hasattr(node, "copy_from")


def _unwrap(node: Any) -> Any:
    return node[...] if _is_variable(node) else node
