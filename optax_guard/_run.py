"""Where a run of `fit` begins, at its first step or at a checkpoint, and its best."""

from typing import Any

from optax_guard._checkpoint import Rewound, Run, Store
from optax_guard._early_stopping import EarlyStopping, EarlyStoppingState
from optax_guard._fit_inputs import batch_stats, own, tracked
from optax_guard._rewind import with_plateau


def begin(
    state: Any,
    stopper: EarlyStopping | None,
    batches: Any,
    num_steps: int,
    store: Store | None,
) -> Run:
    """The run at its latest checkpoint, or one that begins with this state."""
    if store is not None and not store.is_empty():
        return _resumed(state, stopper, batches, store)
    state = own(state)
    step = int(state.step)
    if step >= num_steps:
        raise ValueError(
            f"`num_steps` must be above the steps done, {step}, got {num_steps}: it is "
            "the step to train to, not the number of further steps."
        )
    stop = None
    if stopper is not None:
        # With a store, the best is on disk.
        stop = stopper.init(tracked(state) if store is None else None)
        state = with_plateau(state, stop, Rewound())
    run = Run(step, state, stop, history=[], best_step=-1, rewound=Rewound())
    if store is not None and store.keeps_first:
        store.save(run)
    return run


def _resumed(
    state: Any, stopper: EarlyStopping | None, batches: Any, store: Store
) -> Run:
    if not callable(batches):
        raise ValueError(
            "`batches` must be a function `step -> batch` to resume the run in "
            f"{store.directory}: an iterable starts again at its first batch."
        )
    run = store.load_latest(state, stopper)
    if stopper is None or run.stop is None or not store.continues_stopped:
        return run
    if not run.stop.should_stop:
        return run
    stop = stopper.reset(run.stop)
    state = with_plateau(run.state, stop, run.rewound)
    return run._replace(state=state, stop=stop)


def best_variables(
    state: Any,
    stopper: EarlyStopping | None,
    stop: EarlyStoppingState | None,
    store: Store | None,
) -> dict[str, Any]:
    """`params` and, if there are, `batch_stats` of the best evaluation."""
    if stopper is None or stop is None:
        return {}
    if store is not None:
        return store.load_best_variables(state)
    best = stopper.best(stop, tracked(state))
    return {"params": best} if batch_stats(state) is None else best
