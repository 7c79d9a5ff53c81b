"""Rewinds: `fit` returns to the best checkpoint of a run that has gone bad."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from optax_guard._checks import check_count, check_positive
from optax_guard._rows import replace_entries
from optax_guard.loops._checkpoint import Store
from optax_guard.loops._ending import why_gone_bad
from optax_guard.loops._learning_rate import lr_scales
from optax_guard.loops._result import Rewound, Snapshot
from optax_guard.stop._plateau import set_lr_scale
from optax_guard.stop._state import EarlyStopping, EarlyStoppingState


@dataclasses.dataclass(frozen=True)
class Rewind:
    """Lets `fit` return to the best checkpoint when a run has gone bad.

    A run has gone bad when the stopper stops it as DIVERGED, NONFINITE or SKIP_STORM,
    or when the guard is exhausted. The state becomes that of the best checkpoint, with
    the guard's records and the optimizer's own count. If there is no best, it becomes
    the first state. The stopper is reset and keeps its best. ``state.step`` never goes
    back, so the batches are new ones. Each rewind warns. When no rewind is left, the
    run ends as it would without rewinds.

    Args:
      times: Largest number of rewinds, over all resumptions of the run.
      lr_factor: Factor of each rewind on the learning rate. Unless it is 1, the
        optimizer needs a `stop.scale_by_plateau` in its chain.
      on_rewind: ``on_rewind(step) -> offset``, called with the steps done. From then on
        the batches are those of ``step + offset``, which may skip a bad window of the
        data. A new offset replaces the one before. Without this function it is 0.

    Raises:
      ValueError: If ``times`` is below 1, or ``lr_factor`` not above 0 and at most 1.

    Examples:
      >>> from optax_guard.flax import Rewind
      >>> Rewind(times=2, lr_factor=1.0, on_rewind=lambda step: 500).times
      2
    """

    times: int = 3
    lr_factor: float = 0.5
    on_rewind: Callable[[int], int] | None = None

    def __post_init__(self):
        """Checks the numbers."""
        check_count("times", self.times)
        check_positive("lr_factor", self.lr_factor)
        if self.on_rewind is not None and not callable(self.on_rewind):
            raise TypeError(
                f"`on_rewind` must be a function of the step, got {self.on_rewind!r}."
            )
        if self.lr_factor > 1:
            raise ValueError(f"`lr_factor` must be at most 1, got {self.lr_factor}.")


def check_rewind(rewind: Any, state: Any, batches: Any, stopper: Any, store: Any):
    """Refuses, before the first step, arguments that would fail at a rewind."""
    if not isinstance(rewind, Rewind):
        raise TypeError(f"`rewind` must be a `Rewind`, got {rewind!r}.")
    for name, other in (("checkpointer", store), ("stopper", stopper)):
        if other is None:
            raise ValueError(
                f"`rewind` needs `{name}`: it goes back to the best checkpoint."
            )
    if rewind.on_rewind is not None and not callable(batches):
        raise ValueError(
            "`on_rewind` needs `batches` to be a function `step -> batch`: an iterable "
            "takes no offset."
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
    if (message := why_gone_bad(flags, run.state)) is None:
        return None
    scales = lr_scales(run.state)
    offset = run.rewound.data_offset
    if rewind.on_rewind is not None:
        offset = _as_offset(rewind.on_rewind(run.step))
    rewound = Rewound(
        num_rewinds=run.rewound.num_rewinds + 1,
        # This includes the factor of a plateau, because its rule starts again at 1.
        lr_scale=float(scales[0]) * rewind.lr_factor if scales else 1.0,
        data_offset=offset,
    )
    then, state, stop = store.load_pinned(run.state, run.stop)
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
    warnings.warn(
        f"At step {run.step}, back to the checkpoint of step {then}, rewind "
        f"{rewound.num_rewinds} of {rewind.times}, with the learning rate times "
        f"{rewound.lr_scale:g} and batches of step + {offset}, because of {message}",
        stacklevel=5,  # The line that calls `fit`.
    )
    return state, stop, rewound


def _as_offset(offset: Any) -> int:
    try:
        return int(offset)
    except (TypeError, ValueError):
        raise TypeError(
            f"`on_rewind` must return a whole number of steps, got {offset!r}."
        ) from None
