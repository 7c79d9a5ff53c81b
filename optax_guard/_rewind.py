"""What `fit` does about a run that has gone bad: it raises, or goes back."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optax

from optax_guard._base import check_count, check_positive
from optax_guard._checkpoint import Rewound, Run, Store
from optax_guard._early_stopping import EarlyStopping, EarlyStoppingState, StopReason
from optax_guard._guarding import GuardState
from optax_guard._readout import GuardExhaustedError, raise_if_exhausted, rejections
from optax_guard._states import find_states
from optax_guard._stop_plateau import PlateauState, apply_plateau, set_lr_scale

# Stops that mean that training went wrong, not that it is done.
_GONE_BAD = {StopReason.DIVERGED, StopReason.NONFINITE, StopReason.SKIP_STORM}
# What `raise_if_exhausted` reads.
_EXHAUSTION = ("guard_exhausted", "skip_reason", "skip_streak")


@dataclasses.dataclass(frozen=True)
class Rewind:
    """Lets `fit` go back to the best checkpoint when a run has gone bad.

    That is when the machine stops it as DIVERGED, NONFINITE or SKIP_STORM, or when the
    guard is exhausted. The state becomes that of the best checkpoint, or of the first
    step as long as there is none, with the guard's records and the optimizer's own
    count; the machine is reset and keeps its best. ``state.step`` goes on and never
    back, so the batches are new ones. Each rewind warns, and when all are used up the
    run ends as it would have without.

    Args:
      times: Rewinds at most, over all resumptions of the run.
      lr_factor: What each rewind multiplies the learning rate with. Unless it is 1, the
        optimizer needs a `stop.scale_by_plateau` in its chain.
      on_rewind: ``on_rewind(step) -> offset``, called with the steps done; from then on
        batches are asked for ``step + offset``, which may skip a bad window. An offset
        replaces the one before; without this it stays 0.

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
    """Refuses, before the first step, what would fail at a rewind."""
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
            "cannot be moved."
        )
    if rewind.lr_factor != 1.0 and not _lr_scales(state):
        raise ValueError(
            f"`lr_factor` is {rewind.lr_factor}, but the optimizer has no factor to "
            "change: put `stop.scale_by_plateau()` last in its chain, or give "
            "`lr_factor=1.0`."
        )


def _trouble(flags: Mapping[str, Any], state: Any) -> str | None:
    """What went wrong, in words, or None."""
    if flags.get("should_stop", False):
        reason = int(flags["stop_reason"])
        if reason not in _GONE_BAD:
            return None
        return f"{StopReason(reason).name}: {StopReason(reason).message}"
    exhaustion = {k: v for k, v in flags.items() if k.startswith(_EXHAUSTION)}
    if not exhaustion:
        return None
    try:
        raise_if_exhausted(exhaustion)
    except GuardExhaustedError as error:
        return "\n".join([str(error), *_last_rejections(state)])
    return None


def is_over(flags: Mapping[str, Any], state: Any) -> bool:
    """Whether the machine stops the run. If it does not, an exhausted guard raises."""
    if flags.get("should_stop", False):
        return True
    if (message := _trouble(flags, state)) is not None:
        raise GuardExhaustedError(message)
    return False


def flags_of_guard(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the metrics that tell of exhaustion."""
    return {k: v for k, v in totals.items() if k.startswith(_EXHAUSTION)}


def go_back(
    rewind: Rewind,
    store: Store,
    stopper: EarlyStopping | None,
    run: Run,
    flags: Mapping[str, Any],
) -> tuple[Any, EarlyStoppingState, Rewound] | None:
    """State and machine of the best checkpoint, made ready to go on at this step.

    ``None`` if the run has not gone bad, or no rewind is left.
    """
    if stopper is None or run.stop is None or run.rewound.num_rewinds >= rewind.times:
        return None
    if (message := _trouble(flags, run.state)) is None:
        return None
    scales = _lr_scales(run.state)
    offset = run.rewound.data_offset
    if rewind.on_rewind is not None:
        offset = _as_offset(rewind.on_rewind(run.step))
    rewound = Rewound(
        num_rewinds=run.rewound.num_rewinds + 1,
        # With all that a plateau has come to, for its rule starts afresh.
        lr_scale=float(scales[0]) * rewind.lr_factor if scales else 1.0,
        data_offset=offset,
    )
    then, state, stop = store.load_pinned(run.state, run.stop)
    state = state.replace(step=state.step + (run.step - then))
    if scales:
        opt_state = set_lr_scale(state.opt_state, rewound.lr_scale)
        state = state.replace(opt_state=opt_state)
    # The best is that of the checkpoint: the evaluation that failed may have set one.
    stop = stopper.reset(stop)._replace(
        num_evals=run.stop.num_evals, train_seconds=run.stop.train_seconds
    )
    warnings.warn(
        f"At step {run.step}, back to the checkpoint of step {then}, rewind "
        f"{rewound.num_rewinds} of {rewind.times}, with the learning rate times "
        f"{rewound.lr_scale:g} and batches of step + {offset}, because of {message}",
        stacklevel=3,
    )
    return state, stop, rewound


def with_plateau(state: Any, stop: EarlyStoppingState, rewound: Rewound) -> Any:
    """Hands the factor that a `stop.plateau` has come to on to the optimizer."""
    if not find_states(stop.rule_state, PlateauState):
        return state
    opt_state = apply_plateau(state.opt_state, stop)
    if rewound.lr_scale != 1.0:
        scale = optax.tree.get_all_with_path(opt_state, "lr_scale")[0][1]
        opt_state = set_lr_scale(opt_state, scale * rewound.lr_scale)
    return state.replace(opt_state=opt_state)


def _lr_scales(state: Any) -> list[Any]:
    return [x for _, x in optax.tree.get_all_with_path(state.opt_state, "lr_scale")]


def _as_offset(offset: Any) -> int:
    try:
        return int(offset)
    except (TypeError, ValueError):
        raise TypeError(
            f"`on_rewind` must return a whole number of steps, got {offset!r}."
        ) from None


def _last_rejections(state: Any) -> list[str]:
    guards = find_states(state, GuardState)
    # Among several guards, each may have seen a part of the parameters only.
    params = state.params if len(guards) == 1 else None
    return [
        "Rejected last:",
        *(
            f"  update {r.update}: {r.reason.name}, norm {r.grad_norm:.4g}, loss "
            f"{r.value:.4g}" + (f", first in {r.leaf}" if r.leaf is not None else "")
            for guard in guards
            for r in rejections(guard, params)
        ),
    ]
