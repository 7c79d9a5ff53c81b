"""The public face: objects name the module from which users import them."""

import inspect
import sys
from collections.abc import Sequence


def publish(module: str, states: Sequence[str] = ()) -> None:
    """Gives the public objects of a module its name as their ``__module__``.

    Pickles then name a public path, which stays when a file moves, and tracebacks and
    ``help`` show the path that a user imports. An object that an earlier public module
    has published keeps the name of that one.

    Args:
      module: ``__name__`` of a public module. All in its ``__all__`` is published.
      states: Further names: classes of states, which users meet but never construct.
    """
    namespace = vars(sys.modules[module])
    for name in (*namespace["__all__"], *states):
        value = namespace.get(name)  # A module that is imported on first use is absent.
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if "._" in value.__module__:
            value.__module__ = module
