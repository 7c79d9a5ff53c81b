"""Names of groups in a state: part of its structure, and no tree below it.

They are a tree like the parameters, but none of the arrays below it belongs to a
parameter. If JAX saw that tree, `optax.tree.map_params` would map it with the specs of
the parameters, which does not fit.
"""

from typing import Any

import jax


class GroupNames:
    """The names of groups as auxiliary data of a pytree.

    ``optax.tree.map_params`` calls ``init`` with a placeholder that has no leaves, and
    compares that state with a real one. So names of no groups are equal to all others.
    """

    def __init__(self, names: Any) -> None:
        self.names = names
        self._structure = jax.tree.structure(names, is_leaf=lambda x: x is None)

    def __eq__(self, other: object) -> bool:
        """Whether both name the same groups, or one of them names none."""
        if not isinstance(other, GroupNames):
            return NotImplemented
        if not (self._structure.num_leaves and other._structure.num_leaves):
            return True
        return self._structure == other._structure

    def __hash__(self) -> int:
        return hash(self._structure)

    def __repr__(self) -> str:
        return repr(self.names)


def register_with_names(cls: Any, field: str) -> None:
    """Makes JAX take a field of a named tuple as names, and the others as children."""
    others = [name for name in cls._fields if name != field]
    keys = [jax.tree_util.GetAttrKey(name) for name in others]

    def flatten(state: Any) -> tuple[list[Any], GroupNames]:
        names = GroupNames(getattr(state, field))
        return [getattr(state, name) for name in others], names

    def flatten_with_keys(state: Any) -> tuple[list[Any], GroupNames]:
        children, names = flatten(state)
        return list(zip(keys, children, strict=True)), names

    def unflatten(names: GroupNames, children: Any) -> Any:
        fields = dict(zip(others, children, strict=True))
        return cls(**{field: names.names, **fields})

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
