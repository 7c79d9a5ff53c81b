"""The inputs of a loop: its arguments, and its own copy of the state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._records.writers import is_logger
from optax_guard.loops._warning import warn_user
from optax_guard.stop._state import EarlyStopping

# The facts that a loop on the device can tell a stopper.
_FACTS = frozenset({"step", "train_value", "opt_state"})


class Functions(NamedTuple):
    """The functions of a run, as `train_on_device` takes them."""

    train_step: Callable[[Any, Any], tuple[Any, Any]]
    batches: Callable[[Any], Any]
    evaluate: Callable[[Any], Any] | None
    stopper: EarlyStopping | None


def check_arguments(state: Any, evaluate: Any, stopper: Any, loggers: Any = ()) -> None:
    """Refuses arguments of the wrong kind, with advice."""
    for name in ("step", "params", "opt_state"):
        if not hasattr(state, name):
            raise TypeError(
                f"`state` must have `{name}`, as a Flax `TrainState` has, got a "
                f"`{type(state).__name__}`. A NamedTuple of `step`, `params` and "
                "`opt_state` does, too; with NNX give `(model, optimizer)`."
            )
    warn_if_nested(state)
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
        raise ValueError(
            "`stopper` needs `evaluate`: it judges the value that it returns."
        )
    if not isinstance(loggers, Sequence):
        raise TypeError(f"`loggers` must be a list of loggers, got {loggers!r}.")
    for logger in loggers:
        if not is_logger(logger):
            raise TypeError(
                "`loggers` must hold functions `(step, row)`, a writer of TensorBoard "
                "or CLU, a run of W&B or trackio, `mlflow`, or a backend of metrax, "
                f"got {logger!r}."
            )


def copied(state: Any) -> Any:
    """A copy to donate, without weak types: those would be traced a second time."""
    return jax.tree.map(
        lambda x: jnp.array(x, dtype=jnp.result_type(x), copy=True), state
    )


def on_mesh(tree: Any, batch: Any) -> Any:
    """Replicates the uncommitted arrays of a tree over its mesh, or over the batch's.

    A step leaves them there. If it got them as they were, it would be compiled once for
    them and once for its own results.
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
    # `device_put` would let the processes compare them, `jit` does not.
    everywhere = NamedSharding(meshes[0], PartitionSpec())
    placed = jax.jit(lambda x: x, out_shardings=everywhere)([leaves[i] for i in loose])
    for i, x in zip(loose, placed, strict=True):
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def warn_of_end(step: int, num_steps: int, is_empty: bool) -> None:
    """Warns that the batches have ended before the run."""
    if is_empty:
        raise ValueError("`batches` is empty.")
    warn_user(
        f"`batches` ended after step {step} of {num_steps}, so the run ends too. Pass "
        "a function `step -> batch`, or an iterable that repeats the data."
    )


def check_host_functions(train_step: Any, learning_rate: Any) -> None:
    """Refuses a step and a schedule that `fit` cannot call."""
    if not callable(train_step):
        raise TypeError(f"`train_step` must be a function, got {train_step!r}.")
    if learning_rate is not None and not callable(learning_rate):
        raise TypeError(
            "`learning_rate` must be the schedule of the optimizer, which `fit` only "
            f"records, got {learning_rate!r}."
        )


def check_functions(functions: Functions) -> None:
    """Refuses functions that cannot run on the device."""
    for name in ("train_step", "batches"):
        function = getattr(functions, name)
        if not callable(function):
            advice = ""
            if name == "batches":
                advice = " of the step: an iterable stays on the host, use `fit`"
            raise TypeError(f"`{name}` must be a function{advice}, got {function!r}.")
    if functions.stopper is not None and (missing := functions.stopper.needs - _FACTS):
        raise ValueError(
            f"`stopper` has a rule that reads {sorted(missing)}, which a loop on the "
            "device cannot tell: it has no clock. Count evaluations or steps instead, "
            "as in `stop.budget(steps=...)`, or use `optax_guard.loops.fit`."
        )


def check_steps(step: int, num_steps: int) -> None:
    """Refuses to train to a step that is done already."""
    if step >= num_steps:
        raise ValueError(
            f"`num_steps` must be above the steps done, {step}, got {num_steps}: it is "
            "the step to train to, not the number of further steps."
        )
