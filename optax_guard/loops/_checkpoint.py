"""Checkpoints on Orbax: the latest to resume from, and the best."""

import contextlib
import os
import warnings
from typing import Any

import jax

from optax_guard._checks import check_flag, static_count
from optax_guard._guarding.readout import metrics
from optax_guard._guarding.state import GuardState
from optax_guard._trees import find_states
from optax_guard.loops._carrier import carried, released
from optax_guard.loops._ending import flags_of_guard
from optax_guard.loops._intact import check_format, damage_of, steps_in
from optax_guard.loops._orbax import (
    VARIABLES,
    absolute,
    as_path,
    import_orbax,
    open_manager,
    read_metadata,
    restore_as_numpy,
)
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.loops._store import Store, open_store
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState, check_state


class Checkpointer:
    """The directory in which a run saves its checkpoints, and from which it resumes.

    `fit` saves a checkpoint at each evaluation, after it has updated the stopper. The
    directory keeps the best and the latest. If there is a latest, `fit` resumes from
    it, whatever state it is given. The steps between it and a crash or a Ctrl-C are
    done again. Several processes save together into one directory, which all must see.
    A loop of one's own calls `save` and `restore`, under the same rules.

    Orbax writes a checkpoint in the background and renames it when it is complete. So
    a process that is killed leaves no half checkpoint. Beside the files is a digest of
    each. A checkpoint whose files are not as they were saved is named in a warning, set
    aside, and the one before is used. Without one before, that is an error. Parameters
    that are not finite, an evaluation whose value is not, and one at which the run has
    gone bad (DIVERGED, NONFINITE, SKIP_STORM) are not saved. To a run that goes on, a
    warning says so. One run at a time holds the directory.

    The item ``variables`` holds ``params`` and ``batch_stats``, the item ``training``
    the rest of the state and the state of the stopper. To write and to check the digest
    takes a second for about 1.9 GB of files and each core, in the background and at a
    resumption.

    Args:
      directory: A directory for this run alone. It is made if it does not exist.
      keep: Number of latest checkpoints to keep, beside the best. With one alone there
        is none before it if it is damaged.
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
        keep: int = 2,
        continue_stopped: bool = False,
    ):
        import_orbax("Checkpointer")
        keep = static_count("keep", keep)
        check_flag("continue_stopped", continue_stopped)
        self.directory = absolute(directory)
        self.keep = keep
        self.continue_stopped = continue_stopped
        self._stack = contextlib.ExitStack()
        self._store: Store | None = None

    def save(
        self, step: int, state: Any, stop: EarlyStoppingState | None = None
    ) -> bool:
        """Saves a checkpoint in a loop of one's own, after an evaluation.

        It is written in the background, so the arrays may be donated next. The first
        call of `save` or `restore` takes the directory. `close`, or the end of a
        ``with`` block, waits for the last checkpoint and lets go of the directory.

        Args:
          step: Steps done.
          state: A state as `fit` takes it.
          stop: The state of the stopper, if there is one. The checkpoint of its best
            evaluation is kept.

        Returns:
          Whether it is saved. It is not, with a warning, if parameters or the last
          value are not finite, or if the run has gone bad.

        Raises:
          ValueError: If there is a checkpoint of this or a later step.
          RuntimeError: If another run holds the directory, or the checkpoints in it are
            damaged.
        """
        step = static_count("step", step, least=0)
        state = carried(state)
        check_checkpointer(self, state)
        store = self._open()
        if store.latest is not None and step <= store.latest:
            raise ValueError(
                f"`step` must be above that of the latest checkpoint, {store.latest}, "
                f"got {step}. Begin with `restore`, or give another directory."
            )
        flags, best_step = {}, -1
        if stop is not None:
            check_state("save", stop)
            flags, best_step = _read(stop)
            if best_step < 0:  # The stopper was not told the steps.
                best_step = step if flags["is_best"] else store.best_step
        for guard in find_states(state, GuardState)[:1]:
            flags |= flags_of_guard(jax.device_get(metrics(guard)))
        snapshot = Snapshot(step, state, stop, [], best_step, Rewound())
        return store.save(snapshot, flags)

    def restore(
        self,
        state: Any,
        stop: EarlyStoppingState | None = None,
        *,
        stopper: EarlyStopping | None = None,
    ) -> tuple[int, Any, Any]:
        """Loads the latest checkpoint that is intact, in a loop of one's own.

        Args:
          state: The first state of the run. It says how the arrays are placed.
          stop: The first state of the stopper, if it is saved too.
          stopper: The stopper, to reset a run that had stopped. Only
            ``continue_stopped=True`` needs it.

        Returns:
          Steps done, state and stopper's state. They are those that were given, with
          0 steps, if the directory is empty.

        Raises:
          ValueError: If ``state`` or ``stop`` are not those of this run.
          RuntimeError: If another run holds the directory, or no checkpoint is intact.
        """
        like = carried(state)
        check_checkpointer(self, like)
        store = self._open()
        if store.latest is None:
            return 0, state, stop
        found = store.load_latest(like, stop)
        stop = found.stop
        if self.continue_stopped and stop is not None and bool(stop.should_stop):
            if stopper is None:
                raise ValueError("`continue_stopped` needs `stopper`, to reset it.")
            stop = stopper.reset(stop)
        return found.step, released(found.state), stop

    def close(self) -> None:
        """Waits until all is written, and lets go of the directory."""
        self._store = None
        self._stack.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> Store:
        if self._store is None:
            self._store = self._stack.enter_context(open_store(self))
        assert self._store is not None
        return self._store


def _read(stop: EarlyStoppingState) -> tuple[dict[str, Any], int]:
    """The flags of the last evaluation, and the step of the best."""
    names = "should_stop", "stop_reason", "nonfinite_streak", "is_best", "best_step"
    flags = jax.device_get({name: getattr(stop, name) for name in names})
    return flags, int(flags.pop("best_step"))


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


def load_best(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads the variables of the best evaluation that was saved.

    This needs neither the model nor the optimizer nor the devices of the training. To
    load arrays with shardings, restore the item ``variables`` with Orbax.

    Args:
      directory: The directory of the `Checkpointer`.

    Returns:
      A dict of nested dicts and lists of NumPy arrays, as ``model.apply`` takes it:
      ``params`` and, if the state has them, ``batch_stats``. If the latest checkpoint
      is damaged, it is the best of those before, and a warning says so.

    Raises:
      ImportError: If Orbax is not installed.
      FileNotFoundError: If there is no checkpoint, or no evaluation was best.
      RuntimeError: If the best checkpoint is damaged, or all are.

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
    path = as_path(directory)
    steps = steps_in(path)
    if not steps:
        raise FileNotFoundError(f"`directory` holds no checkpoint: {directory}")
    damaged = {step: why for step in steps if (why := damage_of(path, step))}
    intact = [step for step in steps if step not in damaged]
    text = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
    if not intact:
        raise RuntimeError(f"No checkpoint in {directory} can be used ({text}).")
    with open_manager(directory, create=False, read_only=True) as manager:
        metadata = read_metadata(manager, intact[0])
        check_format(metadata, f"{directory}, step {intact[0]}")
        best = metadata["best_step"]
        if best < 0:
            raise FileNotFoundError(
                f"`directory` holds no best checkpoint: {directory}. No evaluation has "
                "given a finite value, or there was no stopper."
            )
        if best not in intact:
            raise RuntimeError(
                f"The best checkpoint, of step {best} in {directory}, cannot be used "
                f"({damaged.get(best, 'it is not there')}). Those of {intact} are "
                "intact: restore the item `variables` of one with Orbax, or resume the "
                "run with `fit`."
            )
        if intact[0] != steps[0]:
            warnings.warn(
                f"The latest checkpoints in {directory} are damaged ({text}). The best "
                f"of those before is that of step {best}.",
                stacklevel=2,
            )
        return restore_as_numpy(manager, best, VARIABLES)
