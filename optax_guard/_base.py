"""What every transformation here is built with: one constructor, checks of input."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Numbers whose value is known while Python runs. Traced numbers cannot be checked.
_CONCRETE = (int, float, np.number, np.ndarray)


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
    is_array = isinstance(leaf, (jax.Array, *_CONCRETE))
    return is_array and getattr(leaf, "dtype", None) != jax.dtypes.float0


def is_inexact(leaf: Any) -> bool:
    """Whether ``leaf`` is real or complex floating: what has a gradient."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a tracer, a ``float0`` array or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one: Python's, NumPy's, JAX's or traced; not a bool."""
    return isinstance(value, (*_CONCRETE, jax.Array)) and not isinstance(value, bool)


def as_float(value: Any, dtype: Any) -> jax.Array:
    """A number as an array of ``dtype``; one that is too large becomes infinite."""
    if isinstance(value, jax.Array):
        return value.astype(dtype)
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(float(value)).astype(dtype))


def check_positive(name: str, value: Any, advice: str = "") -> None:
    """Raises unless ``value`` is a positive number; traced values pass."""
    check_number(name, value)
    if isinstance(value, _CONCRETE) and not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.{_then(advice)}")


def check_number(name: str, value: Any) -> None:
    """Raises unless ``value`` is one real number."""
    if not is_number(value):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        )
    is_complex = jnp.issubdtype(
        getattr(value, "dtype", type(value)), jnp.complexfloating
    )
    if np.shape(value) or is_complex:
        raise ValueError(
            f"`{name}` must be one real number, got {value!r} of shape "
            f"{np.shape(value)}."
        )


def check_count(name: str, value: Any, advice: str = "") -> None:
    """Raises unless ``value`` is a whole number of at least 1; traced values pass."""
    check_number(name, value)
    if isinstance(value, _CONCRETE) and not (value >= 1 and float(value).is_integer()):
        raise ValueError(
            f"`{name}` must be a whole number of at least 1, got {value}."
            f"{_then(advice)}"
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_state(factory: str, state: Any, cls: type) -> None:
    """Raises unless ``state`` is the state that ``factory`` made."""
    if not isinstance(state, cls):
        raise TypeError(
            f"`state` of `{factory}` must be a `{cls.__name__}`, got a "
            f"`{type(state).__name__}`. Pass what this transformation's own `init` or "
            "last `update` returned; a state made before the optimizer was changed "
            "does not fit."
        )


def _then(advice: str) -> str:
    return f" {advice}" if advice else ""
