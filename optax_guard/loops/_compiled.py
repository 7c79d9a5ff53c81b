"""Compiled functions that live as long as the functions they are compiled for."""

import types
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from jax.tree_util import Partial

Compiled = TypeVar("Compiled")


class CompiledFor(Generic[Compiled]):
    """Compiles once for each set of the user's functions, and keeps none alive.

    With a function of the user as a static argument, `jax.jit` would hold it, and all
    that it closes over, until the process ends.

    Args:
      compile_with: ``compile_with(*gets) -> compiled``. While ``compiled`` is traced,
        it takes each function from its ``get()``. It must not hold them.
    """

    def __init__(self, compile_with: Callable[..., Compiled]):
        self._compile_with = compile_with
        self._compiled: dict[Any, tuple[Compiled, list[weakref.finalize]]] = {}

    def __call__(self, *functions: Callable[..., Any] | None) -> Compiled:
        """Returns the same result at each call, as long as all functions live.

        ``None`` stands for a function that is not there.
        """
        owners = [_owner_and_part(function) for function in functions]
        key = tuple((id(owner), part) for owner, part in owners)
        if key not in self._compiled:
            try:
                gets = [_weakly(function) for function in functions]
                ends = [
                    weakref.finalize(owner, self._forget, key)
                    for owner, _ in owners
                    if owner is not None
                ]
            except TypeError:  # Python cannot refer to one of them weakly.
                return self._compile_with(*[lambda f=f: f for f in functions])
            for end in ends:
                end.atexit = False
            self._compiled[key] = self._compile_with(*gets), ends
        return self._compiled[key][0]

    def _forget(self, key: Any) -> None:
        _, ends = self._compiled.pop(key, (None, []))
        for end in ends:
            end.detach()


def _owner_and_part(function: Any) -> tuple[Any, Any]:
    # A bound method is a new object each time it is read, so its object counts.
    if isinstance(function, types.MethodType):
        return function.__self__, function.__func__
    return function, None


def _weakly(function: Any) -> Callable[[], Any]:
    if function is None:
        return lambda: None
    is_method = isinstance(function, types.MethodType)
    return weakref.WeakMethod(function) if is_method else weakref.ref(function)


def taken_apart(function: Any) -> tuple[Any, tuple[Any, Any]]:
    """A function, and the arguments that a ``Partial`` binds to it.

    The arguments go into a compiled program as arguments, and are no constants in it.
    """
    if isinstance(function, Partial):
        return function.func, (function.args, function.keywords)
    return function, ((), {})


def put_together(function: Any, arguments: tuple[Any, Any]) -> Any:
    """The function of which `taken_apart` made these."""
    if function is None:
        return None
    return Partial(function, *arguments[0], **arguments[1])
