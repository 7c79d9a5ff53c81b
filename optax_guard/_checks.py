"""What every transformation here is built with: one constructor, checks of input."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Numbers whose value is known while Python runs. Traced numbers cannot be checked.
_CONCRETE = (int, float, np.number, np.ndarray)
# What counts.
_INT32 = np.iinfo(np.int32)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one: Python's, NumPy's, JAX's or traced; not a bool."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return jnp.issubdtype(value.dtype, jnp.number)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(
            f"`{name}` must be no larger than a float can be, got a whole number of "
            f"{value.bit_length()} bits."
        )


def check_not_nan(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number that something can be compared with."""
    check_number(name, value)
    if isinstance(value, _CONCRETE) and value != value:
        raise ValueError(f"`{name}` must not be NaN, with which nothing compares.")


def check_count(name: str, value: Any, advice: str = "", *, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number from ``least``; traced values pass."""
    check_number(name, value)
    if not isinstance(value, _CONCRETE):
        return
    if not (value >= least and float(value).is_integer()):
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}, got {value}."
            f"{_then(advice)}"
        )
    if value > _INT32.max:
        raise ValueError(f"`{name}` must be at most {_INT32.max}, got {value}.")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless ``value`` is a bool: of texts, "no" would be true as well."""
    check_kind(name, value, (bool, np.bool_), "True or False")


def check_kind(
    name: str, value: Any, kind: type | tuple[type, ...], described: str
) -> None:
    """Raises unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be {described}, got {value!r} of type "
            f"{type(value).__name__}."
        )


def check_transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` is a transformation, or like one as ``MultiSteps`` is."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        check_kind(name, value, optax.GradientTransformation, "an optax transformation")


def check_iterable(name: str, value: Any, described: str) -> None:
    """Raises unless ``value`` has items, which an array of numbers has not."""
    is_array = isinstance(value, (np.ndarray, jax.Array))
    check_kind(name, None if is_array else value, Iterable, described)


def check_leaves(name: str, tree: Any) -> None:
    """Raises unless all leaves are arrays or numbers: what JAX can trace."""
    for leaf in jax.tree.leaves(tree):
        dtype = getattr(leaf, "dtype", None)
        if isinstance(leaf, int) and abs(leaf) > jnp.iinfo(jnp.result_type(int)).max:
            raise ValueError(
                f"`{name}` must have leaves that fit into arrays, got a whole number "
                f"of {leaf.bit_length()} bits."
            )
        is_number = isinstance(leaf, (bool, int, float, complex))
        # The dtypes of random keys are none of NumPy's.
        is_other = isinstance(dtype, np.dtype) and dtype.kind in "OSUmM"
        if is_other or (dtype is None and not is_number):
            raise TypeError(
                f"`{name}` must have arrays as leaves, got {leaf!r} of type "
                f"{type(leaf).__name__}."
            )


def check_state(factory: str, state: Any, cls: type) -> None:
    """Raises unless ``state`` is the state that ``factory`` made."""
    if not isinstance(state, cls):
        raise TypeError(
            f"`state` of `{factory}` must be a `{cls.__name__}`, got a "
            f"`{type(state).__name__}`. Pass what this transformation's own `init` or "
            "last `update` returned; a state made before the optimizer was changed "
            "does not fit."
        )


def check_part(factory: str, part: str, state: Any, make: Callable[[], Any]) -> None:
    """Raises unless a part of a state is like what ``make`` makes, of which it came."""
    expected = jax.eval_shape(make)
    outlines = [
        (jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)])
        for tree in (state, expected)
    ]
    if outlines[0] != outlines[1]:
        got, wanted = (f"{structure} of {shapes}" for structure, shapes in outlines)
        raise ValueError(
            f"`state` of `{factory}` must be that of its {part}, {wanted}, got {got}. "
            "A state made before the configuration was changed does not fit."
        )


def _then(advice: str) -> str:
    return f" {advice}" if advice else ""


def check_not_negative(name: str, number: Any) -> None:
    """Refuses a concrete number that is negative or NaN."""
    check_number(name, number)
    if not isinstance(number, jax.Array) and not number >= 0:
        raise ValueError(f"`{name}` must not be negative, got {number}.")


def check_size(name: str, number: object) -> None:
    """Refuses a window size that is not a Python integer of at least 1."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool):
        raise TypeError(
            f"`{name}` must be a Python integer, because it is the size of an array, "
            f"got {number!r}. It cannot be traced: build one stopper for each size."
        )
    check_count(name, number)


def check_fraction(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number in (0, 1); traced values pass."""
    check_number(name, value)
    if _is_concrete(value) and not 0 < value < 1:
        raise ValueError(f"`{name}` must be in (0, 1), got {value}.")


def check_above(name: str, value: Any, least: float, advice: str) -> None:
    """Raises unless ``value`` is a number above ``least``; traced values pass."""
    check_number(name, value)
    if _is_concrete(value) and not value > least:
        raise ValueError(f"`{name}` must be above {least}, got {value}. {advice}")


def check_range(name: str, value: Any, least: float, most: float) -> None:
    """Raises unless ``value`` is a number in [least, most]; traced values pass."""
    check_number(name, value)
    if _is_concrete(value) and not least <= value <= most:
        raise ValueError(f"`{name}` must be in [{least}, {most}], got {value}.")


def check_static(name: str, value: Any) -> None:
    """Raises for a traced number, where it decides the shape of the state."""
    if not is_number(value) or not _is_concrete(value):
        raise TypeError(
            f"`{name}` must be a Python number, because it decides the size of the "
            f"state, got {value!r} of type {type(value).__name__}."
        )


def _is_concrete(value: Any) -> bool:
    return not isinstance(value, jax.Array)
