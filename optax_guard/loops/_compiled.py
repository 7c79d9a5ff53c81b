"""Compiled functions that live as long as the functions they are compiled for."""

import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Compiled = TypeVar("Compiled")


class CompiledFor(Generic[Compiled]):
    """Compiles once for each function of the user, and keeps none of them alive.

    With the user's function as a static argument, `jax.jit` would hold it, and all that
    it closes over, until the process ends.

    Args:
      compile_with: ``compile_with(get) -> compiled``. While ``compiled`` is traced, it
        takes the user's function from ``get()``. It must not hold it.
    """

    def __init__(self, compile_with: Callable[[Callable[[], Any]], Compiled]):
        self._compile_with = compile_with
        self._compiled: dict[tuple[int, Any], Compiled] = {}

    def __call__(self, function: Callable[..., Any]) -> Compiled:
        """Returns the same result at each call, as long as the function lives."""
        # A bound method is a new object each time it is read, so its object counts.
        owner, part, kind = function, None, weakref.ref
        if isinstance(function, types.MethodType):
            owner, part = function.__self__, function.__func__
            kind = weakref.WeakMethod
        key = id(owner), part
        if key not in self._compiled:
            try:
                get = kind(function)
                forget = weakref.finalize(owner, self._compiled.pop, key, None)
            except TypeError:  # Python cannot refer to it weakly.
                return self._compile_with(lambda: function)
            forget.atexit = False
            self._compiled[key] = self._compile_with(get)
        return self._compiled[key]
