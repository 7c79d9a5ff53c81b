"""The result of a run of `fit` that has come to its end."""

from typing import Any

from optax_guard.loops._carrier import params_of_user, released
from optax_guard.loops._ema import ema_params
from optax_guard.loops._evaluation import batch_stats, tracked
from optax_guard.loops._host_run import Ending, HostRun
from optax_guard.loops._ranges import all_left_out, as_ranges
from optax_guard.loops._result import FitResult, average_params


def result_of(run: HostRun) -> FitResult:
    """The result, with the best parameters."""
    best: dict[str, Any] = {}
    stopper = run.plan.stopper
    if stopper is not None and run.stop is not None:
        if run.store is not None:
            best = run.store.load_best_variables(run.state)
        else:
            best = stopper.best(run.stop, tracked(run.state))
            if batch_stats(run.state) is None:
                best = {"params": best}
    return FitResult(
        state=released(run.state),
        best_params=params_of_user(run.state, best.get("params")),
        stop=run.stop,
        history=run.record.history,
        best_batch_stats=best.get("batch_stats"),
        interrupted=run.interrupt.requested,
        preempted=run.ending is Ending.PREEMPTED,
        origins=() if run.origins is None else tuple(run.origins.found),
        rewinds=tuple((s, then, why) for s, then, why in run.rewound.events),
        left_out=all_left_out(
            run.rewound.left_out,
            () if run.plan.rewind is None else as_ranges(run.plan.rewind.skip_steps),
            run.step + run.rewound.data_offset,
        ),
        ema_params=ema_params(run.state),
        average_params=average_params(run.state, run.stop),
    )
