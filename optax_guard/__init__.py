"""The safety layer of a JAX training step: clip, guard, watch, stop, explain."""

import importlib
from typing import TYPE_CHECKING

from optax_guard import skip, stop, threshold
from optax_guard._clipping.global_norm import ClipByNormState as ClipByNormState
from optax_guard._clipping.global_norm import RecordNormState as RecordNormState
from optax_guard._clipping.global_norm import clip_by_global_norm, record_norm
from optax_guard._clipping.groups import ClipByGroupNormState as ClipByGroupNormState
from optax_guard._clipping.groups import ClipByLeafNormState as ClipByLeafNormState
from optax_guard._clipping.groups import clip_by_group_norm, clip_by_leaf_norm
from optax_guard._clipping.presets import adagc, autoclip, zclip
from optax_guard._clipping.units import ClipByUnitNormState as ClipByUnitNormState
from optax_guard._clipping.units import clip_by_unit_norm
from optax_guard._clipping.value import ClipByValueState as ClipByValueState
from optax_guard._clipping.value import clip_by_value
from optax_guard._guarding.accumulate_state import AccumulateState as AccumulateState
from optax_guard._guarding.accumulation import accumulate
from optax_guard._guarding.adoption import unwrap_state, wrap_state
from optax_guard._guarding.auto import auto
from optax_guard._guarding.exhaustion import GuardExhaustedError, raise_if_exhausted
from optax_guard._guarding.guard import guard
from optax_guard._guarding.readout import metrics
from optax_guard._guarding.skip_readout import SkippedStep as SkippedStep
from optax_guard._guarding.skip_readout import skipped_steps
from optax_guard._guarding.state import GuardState as GuardState
from optax_guard._guarding.state import SkipLog as SkipLog
from optax_guard._guarding.step import apply_gradients
from optax_guard._guarding.undoing import keep_if_skipped
from optax_guard._guarding.update_bound import UpdateBoundState as UpdateBoundState
from optax_guard._norms.readout import leaf_norms, norm_quantile
from optax_guard._norms.statistics import GroupStats as GroupStats
from optax_guard._norms.statistics import NormStats as NormStats
from optax_guard._public import publish
from optax_guard._trees import find_state, find_states
from optax_guard.skip import SkipReason
from optax_guard.stop._explain import explain
from optax_guard.stop._rule import StopReason
from optax_guard.stop._state import EarlyStopping as EarlyStopping
from optax_guard.stop._state import EarlyStoppingState as EarlyStoppingState
from optax_guard.stop._stopper import early_stopping

__all__ = [
    "GuardExhaustedError",
    "SkipReason",
    "StopReason",
    "accumulate",
    "adagc",
    "apply_gradients",
    "auto",
    "autoclip",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_unit_norm",
    "clip_by_value",
    "early_stopping",
    "explain",
    "find_state",
    "find_states",
    "guard",
    "keep_if_skipped",
    "leaf_norms",
    "metrics",
    "norm_quantile",
    "raise_if_exhausted",
    "record_norm",
    "skip",
    "skipped_steps",
    "stop",
    "threshold",
    "unwrap_state",
    "wrap_state",
    "zclip",
]
# Classes that are met in states and never constructed by users.
_STATES = [
    "AccumulateState",
    "ClipByGroupNormState",
    "ClipByLeafNormState",
    "ClipByNormState",
    "ClipByUnitNormState",
    "ClipByValueState",
    "EarlyStopping",
    "EarlyStoppingState",
    "GroupStats",
    "GuardState",
    "NormStats",
    "RecordNormState",
    "SkipLog",
    "SkippedStep",
    "UpdateBoundState",
]


# They need further packages, or take time to import.
_ON_FIRST_USE = ["analysis", "debug", "flax", "loops", "plotting"]

if TYPE_CHECKING:
    from optax_guard import analysis as analysis
    from optax_guard import debug as debug
    from optax_guard import flax as flax
    from optax_guard import loops as loops
    from optax_guard import plotting as plotting
else:

    def __getattr__(name: str):
        """Imports a module when it is first used."""
        if name in _ON_FIRST_USE:
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ImportError as error:  # `hasattr` and `help` go on without it.
                raise AttributeError(str(error)) from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_STATES, *_ON_FIRST_USE]


publish(__name__, _STATES)
