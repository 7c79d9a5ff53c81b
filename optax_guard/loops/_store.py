"""The open directory of a `Checkpointer`: what is saved there, and what comes back."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._trees import is_inexact, path_names
from optax_guard.loops._ending import why_gone_bad
from optax_guard.loops._intact import (
    FORMAT,
    METADATA,
    add_digest,
    agreed,
    check_format,
    choose,
    damage_of,
)
from optax_guard.loops._lock import hold
from optax_guard.loops._orbax import (
    TRAINING,
    VARIABLES,
    LatestAndBest,
    as_path,
    import_orbax,
    like,
    open_manager,
    read_metadata,
    restore,
    savable,
)
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.loops._warning import warn_user
from optax_guard.stop._state import EarlyStoppingState


class Store:
    """The open directory of a `Checkpointer`.

    Args:
      directory: Its absolute path.
      keep: Number of latest checkpoints to keep, beside the best.
      keeps_first: Whether the first checkpoint stays until there is a best.

    Attributes:
      latest: Step of the latest checkpoint that is intact, or ``None``.
    """

    def __init__(self, directory: str, keep: int, *, keeps_first: bool = False):
        ocp = import_orbax("Checkpointer")
        self._args = ocp.args
        self.directory = directory
        self.keeps_first = keeps_first
        self._path = as_path(directory)
        self.latest = choose(self._path)
        self._policy = LatestAndBest(keep, keeps_first)
        self._saving = -1
        self._is_refusing = False
        self._manager = open_manager(
            directory,
            preservation_policy=self._policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()

    @property
    def best_step(self) -> int:
        """Step of the best checkpoint; -1 without one."""
        return self._policy.best_step

    def save(
        self, run: Snapshot, flags: Mapping[str, Any], *, goes_on: bool = True
    ) -> bool:
        """Saves in the background, unless a run must not be resumed from here.

        The arrays may be donated when this returns.

        Args:
          run: The run.
          flags: The flags of its evaluation.
          goes_on: Whether the run goes on, so that there is something to warn of.

        Returns:
          Whether it is saved.
        """
        why = _why_unfit(run.state, flags)
        if why is not None:
            if goes_on and not self._is_refusing:
                at = "the beginning" if self.latest is None else f"step {self.latest}"
                warn_user(
                    f"The checkpoint of step {run.step} is not saved, because of {why}"
                    f". Until the run recovers, the one to resume from is of {at}.",
                )
            self._is_refusing = True
            return False
        self._is_refusing = False
        self._save(run)
        return True

    def _save(self, run: Snapshot) -> None:
        variables, rest = _variables_and_rest(run.state)
        training = {"state": rest, "stop": run.stop}
        metadata = {
            "format": FORMAT,
            "best_step": run.best_step,
            "rewound": run.rewound._asdict(),
            # A copy, because it is written in the background.
            "history": list(run.history),
            "data": run.data,
        }
        items = {
            VARIABLES: self._args.PyTreeSave(savable(variables)),
            TRAINING: self._args.PyTreeSave(savable(training)),
            METADATA: self._args.JsonSave(metadata),
        }
        # The checkpoint before is finished first: its step goes into its digest.
        self._manager.wait_until_finished()
        self._policy.best_step = run.best_step
        self._saving = run.step
        self._manager.save(run.step, args=self._args.Composite(**items))
        self.latest = run.step

    def _finish(self) -> None:
        """Orbax calls this when all files are written, before they get their name."""
        if jax.process_index() == 0:
            add_digest(self._path, self._saving)

    def load_latest(self, state: Any, stop: Any) -> Snapshot:
        """The run at the latest checkpoint, in arrays like those of `state`.

        Args:
          state: A state of the same structure.
          stop: A state of the stopper, of the same structure, or ``None``.
        """
        step = self.latest
        assert step is not None
        self._manager.wait_until_finished()
        metadata = read_metadata(self._manager, step)
        check_format(metadata, f"{self.directory}, step {step}")
        state, stop = self._load(step, state, stop)
        self._policy.best_step = metadata["best_step"]
        return Snapshot(
            step=step,
            state=state,
            stop=stop,
            history=metadata["history"],
            best_step=metadata["best_step"],
            rewound=Rewound(**metadata["rewound"]),
            data=metadata.get("data"),
        )

    def load_pinned(
        self, state: Any, stop: EarlyStoppingState
    ) -> tuple[int, Any, EarlyStoppingState] | None:
        """Step, state and stopper of the best checkpoint, or of the first without one.

        If it is damaged, it is named, and the latest that is intact takes its place.
        The arrays of `state` are deleted first, to make room. ``None`` if there is no
        checkpoint.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        pinned = self._policy.pinned(steps)
        # Stable: the pinned one first, the others from the latest back.
        steps.sort(key=lambda step: step != pinned)
        step = choose(self._path, steps)
        assert step is not None
        if step != steps[0]:
            self._manager.reload()
        target = jax.tree.map(like, state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        return step, *self._load(step, target, stop)

    def load_best_variables(self, state: Any) -> dict[str, Any]:
        """Variables of the best checkpoint, in arrays like those of `state`.

        Without a best checkpoint, or if it is damaged, they are copies of the state's
        own.
        """
        variables, _ = _variables_and_rest(state)
        best = self._policy.best_step
        if best >= 0:
            self._manager.wait_until_finished()
            why = damage_of(self._path, best) if jax.process_index() == 0 else None
            if agreed(why is None):
                found = restore(self._manager, best, {VARIABLES: variables})
                return found[VARIABLES]
            warn_user(
                f"The best checkpoint, of step {best} in {self.directory}, is damaged"
                f"{'' if why is None else f' ({why})'}. `best_params` are those of the "
                "last step instead.",
            )
        return jax.tree.map(jnp.copy, variables)

    def _load(self, step: int, state: Any, stop: Any) -> tuple[Any, Any]:
        variables, rest = _variables_and_rest(state)
        targets = {VARIABLES: variables, TRAINING: {"state": rest, "stop": stop}}
        found = restore(self._manager, step, targets)
        state = found[TRAINING]["state"].replace(**found[VARIABLES])
        return state, found[TRAINING]["stop"]


@contextlib.contextmanager
def open_store(
    checkpointer: Any | None, *, keeps_first: bool = False
) -> Iterator[Store | None]:
    """The store of a run, closed at its end; ``None`` without a checkpointer."""
    if checkpointer is None:
        yield None
        return
    with hold(checkpointer.directory):
        store = Store(
            checkpointer.directory, checkpointer.keep, keeps_first=keeps_first
        )
        try:
            yield store
        finally:
            store.close()


def _why_unfit(state: Any, flags: Mapping[str, Any]) -> str | None:
    """The reason in words for which no run must be resumed from this state."""
    if (why := why_gone_bad(flags, state)) is not None:
        return why
    if int(flags.get("nonfinite_streak", 0)) > 0:
        return "a value that is not finite"
    variables, _ = _variables_and_rest(state)
    leaves = jax.tree.leaves(variables)
    is_finite = jax.device_get(_are_finite([x for x in leaves if is_inexact(x)]))
    names = [
        name
        for name, leaf in zip(path_names(variables), leaves, strict=True)
        if is_inexact(leaf)
    ]
    bad = [name for name, good in zip(names, is_finite, strict=True) if not good]
    return f"numbers that are not finite in {', '.join(bad[:5])}" if bad else None


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def _variables_and_rest(state: Any) -> tuple[dict[str, Any], Any]:
    """The variables that were evaluated, and the rest of the state."""
    variables = {"params": state.params}
    if getattr(state, "batch_stats", None) is not None:
        variables["batch_stats"] = state.batch_stats
    return variables, state.replace(**dict.fromkeys(variables))
