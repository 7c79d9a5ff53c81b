"""Who takes part, and the settings that each may try: the first is the usual one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from benchmarks import _peers
from benchmarks._update_bound import Scope, bound_update
from benchmarks.neutral import _published


class Run(NamedTuple):
    """What a contender may know of a run; arrays may be traced."""

    optimizer: optax.GradientTransformation
    learning_rate: Any
    num_steps: Any
    most_steps: int


class Contender(NamedTuple):
    """A rule.

    Attributes:
      build: From a run and one setting's numbers to the whole transformation.
      settings: Numbers, float[settings, numbers].
      meaning: Of these numbers.
      is_for_sgd: Whether it is defined for SGD.
    """

    build: Callable[..., optax.GradientTransformation]
    settings: tuple[tuple[float, ...], ...]
    meaning: str
    is_for_sgd: bool = True


def _before(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A contender that changes gradients before the optimizer, by its numbers."""
    return lambda run, *numbers: optax.chain(rule(*numbers), run.optimizer)


def _autoclip(run: Run, percentile: Any) -> Any:
    return optax.chain(_published.autoclip(percentile, run.most_steps), run.optimizer)


def _aggc(run: Run, high: Any) -> Any:
    return optax.chain(_published.aggc(high, run.num_steps), run.optimizer)


def _larc(run: Run, trust: Any) -> Any:
    return optax.chain(_published.larc(trust, run.learning_rate), run.optimizer)


def _stable_adam(run: Run, limit: Any, decay: Any) -> Any:
    return _published.stable_adam(run.learning_rate, limit, decay)


def _olmo(run: Run, sigma: Any, max_norm: Any) -> Any:
    """OLMo-core's SkipStep around a clip, as in its own configurations."""
    clipped = optax.chain(optax.clip_by_global_norm(max_norm), run.optimizer)
    return _peers.olmo(clipped, sigma=sigma)


def _maxtext(run: Run, sigma: Any, max_norm: Any) -> Any:
    """MaxText's skip, which sees clipped gradients."""
    clip = optax.clip_by_global_norm(max_norm)
    return optax.chain(clip, _peers.maxtext(run.optimizer, sigma=sigma))


def _bounded(scope: Scope) -> Callable[..., Any]:
    def build(run: Run, max_norm: Any, start: Any, floor: Any) -> Any:
        clip = optax.clip_by_global_norm(max_norm)
        bound = bound_update(scope, start, floor)
        return optax.chain(clip, run.optimizer, bound)

    return build


_OURS = (1.0, 0.1, 0.01), (1.0, 0.03, 0.003), (1.0, 0.3, 0.03), (0.1, 0.1, 0.01)
_OURS_ARE = "clip, start and floor of the bound"
_SKIPS = (6.0, 1.0), (3.0, 1.0), (6.0, 0.1), (3.0, 0.1)
_SKIPS_ARE = "sigmas, clip"

# The first of those that are cut off if time runs out stand last.
CONTENDERS = {
    "unclipped": Contender(lambda run: run.optimizer, ((),), ""),
    "fixed clip": Contender(
        _before(optax.clip_by_global_norm), ((1.0,), (0.1,), (0.3,), (3.0,)), "norm"
    ),
    "ours, by leaf": Contender(_bounded("leaf"), _OURS, _OURS_ARE),
    "ours, by tree": Contender(_bounded("tree"), _OURS, _OURS_ARE),
    "AGC": Contender(
        _before(optax.adaptive_grad_clip),
        ((0.01,), (0.003,), (0.03,), (0.1,)),
        "ratio to the parameters, by unit",
    ),
    "AutoClip": Contender(_autoclip, ((10.0,), (1.0,), (50.0,), (90.0,)), "percentile"),
    "ZClip": Contender(
        _before(lambda z, cap: _peers.zclip(z, max_grad_norm=cap)),
        ((2.5, 1.0), (1.5, 1.0), (2.5, 0.1), (1.5, 0.1)),
        "z, cap",
    ),
    "AdaGC": Contender(
        _before(_published.adagc),
        ((1.05, 1.0), (1.02, 1.0), (1.05, 0.1), (1.02, 0.1)),
        "relative, absolute",
    ),
    "AGGC": Contender(
        _aggc, ((0.7,), (0.5,), (1.0,), (1.4,)), "upper side of the band"
    ),
    "LARC": Contender(_larc, ((0.02,), (0.001,), (0.005,), (0.1,)), "trust"),
    "OLMo": Contender(_olmo, _SKIPS, _SKIPS_ARE),
    "MaxText": Contender(_maxtext, _SKIPS, _SKIPS_ARE),
    "SPAM's clip": Contender(
        _before(_published.spam_clip),
        ((5000.0,), (50.0,), (500.0,), (50_000.0,)),
        "threshold",
        is_for_sgd=False,
    ),
    "StableAdamW": Contender(
        _stable_adam,
        ((1.0, 0.99), (0.5, 0.99), (1.0, 0.95), (0.5, 0.95)),
        "d, second beta",
        is_for_sgd=False,
    ),
}

# Of the second round only; see the plan.
SECOND = {
    "ours, joint": Contender(
        _bounded("joint"),
        ((1.0, 0.2, 0.01), (1.0, 0.1, 0.005), (1.0, 0.4, 0.02), (0.1, 0.2, 0.01)),
        _OURS_ARE,
    ),
    "ours, sum": Contender(
        _bounded("sum"),
        ((1.0, 0.5, 0.025), (1.0, 0.25, 0.012), (1.0, 1.0, 0.05), (0.1, 0.5, 0.025)),
        _OURS_ARE,
    ),
}
