"""Checks of arguments: an error names the argument, the rule and the value.

A number is checked if it is concrete, whether it is Python's, NumPy's or JAX's. A
traced number passes, except where a shape depends on it.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

# Counts are int32.
_MOST = np.iinfo(np.int32).max


def uncalled(value: Any) -> str:
    """A hint for the end of an error, if ``value`` is a function of this library."""
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__name__", "")
    if isinstance(value, type) or not module.startswith("optax_guard") or not name:
        return ""
    return f" Call the function: `{name}(...)`."


# Numbers ---------------------------------------------------------------------------


def is_concrete(value: object) -> bool:
    """Whether this process knows the value while Python runs.

    It does not know the value of a tracer, nor of an array that is partly on devices
    of other processes.
    """
    if isinstance(value, Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def is_number(value: object) -> bool:
    """Whether ``value`` is a number or an array of numbers; a bool is not."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        # NumPy counts durations as integers.
        return jnp.issubdtype(value.dtype, jnp.number) and value.dtype.kind != "m"
    is_plain = isinstance(value, (int, float, complex))
    return is_plain and not isinstance(value, bool)


def python_number(value: Any) -> Any:
    """The value of a concrete number, as Python's int or float.

    Under a trace ``jnp`` would stage a comparison of two concrete arrays; a comparison
    of Python numbers has a result at once.
    """
    return np.asarray(jax.device_get(value)).item()


def check_number(name: str, value: Any) -> None:
    """Raises unless ``value`` is one real number."""
    if not is_number(value):
        raise TypeError(
            f"`{name}` must be a number, got {value!r} of type {type(value).__name__}."
        )
    if np.shape(value) or jnp.iscomplexobj(value):
        raise ValueError(
            f"`{name}` must be one real number, got {value!r} of shape "
            f"{np.shape(value)}."
        )
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(
            f"`{name}` must be no larger than a float can be, got a whole number of "
            f"{value.bit_length()} bits."
        )


def in_range(name: str, value: Any) -> Any:
    """The value; as a float, if it is a whole number that JAX's integers cannot hold.

    JAX refuses such a number of Python, and wraps one of NumPy around. One that is too
    large for a float raises.
    """
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if not isinstance(value, (int, np.integer)):
        return value
    held_as = jnp.iinfo(jnp.result_type(int if isinstance(value, int) else value))
    if held_as.min <= value <= held_as.max:
        return value
    check_number(name, value)
    return float(value)


def _check_bound(
    name: str,
    value: object,
    is_within: Callable[[Any], bool],
    rule: str,
    advice: str = "",
) -> None:
    """Raises unless ``value`` is traced or ``is_within`` holds for it."""
    check_number(name, value)
    if is_concrete(value) and not is_within(python_number(value)):
        raise ValueError(f"`{name}` must {rule}, got {value}. {advice}".rstrip())


def check_positive(name: str, value: object, advice: str = "") -> None:
    """Raises unless ``value`` is a number above 0; traced values pass."""
    _check_bound(name, value, lambda x: x > 0, "be positive", advice)


def check_not_negative(name: str, value: object) -> None:
    """Raises unless ``value`` is a number of at least 0; traced values pass."""
    _check_bound(name, value, lambda x: x >= 0, "not be negative")


def check_not_nan(name: str, value: object) -> None:
    """Raises unless ``value`` is a number other than NaN; traced values pass."""
    _check_bound(name, value, lambda x: x == x, "not be NaN")


def check_above(name: str, value: object, least: float, advice: str) -> None:
    """Raises unless ``value`` is a number above ``least``; traced values pass."""
    _check_bound(name, value, lambda x: x > least, f"be above {least}", advice)


def check_range(name: str, value: object, least: float, most: float) -> None:
    """Raises unless ``value`` is a number in [least, most]; traced values pass."""
    rule = f"be in [{least}, {most}]"
    _check_bound(name, value, lambda x: least <= x <= most, rule)


def check_fraction(name: str, value: object, *, or_zero: bool = False) -> None:
    """Raises unless ``value`` is in (0, 1), or 0 with ``or_zero``; traced ones pass."""
    rule = "be in [0, 1)" if or_zero else "be in (0, 1)"
    _check_bound(name, value, lambda x: 0 < x < 1 or (or_zero and x == 0), rule)


