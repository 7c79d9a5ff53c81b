"""The inputs of an update, checked on the host and given fixed dtypes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_count, check_leaves, check_number, in_range
from optax_guard._models import arrays_of
from optax_guard.stop._config import Config


class Inputs(NamedTuple):
    """The arguments of `update` but the state; absent ones are None.

    An input that the rule does not read is None as well, so that it is not transferred.
    """

    value: Any
    params: Any
    step: Any
    seconds: Any
    train_value: Any
    opt_state: Any
    metrics: Any = None


def prepare_inputs(config: Config, given: Inputs) -> Inputs:
    """Checks the arguments of `update`, and fixes dtypes so that no call retraces."""
    needs = config.rule.needs
    _check_needs(needs, given)
    if isinstance(given.step, jax.Array):
        check_number("step", given.step)  # The host would wait for its value.
    elif given.step is not None:
        check_count("step", given.step, least=0)
    params = arrays_of(given.params)
    check_leaves("params", params)
    if "opt_state" in needs:
        check_leaves("opt_state", given.opt_state)
    value, metrics = _split_value(given.value, config.key, config.rule.keys)
    return Inputs(
        value=as_numpy("value", value),
        params=params,
        step=as_numpy("step", given.step, np.int32),
        seconds=as_numpy("seconds", given.seconds),
        train_value=as_numpy("train_value", given.train_value)
        if "train_value" in needs
        else None,
        opt_state=given.opt_state if "opt_state" in needs else None,
        metrics=metrics,
    )


def _check_needs(needs: frozenset[str], inputs: Inputs) -> None:
    """Refuses a call without an argument that the rule reads."""
    for name in sorted(needs):
        if getattr(inputs, name) is None:
            raise ValueError(
                f"`{name}` is missing: the rule of this stopper reads it. Call "
                f"`update(value, state, params, {name}=...)`."
            )


def _split_value(
    value: Any, key: str | None, keys: frozenset[str]
) -> tuple[Any, dict[str, Any]]:
    """Separates the judged value from those that `monitor` names."""
    if not isinstance(value, Mapping):
        if value is None:
            raise TypeError("`value` must be a number or a dict of numbers, got None.")
        if keys:
            raise ValueError(
                f"`value` must be a dict with the keys that `monitor` names, "
                f"{sorted(keys)}, got {type(value).__name__}."
            )
        return value, {}
    if key is None:
        raise ValueError(
            f"`value` is a dict with keys {sorted(value)}: name the one that defines "
            "the best with `early_stopping(rule, key=...)`."
        )
    for name in sorted({key} | keys):
        if name not in value:
            raise ValueError(
                f"`value` has no key {name!r}, which the stopper monitors; it has "
                f"{sorted(value)}."
            )
    return value[key], {name: as_numpy("value", value[name]) for name in keys}


def as_numpy(name: str, number: Any, dtype: Any = np.float32) -> Any:
    """Gives numbers of the host one dtype, so that no call retraces."""
    if number is None or np.iscomplexobj(number):
        return number
    number = in_range(name, number)
    # The value of a `jax.Array` is not read: the host would wait for the device.
    array = number if isinstance(number, jax.Array) else np.asarray(number)
    if not jnp.issubdtype(array.dtype, jnp.number):
        kind = type(number).__name__
        raise TypeError(
            f"`{name}` must be a number, got {number!r:.99} of type {kind}."
        )
    if isinstance(array, jax.Array):
        return array
    with np.errstate(over="ignore"):  # 1e39 is infinite in float32, and judged so.
        return array.astype(dtype)
