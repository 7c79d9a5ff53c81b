"""Transformations that carry their parts."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import optax

from optax_guard._checks import in_range

# Extra arguments that may be whole numbers of Python of any size.
_NUMBERS = {"value", "loss", "weight"}
P = TypeVar("P", bound=tuple[Any, ...])  # A class of parts, a NamedTuple.


class TransformationLike(Protocol):
    """An object with the methods of an optimizer, as ``optax.MultiSteps`` is."""

    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...


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


def cached(
    function: Callable[..., Any], check: Callable[[dict[str, Any]], None] | None = None
) -> Callable[..., Any]:
    """``function``, compiled once for callers outside of ``jit``.

    Run operation by operation, a function with branches compiles them at every call.
    Inside ``jit`` this changes nothing. With arguments that JAX cannot trace, such as
    the functions that a line search takes, the function runs as it is. ``check`` is
    given the keyword arguments as the caller gave them.
    """
    compiled = jax.jit(function, inline=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if check is not None:
            check(kwargs)
        for name in _NUMBERS & kwargs.keys():
            kwargs[name] = in_range(name, kwargs[name])
        if all(map(_is_array, jax.tree.leaves((args, kwargs)))):
            return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def with_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation, which takes extra arguments and passes on those it knows.

    It may be any object with ``init`` and ``update``, such as ``optax.MultiSteps``.
    """
    if isinstance(tx, optax.GradientTransformation):
        return optax.with_extra_args_support(tx)
    kinds = {p.kind for p in inspect.signature(tx.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    plain = optax.GradientTransformation(tx.init, tx.update)
    return optax.with_extra_args_support(plain)


def _is_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, int, float, np.number, np.ndarray))
    return is_array and getattr(leaf, "dtype", None) != jax.dtypes.float0
