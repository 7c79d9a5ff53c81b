"""What `fit` is given: arguments, its own copy of the state, values."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._checkpoint import Checkpointer
from optax_guard._early_stopping import EarlyStopping
from optax_guard._host import MetricWriter

# The key of a row for what `evaluate` returned, if it was no dict.
VALUE = "value"


def check_arguments(
    state: Any, evaluate: Any, stopper: Any, loggers: Any, checkpointer: Any
) -> None:
    """Refuses what is of the wrong kind, with advice."""
    for name in ("step", "params", "opt_state"):
        if not hasattr(state, name):
            raise TypeError(
                f"`state` must have `{name}`, as a Flax `TrainState` has, got a "
                f"`{type(state).__name__}`."
            )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(
            f"`evaluate` must be a function of the state, got {evaluate!r}."
        )
    if stopper is not None and not isinstance(stopper, EarlyStopping):
        raise TypeError(
            "`stopper` must be made by `early_stopping`, as in "
            f"`early_stopping(stop.patience(5))`, got {stopper!r}."
        )
    if stopper is not None and evaluate is None:
        raise ValueError("`stopper` needs `evaluate`: it judges what that returns.")
    if not isinstance(loggers, Sequence):
        raise TypeError(f"`loggers` must be a list of loggers, got {loggers!r}.")
    for logger in loggers:
        if not (callable(logger) or isinstance(logger, MetricWriter)):
            raise TypeError(
                "`loggers` must hold callables `(step, row)` or objects with "
                f"`write_scalars`, got {logger!r}."
            )
    if checkpointer is not None and not isinstance(checkpointer, Checkpointer):
        raise TypeError(
            "`checkpointer` must be a `Checkpointer`, as in "
            f"`Checkpointer(directory)`, got {checkpointer!r}."
        )
    if checkpointer is not None and not hasattr(state, "replace"):
        raise TypeError(
            "`state` must have `replace`, as a Flax `TrainState` has, to be saved; got "
            f"a `{type(state).__name__}`."
        )


def own(state: Any) -> Any:
    """A copy that may be donated, without weak types, which would be traced again."""
    return jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), state
    )


def beside(tree: Any, batch: Any) -> Any:
    """A tree whose arrays that are nowhere yet are on all devices of its mesh.

    Or on those of the batch's. There a step leaves them, and given as they were, the
    step would be compiled once for them and once for what it returns.
    """
    arrays = [x for x in jax.tree.leaves((tree, batch)) if isinstance(x, jax.Array)]
    meshes = [
        x.sharding.mesh
        for x in arrays
        if x.committed and isinstance(x.sharding, NamedSharding)
    ]
    if not meshes:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    loose = [
        i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not x.committed
    ]
    # By `jit`, which, unlike `device_put`, does not let processes compare them.
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    placed = jax.jit(lambda x: x, out_shardings=everywhere)([leaves[i] for i in loose])
    for i, x in zip(loose, placed, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def batch_stats(state: Any) -> Any:
    """The field of Flax, if there is one."""
    return getattr(state, "batch_stats", None)


def tracked(state: Any) -> Any:
    """What belongs to the best evaluation: averages of other weights would not do."""
    stats = batch_stats(state)
    if stats is None:
        return state.params
    return {"params": state.params, "batch_stats": stats}


def named_values(found: Any) -> dict[str, Any]:
    """What `evaluate` returned, by the names of a row."""
    values = dict(found) if isinstance(found, Mapping) else {VALUE: found}
    for name, value in values.items():
        where = "" if name == VALUE else f" for {name!r}"
        if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(
                "`evaluate` must return a number or a dict of numbers, got a "
                f"`{type(value).__name__}`{where}."
            )
        if np.shape(value):
            raise ValueError(
                "`evaluate` must return scalars, got an array of shape "
                f"{np.shape(value)}{where}. Take the mean over the data."
            )
        # One dtype for numbers of the host, so that the machine is not traced again;
        # a copy of an array, which may be a part of the state that is donated next.
        if isinstance(value, jax.Array):
            values[name] = jnp.copy(value)
        else:
            with np.errstate(over="ignore"):
                values[name] = np.float32(value)
    return values


def check_apart(row: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses values with a name that `fit` itself uses."""
    if taken := sorted(values.keys() & {"step", *row}):
        raise ValueError(
            f"`evaluate` must not return {taken}: `fit` itself writes these into the "
            "row. Call them, say, `val_loss`."
        )


def warn_of_end(step: int, num_steps: int, is_empty: bool) -> None:
    """Tells that the data has ended before the run."""
    if is_empty:
        raise ValueError("`batches` is empty.")
    warnings.warn(
        f"`batches` ended after step {step} of {num_steps}, and the run with it. Pass "
        "a function `step -> batch`, or an iterable that repeats the data.",
        stacklevel=3,
    )
