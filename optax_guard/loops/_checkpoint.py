"""Checkpoints of `fit` on Orbax: the latest to resume from, and the best."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._checks import check_flag, static_count
from optax_guard.loops._orbax import (
    METADATA,
    TRAINING,
    VARIABLES,
    LatestAndBest,
    absolute,
    import_orbax,
    like,
    open_manager,
    read_metadata,
    restore,
    restore_as_numpy,
    savable,
)
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


class Checkpointer:
    """The directory in which `fit` saves its checkpoints, and from which it resumes.

    `fit` saves a checkpoint at each evaluation, after it has updated the stopper. The
    directory keeps the best and the latest. If there is a latest, `fit` resumes from
    it, whatever state it is given. The steps between it and a crash or a Ctrl-C are
    done again. Several processes save together into one directory, which all must see.

    Orbax writes a checkpoint in the background and renames it when it is complete. So
    a process that is killed leaves no half checkpoint. A damaged checkpoint is an error
    that names it. The item ``variables`` holds ``params`` and ``batch_stats``, the item
    ``training`` the rest of the state and the state of the stopper.

    Args:
      directory: A directory for this run alone. It is made if it does not exist.
      keep: Number of latest checkpoints to keep, beside the best.
      continue_stopped: Whether a run that the stopper had stopped goes on when it is
        resumed, after ``reset(keep_best=True)``: patience and similar counts start
        again, the best and the counts of a budget stay.

    Raises:
      ImportError: If Orbax is not installed.
      ValueError: If ``keep`` is not a whole number of at least 1.

    Examples:
      >>> import tempfile
      >>> import jax.numpy as jnp, optax
      >>> from optax_guard.flax import Checkpointer, TrainState, fit, load_best
      >>> from optax_guard import early_stopping, stop
      >>> def train_step(state, x):
      ...     return state.apply_gradients(grads=state.params - x), 0.0
      >>> def run(directory, num_steps):
      ...     params, tx = jnp.array(1.0), optax.sgd(0.5)
      ...     return fit(
      ...         TrainState.create(apply_fn=None, params=params, tx=tx),
      ...         train_step,
      ...         lambda step: 0.0,
      ...         num_steps=num_steps,
      ...         eval_every=1,
      ...         evaluate=lambda state: state.params,
      ...         stopper=early_stopping(stop.patience(3)),
      ...         checkpointer=Checkpointer(directory),
      ...     )
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     _ = run(directory, num_steps=1)
      ...     resumed = run(directory, num_steps=3)
      ...     float(load_best(directory)["params"])
      0.125
      >>> [row["step"] for row in resumed.history]
      [1, 2, 3]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 1,
        continue_stopped: bool = False,
    ):
        import_orbax("Checkpointer")
        keep = static_count("keep", keep)
        check_flag("continue_stopped", continue_stopped)
        self.directory = absolute(directory)
        self.keep = keep
        self.continue_stopped = continue_stopped


def check_checkpointer(checkpointer: Any, state: Any) -> None:
    """Refuses another object, and a state that cannot be restored field by field."""
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


