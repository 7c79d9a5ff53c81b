"""States as the loops carry them: one form for Flax, Equinox and plain trees."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import numpy as np

_FIELDS = ("step", "params", "opt_state")


class Carrier:
    """A tree of arrays that stands for the user's state in a loop.

    A loop reads ``step``, ``params``, ``opt_state`` and ``batch_stats`` of a state, and
    calls its ``replace``. Flax's `TrainState` has all of these and stands for itself.
    For any other state there is a carrier, which has them too. Loops give the user's
    functions what the methods return.
    """

    step: Any
    params: Any
    opt_state: Any
    batch_stats: Any

    def released(self) -> Any:
        """The user's state."""
        raise NotImplementedError

    def after_step(self, state: Any) -> Any:
        """The carrier after a step of the user has returned this state."""
        raise NotImplementedError

    @property
    def trained_params(self) -> Any:
        """The parameters that a step changes."""
        return self.params

    def evaluated(self) -> Any:
        """The state that the user's ``evaluate`` gets."""
        return self.released()

    def params_of_user(self, params: Any) -> Any:
        """Such parameters as those that are carried, as the user knows them."""
        return params


def carried(state: Any) -> Any:
    """The state as a loop carries it; the state itself if it has all that is needed."""
    if isinstance(state, Carrier):
        return state
    # A state holds objects of NNX only where that was imported.
    if "flax.nnx" in sys.modules:
        from optax_guard.loops._nnx import enter_nnx, holds_optimizer

        if holds_optimizer(state):
            return enter_nnx(state)
    if not all(hasattr(state, name) for name in _FIELDS):
        return state  # `check_arguments` refuses it.
    return _enter_tree(state)


def released(state: Any) -> Any:
    """The user's state of one that is carried."""
    return state.released() if isinstance(state, Carrier) else state


def evaluated(state: Any) -> Any:
    """The state for the user's ``evaluate``."""
    return state.evaluated() if isinstance(state, Carrier) else state


def trained_params(state: Any) -> Any:
    """The parameters that a step changes, and no average of them."""
    return state.trained_params if isinstance(state, Carrier) else state.params


def params_of_user(state: Any, params: Any) -> Any:
    """Carried parameters, such as the best, as the user knows them."""
    is_known = params is None or not isinstance(state, Carrier)
    return params if is_known else state.params_of_user(params)


def shown(state: Any) -> Any:
    """The tree whose paths an error tells."""
    return state.tree if isinstance(state, TreeCarrier) else state


def on_carrier(train_step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The user's step as a function of the carried state."""

    def step(state: Any, batch: Any) -> Any:
        result = train_step(released(state), batch)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if not isinstance(state, Carrier) or not is_pair:
            return result  # `first_interval` refuses what is no pair.
        return state.after_step(result[0]), result[1]

    return step


class TreeForm(NamedTuple):
    """The parts of a state that are no arrays.

    Attributes:
      structure: The structure of the state.
      constants: Of each leaf ``(leaf,)`` if it is no array, else ``None``.
    """

    structure: Any
    constants: tuple[tuple[Any] | None, ...]

    def arrays_of(self, state: Any) -> Any:
        """The state, with ``None`` in place of leaves that are no arrays."""
        leaves = self.structure.flatten_up_to(state)
        pairs = zip(leaves, self.constants, strict=True)
        return self.structure.unflatten([x if c is None else None for x, c in pairs])


@dataclasses.dataclass(frozen=True)
class TreeCarrier(Carrier):
    """Carries a NamedTuple, an Equinox module or another tree.

    Attributes:
      tree: The state, with ``None`` in place of leaves that are no arrays.
      form: The rest of it.
    """

    tree: Any
    form: TreeForm

    @property
    def step(self) -> Any:
        return self.tree.step

    @property
    def params(self) -> Any:
        return self.tree.params

    @property
    def opt_state(self) -> Any:
        return self.tree.opt_state

    @property
    def batch_stats(self) -> Any:
        return getattr(self.tree, "batch_stats", None)

    def replace(self, **fields: Any) -> Self:
        """The carrier with other values of fields."""
        return dataclasses.replace(self, tree=_with_fields(self.tree, fields))

    def released(self) -> Any:
        """The user's state."""
        arrays = iter(jax.tree.leaves(self.tree))
        constants = self.form.constants
        leaves = [next(arrays) if c is None else c[0] for c in constants]
        return self.form.structure.unflatten(leaves)

    def after_step(self, state: Any) -> Any:
        """The carrier after a step, whose constants must be those before it."""
        form = _form_of(state, self.form.constants)
        if form != self.form:
            raise TypeError(
                "`train_step` must return a state of the structure it was given, with "
                "the same functions and constants among its leaves, got "
                f"{_told(form)} for {_told(self.form)}. A number or flag that changes "
                "must be an array."
            )
        return TreeCarrier(form.arrays_of(state), form)

    def params_of_user(self, params: Any) -> Any:
        """The parameters with their functions and constants."""
        return self.replace(params=params).released().params


jax.tree_util.register_dataclass(TreeCarrier, ["tree"], ["form"])


def _enter_tree(state: Any) -> Any:
    form = _form_of(state)
    is_array = all(constant is None for constant in form.constants)
    if is_array and hasattr(state, "replace"):
        return state
    return TreeCarrier(form.arrays_of(state), form)


def _form_of(state: Any, known: Any = None) -> TreeForm:
    """The form of a state. A known one tells which of as many leaves are constants."""
    leaves, structure = jax.tree.flatten(state)
    if known is None:
        flags = _constants_of(state)
    elif len(leaves) == len(known):
        flags = [constant is not None for constant in known]
    else:
        flags = [not _is_array(leaf) for leaf in leaves]
    constants = [(x,) if flag else None for x, flag in zip(leaves, flags, strict=True)]
    return TreeForm(structure, tuple(constants))


def _constants_of(state: Any) -> list[bool]:
    """Whether each leaf is a constant: neither an array nor a number, as a function is.

    If there is one in the parameters, numbers of Python in them are constants too. They
    are settings then, as in a model of Equinox.
    """
    named = jax.tree.leaves_with_path(state)
    params = jax.tree.leaves(state.params)
    if all(_is_array(x) or _is_number(x) for x in params):
        params = []
    settings = {id(x) for x in params if not _is_array(x)}
    return [
        not _is_array(x)
        and (not _is_number(x) or (id(x) in settings and _is_inside(path, "params")))
        for path, x in named
    ]


def _is_inside(path: Any, name: str) -> bool:
    """Whether the first key of a path is this name."""
    return str(getattr(path[0], "name", getattr(path[0], "key", ""))) == name


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)


def _told(form: TreeForm) -> str:
    constants = [constant[0] for constant in form.constants if constant is not None]
    return f"{form.structure} with {constants}"


def _with_fields(tree: Any, fields: dict[str, Any]) -> Any:
    for method in ("replace", "_replace"):
        if hasattr(tree, method):
            return getattr(tree, method)(**fields)
    # A dataclass may be frozen, and its `__init__` may take other arguments.
    new = copy.copy(tree)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new
