"""A transformation that carries its parts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax


def transformation(
    init: Callable[..., Any], update: Callable[..., Any], **parts: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation whose ``update`` carries its parts as attributes.

    An attribute of the function, unlike one of the tuple, survives copying the tuple
    and ``optax.with_extra_args_support``; a wrapper that replaces ``update`` drops it,
    which is right, because the parts would no longer be the whole transformation.
    """
    for name, part in parts.items():
        setattr(update, name, part)
    return optax.GradientTransformationExtraArgs(init, update)


def part_of(tx: optax.GradientTransformation, name: str) -> Callable[..., Any] | None:
    """The part that ``transformation`` was given under ``name``, if it still is."""
    return getattr(tx.update, name, None)


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled once for callers outside of ``jit``.

    Run operation by operation, a function with branches compiles them at every call.
    Inside ``jit`` this changes nothing. Arguments that JAX cannot trace, such as the
    functions that a line search takes, leave it as it is.
    """
    compiled = jax.jit(function, inline=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if all(map(_is_array, jax.tree.leaves((args, kwargs)))):
            return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _is_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, int, float, np.number, np.ndarray))
    return is_array and getattr(leaf, "dtype", None) != jax.dtypes.float0
