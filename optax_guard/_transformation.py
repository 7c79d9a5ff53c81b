"""Transformations that carry their parts."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import optax

from optax_guard._checks import in_range

# Extra arguments that may be whole numbers of Python of any size.
_NUMBERS = {"value", "weight"}
P = TypeVar("P", bound=tuple[Any, ...])  # A class of parts, a NamedTuple.


def transformation(
    init: Callable[..., Any], update: Callable[..., Any], parts: tuple[Any, ...]
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation whose ``update`` carries its parts, as ``update.parts``.

    An attribute of the function survives copying the tuple and
    ``optax.with_extra_args_support``; one of the tuple would not. A wrapper with an
    ``update`` of its own drops it. That is right: the parts would no longer be the
    whole transformation.
    """
    update.parts = parts  # pyright: ignore[reportFunctionMemberAccess] - see above
    return optax.GradientTransformationExtraArgs(init, update)


def parts_of(tx: optax.GradientTransformation, kind: type[P]) -> P | None:
    """The parts of this kind that ``transformation`` was given, if ``tx`` has them."""
    parts = getattr(tx.update, "parts", None)
    return parts if isinstance(parts, kind) else None


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled once for callers outside of ``jit``.

    Run operation by operation, a function with branches compiles them at every call.
    Inside ``jit`` this changes nothing. With arguments that JAX cannot trace, such as
    the functions that a line search takes, the function runs as it is.
    """
    compiled = jax.jit(function, inline=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in _NUMBERS & kwargs.keys():
            kwargs[name] = in_range(name, kwargs[name])
        if all(map(_is_array, jax.tree.leaves((args, kwargs)))):
            return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _is_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, int, float, np.number, np.ndarray))
    return is_array and getattr(leaf, "dtype", None) != jax.dtypes.float0
