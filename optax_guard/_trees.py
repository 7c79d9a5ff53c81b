"""Leaves of a tree and their names, settings by leaf, and states inside a state."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.tree_util import Partial, default_registry

from optax_guard._checks import check_kind, is_concrete, is_flag, python_number

# Leaves ----------------------------------------------------------------------------


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of an array, a tracer, a ``float0`` or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` is real or complex floating. Only such leaves have gradients."""
    # A model may hold functions, and types such as `jnp.float32`, which has a dtype.
    if isinstance(leaf, type) or not hasattr(leaf, "dtype"):
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def map_inexact(f: Callable[[Any], Any], tree: Any) -> Any:
    """Applies ``f`` to the floating leaves and leaves the others alone."""
    return jax.tree.map(lambda x: f(x) if is_inexact(x) else x, tree)


def path_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Names the leaves by their paths, such as ``encoder/layers/0/kernel``."""
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def for_each_leaf(name: str, setting: Any, tree: Any) -> list[Any]:
    """Lists the value of a setting for each leaf of ``tree``.

    Args:
      name: The argument's name, for the error.
      setting: A function from the name of a leaf to its value, or a tree prefix of
        ``tree`` with values as leaves, such as a single value. A tree that is callable,
        as a module of Equinox is, is a tree.
      tree: Parameters or updates.

    Returns:
      A list with as many values as there are leaves.

    Raises:
      ValueError: If ``setting`` is a tree and no tree prefix of ``tree``.
    """
    if is_function(setting):
        return [setting(path) for path in path_names(tree)]
    if setting is None:
        return [None] * len(jax.tree.leaves(tree))
    if not jax.tree.leaves(tree):
        # Such as the placeholder that `optax.tree_map_params` gives to `init`.
        return []
    try:
        return jax.tree.leaves(jax.tree.broadcast(setting, tree))
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a function of a leaf's path or a tree prefix of the "
            f"parameters: {error}"
        ) from error


def is_function(setting: Any) -> bool:
    """Whether a setting is to be called, and is no tree of values that is callable."""
    if not callable(setting):
        return False
    leaves = jax.tree.leaves(setting)
    return not leaves or not all(map(_is_value, leaves))


def _is_value(x: Any) -> bool:
    """Whether it is a setting of a leaf: a flag, a label, an axis or a spec."""
    return isinstance(x, int | str | PartitionSpec) or is_flag(x)


# Differences between two trees -----------------------------------------------------


def leaf_types(tree: Any) -> dict[str, str]:
    """Maps the name of each leaf to its dtype and shape, such as ``float32[3, 4]``."""
    leaves = jax.tree.leaves(tree)
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in zip(path_names(tree), leaves, strict=True)
    }


def first_difference(old: Any, expected: Any) -> str:
    """Says where ``old`` differs in type from ``expected``; empty if it does not."""
    was, now = leaf_types(old), leaf_types(expected)
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


# States inside a state -------------------------------------------------------------

State = TypeVar("State")


def find_states(tree: Any, cls: type[State] | tuple[type[State], ...]) -> list[State]:
    """Finds all states of one class, outermost first, then in the order of the chain.

    Args:
      tree: An optimizer state, nested in any way (``optax.chain``, ``guard``,
        ``optax.MultiSteps``, ``optax.masked``, ``optax.partition``,
        ``optax.inject_hyperparams``); or an object that holds one as ``opt_state``, as
        a Flax ``TrainState`` and an ``nnx.Optimizer`` do.
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
    return _find(tree, lambda x: isinstance(x, cls), within_found=True)


def outermost_states(
    tree: Any, cls: type[State] | tuple[type[State], ...]
) -> list[State]:
    """Finds the states of one class that are not inside another state of it."""
    return _find(tree, lambda x: isinstance(x, cls), within_found=False)


def states_with(tree: Any, name: str) -> list[Any]:
    """Finds all states that have an attribute of that name, as ``find_states`` does.

    One that only reads it through, of the state inside, is not meant.
    """
    return _find(
        tree,
        lambda x: isinstance(x, tuple) and hasattr(type(x), name),
        within_found=True,
    )


def _find(
    tree: Any, is_wanted: Callable[[Any], bool], *, within_found: bool
) -> list[Any]:
    found: list[Any] = []
    has_variables = False

    def visit(node: Any) -> None:
        nonlocal has_variables
        if is_wanted(node):
            found.append(node)
            if not within_found:
                return
        has_variables |= not isinstance(node, tuple) and is_variable(node)
        for child in children_of(node):
            if not isinstance(child, jax.Array):
                visit(child)

    visit(opt_state_of(tree))
    if within_found and not has_variables:
        return found
    return [jax.tree.map(_unwrap, node, is_leaf=is_variable) for node in found]


def children_of(node: Any) -> Iterable[Any]:
    """The nodes one level below; none of a leaf."""
    below = default_registry.flatten_one_level(node)
    return () if below is None else below[0]


def opt_state_of(tree: Any) -> Any:
    """Returns the optimizer state that ``tree`` holds, or ``tree`` if it is one."""
    # A tuple is an optimizer state itself, whatever its fields are called.
    return tree if isinstance(tree, tuple) else getattr(tree, "opt_state", tree)


def find_state(tree: Any, cls: type[State]) -> State:
    """Finds the only state of one class; see ``find_states``.

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
    """Finds the only state of one class; the error names ``argument``."""
    states = find_states(tree, cls)
    if len(states) != 1:
        advice = (
            "Choose one with `find_states`."
            if states
            else "Was the optimizer built with the transformation that makes it?"
        )
        names = [c.__name__ for c in (cls if isinstance(cls, tuple) else (cls,))]
        raise ValueError(
            f"`{argument}` must hold one {' or '.join(f'`{name}`' for name in names)}, "
            f"found {len(states)}. {advice}"
        )
    return states[0]


def is_variable(node: Any) -> bool:
    """Whether ``node`` is an ``nnx.Variable``, which ``nnx.Optimizer`` consists of."""
    # Its methods tell, so that Flax is not imported.
    return hasattr(node, "get_metadata") and hasattr(node, "copy_from")


def _unwrap(node: Any) -> Any:
    return node[...] if is_variable(node) else node


# Numbers and functions -------------------------------------------------------------


def as_float(value: Any, dtype: Any) -> jax.Array:
    """Converts a number to an array of ``dtype``; too large ones become infinite."""
    if not is_concrete(value):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(float(python_number(value))).astype(dtype))


def increment(counter: jax.Array, by: jax.Array | bool = True) -> jax.Array:
    """Counts up by one where ``by`` holds, and stays at the largest int32.

    ``where(by, optax.safe_increment(counter), counter)`` has one selection more.
    """
    is_full = counter == jnp.iinfo(jnp.int32).max
    return counter + jnp.where(is_full, 0, jnp.asarray(by, jnp.int32))


def as_argument(function: Any) -> Any:
    """Makes a function a pytree, which ``jit`` takes as an argument.

    The arrays in a ``Partial`` are then arguments of the compiled function, not
    constants in it.
    """
    if function is None or isinstance(function, Partial):
        return function
    return Partial(function)
