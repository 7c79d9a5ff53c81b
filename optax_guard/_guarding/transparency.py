"""Attributes of the state inside, read through the state around it.

Loops read `opt_state.hyperparams` or ask `hasattr(opt_state, "count")`. A guard around
the optimizer must not hide these from them.
"""

from typing import Any

# Every tuple has methods of these names, which count and find its items.
_METHODS = ("count", "index")
_ABSENT = object()


def attribute_inside(state: Any, name: str, inside: Any) -> Any:
    """The attribute of the state ``inside``, which ``state`` itself does not have.

    Raises:
      AttributeError: If there is none, or the name begins with an underscore.
    """
    found = _ABSENT if name.startswith("_") else getattr(inside, name, _ABSENT)
    if found is _ABSENT or (name in _METHODS and callable(found)):
        raise AttributeError(
            f"`{type(state).__name__}` has no attribute `{name}`, nor has the state "
            f"inside of it, a `{type(inside).__name__}`.",
            name=name,
            obj=state,
        )
    return found
