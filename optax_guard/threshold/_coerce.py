"""Turns a number, a schedule or a table into a threshold."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_number, check_positive, is_number, uncalled
from optax_guard._trees import as_float, increment
from optax_guard.threshold._base import Limits, Threshold
from optax_guard.threshold._mean import relative_to_mean
from optax_guard.threshold._params import relative_to_params
from optax_guard.threshold._quantile import quantile
from optax_guard.threshold._zscore import zscore

_KINDS: dict[str, Callable[..., Threshold]] = {
    "zscore": zscore,
    "quantile": quantile,
    "relative_to_mean": relative_to_mean,
    "relative_to_params": relative_to_params,
}


def as_absolute_threshold(name: str, value: Any) -> Threshold:
    """As ``as_threshold``, where there are no parameters to compare with."""
    threshold = as_threshold(name, value)
    if threshold.unit is not None:
        raise TypeError(
            f"`{name}` must not be relative to the norm of parameters, got "
            "`relative_to_params`. Use it in `clip_by_global_norm`, "
            "`clip_by_leaf_norm` or `clip_by_group_norm`, or as `guard(max_update=)`."
        )
    return threshold


def as_threshold(name: str, value: Any) -> Threshold:
    """Makes a threshold of any value that a user may pass for one.

    Args:
      name: The argument's name, for the error.
      value: A positive number, possibly traced; a schedule, called with the number of
        updates taken so far; a threshold; or a table, as a configuration file holds it:
        ``{"kind": "zscore", "sigma": 2.5}``.

    Returns:
      The threshold.

    Raises:
      TypeError: If it is none of these.
      ValueError: If a number is out of range, or a table has no kind or unknown keys.

    Examples:
      >>> import optax_guard as og
      >>> tx = og.clip_by_global_norm({"kind": "quantile", "q": 0.9})
    """
    if isinstance(value, Threshold):
        return value
    if is_number(value):
        check_positive(name, value, "To measure without clipping, use `record_norm()`.")
        return _constant(value)
    if isinstance(value, Mapping):
        return _from_table(name, value)
    hint = uncalled(value)
    if callable(value) and not isinstance(value, type) and not hint:
        return _scheduled(value)
    raise TypeError(
        f"`{name}` must be a positive number, a schedule, one of "
        '`optax_guard.threshold` or a table such as {"kind": "zscore"}, got '
        f"{value!r} of type {type(value).__name__}.{hint}"
    )


def _constant(value: ArrayLike) -> Threshold:
    def limits(norm: jax.Array, global_norm: jax.Array, state: Any) -> Limits:
        del global_norm, state
        threshold = as_float(value, norm.dtype)
        return threshold, threshold

    return Threshold(lambda shape: (), limits, lambda norm, clipped_norm, state: state)


def _scheduled(schedule: Callable[..., Any]) -> Threshold:
    def limits(norm: jax.Array, global_norm: jax.Array, state: jax.Array) -> Limits:
        del global_norm
        value = schedule(state)
        check_number("max_norm(step)", value)
        threshold = as_float(value, norm.dtype)
        return threshold, threshold

    def learn(norm: jax.Array, clipped_norm: jax.Array, state: jax.Array) -> jax.Array:
        del norm, clipped_norm
        return increment(state)

    return Threshold(lambda shape: jnp.zeros((), jnp.int32), limits, learn)


def _from_table(name: str, table: Mapping[str, Any]) -> Threshold:
    kinds = ", ".join(repr(kind) for kind in _KINDS)
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        got = f"`kind` {kind!r}" if "kind" in table else f"keys {sorted(table)}"
        raise ValueError(
            f"`{name}` as a table must have a `kind` of {kinds}, got {got}."
        )
    factory = _KINDS[kind]
    options = {key: value for key, value in table.items() if key != "kind"}
    known = inspect.signature(factory).parameters
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"`{name}` as a table of kind {kind!r} may have the keys "
            f"{', '.join(known)}, got {', '.join(map(repr, unknown))}."
        )
    missing = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty and key not in options
    ]
    if missing:
        raise ValueError(
            f"`{name}` as a table of kind {kind!r} must have the key "
            f"{', '.join(map(repr, missing))}."
        )
    return factory(**options)
