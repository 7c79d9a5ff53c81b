"""What `update` of early stopping is given: checks with advice, and fixed dtypes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard.stop._rule import StopRule
from optax_guard.stop._smoothing import Smoother
from optax_guard.stop._state import EarlyStoppingState


def check_needs(needs: frozenset[str], **given: Any) -> None:
    """Refuses a call without an argument that the rule reads."""
    for name in sorted(needs):
        if given[name] is None:
            raise ValueError(
                f"`{name}` is missing: the rule of this stopper reads it. Call "
                f"`update(value, state, params, {name}=...)`."
            )


def check_state(where: str, state: object) -> None:
    if not isinstance(state, EarlyStoppingState):
        raise TypeError(
            f"`state` of `{where}` must be the `EarlyStoppingState` that `init` "
            f"returned, got {type(state).__name__}. The order is update(value, state, "
            "params); a checkpoint is restored into `init(params)` as its target."
        )


def check_same_rule(
    state: EarlyStoppingState, rule: StopRule, smooth: Smoother | None
) -> None:
    expected = (rule.init(), () if smooth is None else smooth.init())
    got = (state.rule_state, state.smooth_state)
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise ValueError(
            "`state` belongs to another stopper: its rule or smoothing has a state of "
            f"{jax.tree.structure(got)}, this one's is "
            f"{jax.tree.structure(expected)}. Make it with this stopper's `init`."
        )


def check_same_params(what: str, params: Any, kept: Any) -> None:
    if params is None and kept is not None:
        raise ValueError(
            f"{what} are missing: `init` was given parameters, so every "
            "call needs those that gave the value. To keep none, call `init()`."
        )
    if kept is None and params is not None:
        raise ValueError(
            f"{what} have no place in `state`: it was made by `init()`. "
            "Make it by `init(params)` to keep the best, or pass none."
        )
    if jax.tree.structure(params) != jax.tree.structure(kept):
        raise ValueError(
            f"{what} must have the structure given to `init`, "
            f"{jax.tree.structure(kept)}, got {jax.tree.structure(params)}."
        )
    pairs = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(kept), strict=True)
    for (path, leaf), old in pairs:
        if (leaf.shape, leaf.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"{what} must be like those given to `init`: at "
                f"{jax.tree_util.keystr(path)} {old.dtype}{list(old.shape)}, got "
                f"{leaf.dtype}{list(leaf.shape)}."
            )


def as_scalar(name: str, number: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Casts to one dtype, and refuses what is not a real scalar."""
    if jnp.ndim(number):
        raise ValueError(
            f"`{name}` must be a scalar, got shape {jnp.shape(number)}. Reduce it "
            "first (a mean over the data); for a population, vmap `update`."
        )
    if jnp.iscomplexobj(number):
        raise ValueError(f"`{name}` must be real, got dtype {number.dtype}.")
    return jnp.asarray(number, dtype)


def as_series(name: str, numbers: jax.Array) -> jax.Array:
    """Numbers in a row: one, or those of all steps since the last evaluation."""
    if jnp.iscomplexobj(numbers) or not jnp.size(numbers):
        raise ValueError(
            f"`{name}` must be a real number or an array of some, got "
            f"{jnp.asarray(numbers).dtype}{list(jnp.shape(numbers))}."
        )
    return jnp.ravel(numbers)


def fixed(name: str, number: Any, dtype: Any = np.float32) -> Any:
    """Gives numbers of the host one dtype, so that no call traces anew."""
    if number is None or np.iscomplexobj(number):
        return number
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


def split(
    value: Any, key: str | None, keys: frozenset[str]
) -> tuple[Any, dict[str, Any]]:
    """Takes the judged value and the monitored ones out of what `update` was given."""
    if not isinstance(value, Mapping):
        if value is None:
            raise TypeError("`value` must be a number or a dict of some, got None.")
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
    return value[key], {name: fixed("value", value[name]) for name in keys}
