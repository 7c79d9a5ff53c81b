"""Rewinds: `fit` returns to the best checkpoint of a run that has gone bad."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from optax_guard._checks import check_count, check_positive, static_count
from optax_guard._rows import replace_entries
from optax_guard.loops._ending import why_gone_bad
from optax_guard.loops._learning_rate import lr_scales
from optax_guard.loops._ranges import as_ranges
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.loops._store import Store
from optax_guard.loops._warning import warn_user
from optax_guard.stop._plateau import set_lr_scale
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


@dataclasses.dataclass(frozen=True)
class Rewind:
    """Lets `fit` return to the best checkpoint when a run has gone bad.

    A run has gone bad when the stopper stops it as DIVERGED, NONFINITE or SKIP_STORM,
    when the guard is exhausted, or, with ``max_rise``, when the value is so much worse
    than the best. The state becomes that of the best checkpoint, with
    the guard's records and the optimizer's own count. If there is no best, it becomes
    the first state. The stopper is reset and keeps its best. ``state.step`` never goes
    back, so the batches of the steps that are undone do not come again. Each rewind
    warns, and `FitResult.rewinds` tells all. When no rewind is left, the run goes on,
    and ends as it would without rewinds.

    Against a long row of bad batches use ``Rewind(lr_factor=1.0, max_rise=0.05,
    leave_out=64)``. A value that also rises because the model overfits uses rewinds up.
    If the bad batches are known, ``skip_steps`` leaves them out from the start, or
    after a restart from a checkpoint before them. `FitResult.left_out` tells all.

    Args:
      times: Largest number of rewinds, over all resumptions of the run.
      lr_factor: Factor of each rewind on the learning rate. Unless it is 1, the
        optimizer needs a `stop.scale_by_plateau` in its chain.
      max_rise: Largest rise of the stopper's value above the best, as a share of the
        best's magnitude, that is no reason to go back; for ``mode="max"`` largest fall.
        If ``None``, any rise passes.
      leave_out: How many batches more each rewind leaves out: after ``n`` rewinds the
        batch of a step is that of ``step + n * leave_out``.
      skip_steps: Ranges of batches that never come, as in ``[(1200, 1260)]``: those
        after a range move up, so that the batch of step 1200 is that of 1260. Or the
        name of a JSON file that holds such a list, read here.

    Raises:
      ValueError: If ``times`` is below 1, ``lr_factor`` not above 0 and at most 1,
        ``max_rise`` not positive, ``leave_out`` negative, or a range of ``skip_steps``
        is not two whole numbers, the second above the first.
      TypeError: If an argument is of the wrong kind.
      FileNotFoundError: If ``skip_steps`` names a file that does not exist.

    Examples:
      >>> from optax_guard.flax import Rewind
      >>> Rewind(times=2, lr_factor=1.0, max_rise=0.05, leave_out=64).times
      2
    """

    times: int = 3
    lr_factor: float = 0.5
    max_rise: float | None = None
    leave_out: int = 0
    skip_steps: Sequence[Sequence[int]] | str | os.PathLike[str] = ()

    def __post_init__(self):
        """Checks the numbers."""
        check_count("times", self.times)
        check_positive("lr_factor", self.lr_factor)
        if self.max_rise is not None:
            check_positive("max_rise", self.max_rise)
        static_count("leave_out", self.leave_out, least=0)
        if self.lr_factor > 1:
            raise ValueError(f"`lr_factor` must be at most 1, got {self.lr_factor}.")
        object.__setattr__(self, "skip_steps", as_ranges(self.skip_steps))


def check_rewind(rewind: Any, state: Any, batches: Any, stopper: Any, store: Any):
    """Refuses, before the first step, arguments that would fail at a rewind."""
    if not isinstance(rewind, Rewind):
        raise TypeError(f"`rewind` must be a `Rewind`, got {rewind!r}.")
    for name, other in (("checkpointer", store), ("stopper", stopper)):
        if other is None:
            raise ValueError(
                f"`rewind` needs `{name}`: it goes back to the best checkpoint."
            )
    if (rewind.leave_out or rewind.skip_steps) and not callable(batches):
        name = "leave_out" if rewind.leave_out else "skip_steps"
        raise ValueError(
            f"`{name}` needs `batches` to be a function `step -> batch`: an iterable "
            "has no batch of a given step."
        )
    if rewind.lr_factor != 1.0 and not lr_scales(state):
        raise ValueError(
            f"`lr_factor` is {rewind.lr_factor}, but the optimizer has no factor to "
            "change: put `stop.scale_by_plateau()` last in its chain, or give "
            "`lr_factor=1.0`."
        )


def go_back(
    rewind: Rewind,
    store: Store,
    stopper: EarlyStopping | None,
    run: Snapshot,
    flags: Mapping[str, Any],
) -> tuple[Any, EarlyStoppingState, Rewound] | None:
    """State and stopper of the best checkpoint, ready to train on from this step.

    The result is ``None`` if the run has not gone bad, or if no rewind is left.
    """
    if stopper is None or run.stop is None or run.rewound.num_rewinds >= rewind.times:
        return None
    message = why_gone_bad(flags, run.state) or _why_too_high(rewind, flags)
    if message is None:
        return None
    scales = lr_scales(run.state)
    # This includes the factor of a plateau, because its rule starts again at 1.
    lr_scale = float(scales[0]) * rewind.lr_factor if scales else 1.0
    offset = run.rewound.data_offset + rewind.leave_out
    left_out = [run.step + run.rewound.data_offset, run.step + offset]
    found = store.load_pinned(run.state, run.stop)
    if found is None:
        return None
    then, state, stop = found
    rewound = Rewound(
        num_rewinds=run.rewound.num_rewinds + 1,
        lr_scale=lr_scale,
        data_offset=offset,
        events=[*run.rewound.events, [run.step, then, message]],
        left_out=[*run.rewound.left_out, left_out],
    )
    state = state.replace(step=state.step + (run.step - then))
    if scales:
        opt_state = set_lr_scale(state.opt_state, rewound.lr_scale)
        state = state.replace(opt_state=opt_state)
    # The checkpoint holds the best. The bad evaluation may have set another.
    stop = replace_entries(
        stopper.reset(stop),
        num_evals=run.stop.num_evals,
        train_seconds=run.stop.train_seconds,
        train_seconds_rest=run.stop.train_seconds_rest,
    )
    warn_user(
        f"At step {run.step}, back to the checkpoint of step {then}, rewind "
        f"{rewound.num_rewinds} of {rewind.times}, with the learning rate times "
        f"{rewound.lr_scale:g} and batches of step + {offset}, because of {message}"
    )
    return state, stop, rewound


def _why_too_high(rewind: Rewind, flags: Mapping[str, Any]) -> str | None:
    """The rise of the value in words, if it is too large."""
    rise = float(flags["value_rise"])
    if rewind.max_rise is None or rise <= rewind.max_rise:
        return None
    return f"a value that is {100 * rise:.3g} % worse than the best"