class Store:
    """The open directory of a `Checkpointer`."""

    def __init__(self, checkpointer: Checkpointer, *, keeps_first: bool):
        ocp = import_orbax("Checkpointer")
        self._args = ocp.args
        self.directory = checkpointer.directory
        self.continues_stopped = checkpointer.continue_stopped
        self.keeps_first = keeps_first
        self._policy = LatestAndBest(checkpointer.keep, keeps_first)
        self._manager = open_manager(
            checkpointer.directory, preservation_policy=self._policy
        )

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()

    def is_empty(self) -> bool:
        """Whether there is no checkpoint to resume from."""
        return self._manager.latest_step() is None

    def save(self, run: Snapshot) -> None:
        """Saves in the background. The arrays may be donated when this returns."""
        variables, rest = _variables_and_rest(run.state)
        training = {"state": rest, "stop": run.stop}
        metadata = {
            "best_step": run.best_step,
            "rewound": run.rewound._asdict(),
            # A copy, because it is written in the background.
            "history": list(run.history),
        }
        items = {
            VARIABLES: self._args.PyTreeSave(savable(variables)),
            TRAINING: self._args.PyTreeSave(savable(training)),
            METADATA: self._args.JsonSave(metadata),
        }
        self._policy.best_step = run.best_step
        self._manager.save(run.step, args=self._args.Composite(**items))

    def load_latest(self, state: Any, stopper: EarlyStopping | None) -> Snapshot:
        """The run at the latest checkpoint, in arrays like those of `state`."""
        step = self._manager.latest_step()
        assert step is not None
        metadata = read_metadata(self._manager, step)
        state, stop = self._load(step, state, stopper and stopper.init())
        self._policy.best_step = metadata["best_step"]
        return Snapshot(
            step=step,
            state=state,
            stop=stop,
            history=metadata["history"],
            best_step=metadata["best_step"],
            rewound=Rewound(**metadata["rewound"]),
        )

    def load_pinned(
        self, state: Any, stop: EarlyStoppingState
    ) -> tuple[int, Any, EarlyStoppingState]:
        """Step, state and stopper of the best checkpoint, or of the first without one.

        The arrays of `state` are deleted first, to make room.
        """
        self._manager.wait_until_finished()
        step = self._policy.pinned(self._manager.all_steps())
        target = jax.tree.map(like, state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        return step, *self._load(step, target, stop)

    def load_best_variables(self, state: Any) -> dict[str, Any]:
        """Variables of the best checkpoint, in arrays like those of `state`.

        Without a best checkpoint they are copies of the state's own.
        """
        variables, _ = _variables_and_rest(state)
        if self._policy.best_step < 0:
            return jax.tree.map(jnp.copy, variables)
        self._manager.wait_until_finished()
        found = restore(self._manager, self._policy.best_step, {VARIABLES: variables})
        return found[VARIABLES]

    def _load(self, step: int, state: Any, stop: Any) -> tuple[Any, Any]:
        variables, rest = _variables_and_rest(state)
        targets = {VARIABLES: variables, TRAINING: {"state": rest, "stop": stop}}
        found = restore(self._manager, step, targets)
        state = found[TRAINING]["state"].replace(**found[VARIABLES])
        return state, found[TRAINING]["stop"]


@contextlib.contextmanager
def open_store(
    checkpointer: Checkpointer | None, *, keeps_first: bool
) -> Iterator[Store | None]:
    """The store of a run, closed at its end; ``None`` without a checkpointer."""
    if checkpointer is None:
        yield None
        return
    store = Store(checkpointer, keeps_first=keeps_first)
    try:
        yield store
    finally:
        store.close()


def load_best(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the variables of the best evaluation that `fit` has saved.

    This needs neither the model nor the optimizer nor the devices of the training. To
    load arrays with shardings, restore the item ``variables`` with Orbax.

    Args:
      directory: The directory of the `Checkpointer`.

    Returns:
      A dict of nested dicts and lists of NumPy arrays, as ``model.apply`` takes it:
      ``params`` and, if the state has them, ``batch_stats``.

    Raises:
      ImportError: If Orbax is not installed.
      FileNotFoundError: If there is no checkpoint, or no evaluation was best.
      RuntimeError: If the checkpoint is damaged.

    Examples:
      >>> import tempfile
      >>> from optax_guard.flax import load_best
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     try:
      ...         load_best(directory)
      ...     except FileNotFoundError as error:
      ...         print(error)
      `directory` holds no checkpoint: ...
    """
    import_orbax("load_best")
    directory = absolute(directory)
    with open_manager(directory, create=False, read_only=True) as manager:
        latest = manager.latest_step()
        if latest is None:
            raise FileNotFoundError(f"`directory` holds no checkpoint: {directory}")
        step = read_metadata(manager, latest)["best_step"]
        if step < 0:
            raise FileNotFoundError(
                f"`directory` holds no best checkpoint: {directory}. No evaluation has "
                "given a finite value, or `fit` ran without a stopper."
            )
        return restore_as_numpy(manager, step, VARIABLES)


def _variables_and_rest(state: Any) -> tuple[dict[str, Any], Any]:
    """The variables that were evaluated, and the rest of the state."""
    variables = {"params": state.params}
    if getattr(state, "batch_stats", None) is not None:
        variables["batch_stats"] = state.batch_stats
    return variables, state.replace(**dict.fromkeys(variables))