def check_count(name: str, value: object, advice: str = "", *, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number from ``least``; traced values pass."""
    rule = f"be a whole number of at least {least}"

    def is_count(x: Any) -> bool:
        return x >= least and float(x).is_integer()

    _check_bound(name, value, is_count, rule, advice)
    _check_bound(name, value, lambda x: x <= _MOST, f"be at most {_MOST}")


def static_number(name: str, value: object, reason: str) -> Any:
    """A concrete number, as Python's; raises for a traced one.

    Args:
      name: The argument's name, for the error.
      value: The value given for it.
      reason: Why it cannot be traced, for the error.

    Returns:
      An int or a float, which keeps its value under a trace, as a ``jax.Array`` in an
      expression would not.
    """
    check_number(name, value)
    if not is_concrete(value):
        raise TypeError(
            f"`{name}` must be known while tracing, because {reason}, got {value}. "
            "Make it a static argument: `static_argnames` of `jit`, `static_args` of "
            "`inject_hyperparams`."
        )
    return python_number(value)


def static_count(name: str, value: object, *, least: int = 1) -> int:
    """A concrete whole number from ``least``, as an int; raises for a traced one."""
    check_count(name, value, least=least)
    reason = "the shape of an array or the length of a loop depends on it"
    return int(static_number(name, value, reason))


# Other kinds -----------------------------------------------------------------------


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def is_flag(value: object) -> bool:
    """Whether ``value`` is one concrete bool: Python's, NumPy's or JAX's."""
    if isinstance(value, (np.bool_, np.ndarray, jax.Array)):
        return value.dtype == bool and value.shape == () and is_concrete(value)
    return isinstance(value, bool)


def check_flag(name: str, value: object) -> None:
    """Raises unless ``value`` is a bool: as a condition, "no" would be true as well."""
    if not is_flag(value):
        check_kind(name, value, bool, "True or False")


def check_kind(
    name: str, value: object, kind: type | tuple[type, ...], described: str
) -> None:
    """Raises unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be {described}, got {brief(value)} of type "
            f"{type(value).__name__}."
        )


def brief(value: object) -> str:
    """A value as a message shows it, short: a tree of arrays would hide the rest."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_transformation(name: str, value: object) -> None:
    """Raises unless ``value`` has the methods of a transformation.

    ``optax.MultiSteps`` has them, and is not a ``GradientTransformation``.
    """
    if not (hasattr(value, "init") and hasattr(value, "update")):
        check_kind(name, value, optax.GradientTransformation, "an optax transformation")


def check_iterable(name: str, value: object, described: str) -> None:
    """Raises unless ``value`` has items; an array of numbers counts as having none."""
    is_array = isinstance(value, (np.ndarray, jax.Array))
    check_kind(name, None if is_array else value, Iterable, described)


# Trees and states ------------------------------------------------------------------


def check_leaves(name: str, tree: Any) -> None:
    """Raises unless all leaves are arrays or numbers, which JAX can trace."""
    for leaf in jax.tree.leaves(tree):
        dtype = getattr(leaf, "dtype", None)
        is_plain = isinstance(leaf, (bool, int, float, complex))
        # Random keys pass: their dtype is not one of NumPy's.
        is_other = isinstance(dtype, np.dtype) and dtype.kind in "OSUmM"
        if is_other or (dtype is None and not is_plain):
            raise TypeError(
                f"`{name}` must have arrays as leaves, got {leaf!r} of type "
                f"{type(leaf).__name__}."
            )
        if isinstance(leaf, (int, np.integer)):
            held_as = jnp.result_type(int if isinstance(leaf, int) else leaf)
            if abs(int(leaf)) > jnp.iinfo(held_as).max:
                raise ValueError(
                    f"`{name}` must have leaves that fit into arrays, got a whole "
                    f"number of {int(leaf).bit_length()} bits."
                )


def check_state(factory: str, state: object, cls: type) -> None:
    """Raises unless ``state`` is of the class that ``factory`` makes."""
    if not isinstance(state, cls):
        raise TypeError(
            f"`state` of `{factory}` must be a `{cls.__name__}`, got a "
            f"`{type(state).__name__}`. Pass the result of this transformation's own "
            "`init` or last `update`. The order is `update(grads, state, params)`, and "
            "`apply_gradients(tx, params, opt_state, grads=grads)`. `wrap_state` takes "
            "over the state of an optimizer that had no guard."
        )


def check_whole(name: str, length: int, wanted: int) -> None:
    """Raises if a device has only a part of a record that all devices need whole."""
    if length != wanted:
        raise ValueError(
            f"`{name}` of a state must have length {wanted} on each device, got "
            f"{length}. Under `shard_map` give the guard's and the clip's own records "
            "`PartitionSpec()` in `in_specs` and `out_specs`; only the optimizer's "
            "state, `wrapped_state`, is split as the parameters are."
        )


def check_part(
    factory: str, part: str, state: Any, make: Callable[[], Any], reason: str
) -> None:
    """Raises unless a part of a state has the structure and shapes of ``make()``.

    Args:
      factory: Name of the transformation.
      part: The part, in words.
      state: The part of the state.
      make: Makes one that fits.
      reason: Why it may not fit, a sentence.
    """
    expected = jax.eval_shape(make)
    outlines = [
        (jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)])
        for tree in (state, expected)
    ]
    if outlines[0] != outlines[1]:
        got, wanted = (f"{structure} of {shapes}" for structure, shapes in outlines)
        raise ValueError(
            f"`state` of `{factory}` must be that of its {part}, {wanted}, got {got}. "
            f"{reason}"
        )
