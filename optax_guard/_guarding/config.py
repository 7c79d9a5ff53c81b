"""The arguments of ``guard``, checked."""

from typing import Any

import optax

from optax_guard._checks import check_count, check_flag
from optax_guard._clipping.global_norm import clip_by_global_norm, record_norm
from optax_guard._clipping.parts import ClipParts
from optax_guard._guarding.judging import as_rules
from optax_guard._guarding.masking import counting_only
from optax_guard._guarding.state import GuardConfig
from optax_guard._norms.mesh_axes import AxisName
from optax_guard._transformation import parts_of, with_extra_args
from optax_guard.stop._state import EarlyStopping
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._coerce import as_threshold


def checked_config(
    inner: Any,
    clip: Any,
    *,
    skip: Any,
    mask: Any,
    max_update: Any,
    max_consecutive_skips: Any,
    use_cond: Any,
) -> GuardConfig:
    """The configuration of a guard, from arguments that may be wrong."""
    _check_inner(inner)
    check_count("max_consecutive_skips", max_consecutive_skips)
    check_flag("use_cond", use_cond)
    parts, bound = _clip_parts("clip", clip), None
    if max_update is not None:
        bound = _clip_parts("max_update", max_update, parts.axis_name)
    if mask is not True:
        parts = counting_only(mask, parts)
        bound = bound and counting_only(mask, bound)
    return GuardConfig(
        inner=with_extra_args(inner),
        clip=parts,
        is_clipping=clip is not None,
        rules=as_rules(skip),
        mask=mask,
        bound=bound,
        max_consecutive_skips=max_consecutive_skips,
        use_cond=use_cond,
    )


def _check_inner(inner: Any) -> None:
    # A stopper and a threshold have such methods too, for other things.
    is_other = isinstance(inner, EarlyStopping | Threshold)
    names = ("init", "update")
    if is_other or not all(callable(getattr(inner, name, None)) for name in names):
        raise TypeError(
            "`inner` must be an optax transformation such as `optax.adamw(1e-3)`, got "
            f"{inner!r} of type {type(inner).__name__}."
        )


def _clip_parts(name: str, clip: Any, axis_name: AxisName = None) -> ClipParts:
    """The parts of the clip that was given as ``clip=`` or ``max_update=``."""
    if clip is None:
        tx = record_norm()
    elif isinstance(clip, optax.GradientTransformation):
        tx = clip
    else:
        tx = clip_by_global_norm(as_threshold(name, clip), axis_name=axis_name)
    parts = parts_of(tx, ClipParts)
    if parts is None:
        inside = {"clip": "clip, optimizer", "max_update": "optimizer, clip"}[name]
        raise TypeError(
            f"`{name}` must be a number, a schedule, a threshold or one of this "
            "library's own clips, got another transformation. Put that one inside: "
            f"`guard(optax.chain({inside}))`; the guard then only measures."
        )
    return parts
