"""Names of leaves, and settings that differ from leaf to leaf."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from optax_guard._checks import check_kind, is_concrete, python_number


def path_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Names of the leaves, as ``encoder/layers/0/kernel``."""
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its name."""
    leaves = jax.tree.leaves(tree)
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in zip(path_names(tree), leaves, strict=True)
    }


def first_difference(old: Any, expected: Any) -> str:
    """Where a tree is not like another one, in words; empty if it is."""
    was, now = described(old), described(expected)
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            return (
                f"`{name}` is {was.get(name, 'not there')}, and should be "
                f"{now.get(name, 'left out')}"
            )
    structures = jax.tree.structure(old), jax.tree.structure(expected)
    return (
        "" if structures[0] == structures[1] else "it is {}, not {}".format(*structures)
    )


def for_each_leaf(name: str, setting: Any, tree: Any) -> list[Any]:
    """The value of a setting for each leaf of ``tree``.

    Args:
      name: The argument's name, for the error.
      setting: A function from the name of a leaf to its value, or a tree of values of
        which ``tree`` is a continuation; a single value is one such.
      tree: Parameters or updates.

    Returns:
      A list with as many values as there are leaves.

    Raises:
      ValueError: If ``setting`` is a tree that does not fit.
    """
    if callable(setting):
        return [setting(path) for path in path_names(tree)]
    if setting is None:
        return [None] * len(jax.tree.leaves(tree))
    try:
        return jax.tree.leaves(jax.tree.broadcast(setting, tree))
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a function of a leaf's path, or a tree that ends where "
            f"the parameters' tree ends or before: {error}"
        ) from error


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


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` is real or complex floating: what has a gradient."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a tracer, a ``float0`` array or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def as_float(value: Any, dtype: Any) -> jax.Array:
    """A number as an array of ``dtype``; one that is too large becomes infinite."""
    if not is_concrete(value):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(float(python_number(value))).astype(dtype))


def map_inexact(f: Callable[[Any], Any], tree: Any) -> Any:
    """Applies ``f`` to the floating leaves and leaves the others alone."""
    return jax.tree.map(lambda x: f(x) if is_inexact(x) else x, tree)


def select(condition: jax.Array, new: Any, old: Any) -> Any:
    """Leaf by leaf ``new`` where ``condition`` holds, else ``old``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def as_argument(function: Any) -> Any:
    """The function as a pytree, for `jit`: arrays in a `Partial` become arguments."""
    if function is None or isinstance(function, Partial):
        return function
    return Partial(function)


def increment(counter: jax.Array, by: jax.Array | bool) -> jax.Array:
    """Counts up by one where ``by``, and stays at the largest int32 for good."""
    is_full = counter == jnp.iinfo(jnp.int32).max
    return counter + jnp.where(is_full, 0, jnp.asarray(by, jnp.int32))
