"""What is done to the runs of `verdicts.py`, and which findings are due for it."""

import math
import statistics
from typing import NamedTuple

from optax_guard.analysis import FindingCode

INF, NAN = math.inf, math.nan
Row = dict[str, float]


class Fault(NamedTuple):
    """Numbers of a run that may differ between members of a population.

    Rate and thresholds are in units of what suits the model; times in shares of the
    run. Batches from ``begin`` to ``end`` are bad, a share of them, in the ways told
    after it.
    """

    rate: float = 1.0
    decays: float = 1.0
    late_rate: float = 1.0
    growth: float = 1.0
    clip: float = INF
    clip_from: float = 0.0
    skip_above: float = INF
    begin: float = 0.0
    end: float = 0.0
    share: float = 1.0
    loss_factor: float = 1.0
    loss_offset: float = 0.0
    input_factor: float = 1.0
    shuffled: float = 0.0


class Treatment(NamedTuple):
    """What is done, which findings are due for it, and which are also true.

    Attributes:
      fault: The numbers.
      due: Findings without which the verdict is wrong. REGIME_SHIFT only counts as due
        if norms moved: those of 8 rows from the change on are 3 times those of the
        same run without it. LOSS_SPIKE_WITHOUT_NORM_SPIKE only if the norm of the
        first bad row is at most 3 times the median of the 20 rows before.
      true: Findings that follow from what was done; counted neither way.
      kind: ``clip`` by global norm, ``guard`` around that, or clip by ``value``.
      only: Models that it is done to; if empty, all without a treatment of their own.
      on_policy: Whether it is done to the policy, too, whose loss tells nothing.
      ends: How the record ends: where the run does, ``cut`` at a third, after ``four``
        rows, or where ``patience`` stops it on few validation examples.
      is_rate: Whether a rate is too high. Which finding is due, the rows say: EXPLODING
        if norms rise above 10 times their median before, RATE_TOO_HIGH otherwise.
        The other one is true.
    """

    fault: Fault
    due: frozenset[str] = frozenset()
    true: frozenset[str] = frozenset()
    kind: str = "clip"
    only: tuple[str, ...] = ()
    on_policy: bool = False
    ends: str = ""
    is_rate: bool = False


def codes(*names: str) -> frozenset[str]:
    return frozenset(str(FindingCode[name]) for name in names)


WORKS = codes("CLIPPING_WORKS")
# Of a run that was ruined, all of these may be true.
RUINED = codes(
    "EXPLODING", "RATE_TOO_HIGH", "REGIME_SHIFT", "VANISHING", "NONFINITE_PARAMETERS"
)
SHIFT = codes("REGIME_SHIFT")
SPIKE = codes("LOSS_SPIKE_WITHOUT_NORM_SPIKE")
# A batch of NaN that nothing keeps out ends all.
BROKEN = codes("NONFINITE_BATCH", "NONFINITE_PARAMETERS")
# As may these where norms are of another size for good.
OTHER_SCALE = codes("CLIPPING_WORKS", "OVER_CLIPPED")
UNTREATED = "healthy, clip at the typical norm"
TREATMENTS = {
    "healthy, no clip": Treatment(Fault(), on_policy=True),
    UNTREATED: Treatment(Fault(clip=1.0), WORKS),
    "healthy, 1 batch in 50 NaN, guarded": Treatment(
        Fault(clip=1.0, end=1.0, share=0.02, loss_factor=NAN),
        WORKS | codes("STEPS_SKIPPED"),
        kind="guard",
        on_policy=True,
    ),
    "healthy, 1 batch in 100 x 1e4, clipped": Treatment(
        Fault(clip=1.0, end=1.0, share=0.01, loss_factor=1e4), WORKS
    ),
    "healthy, learning rate / 10 midway": Treatment(
        Fault(decays=0.0, late_rate=0.1), true=codes("REGIME_SHIFT")
    ),
    "learning rate x 100, no clip": Treatment(
        Fault(rate=100.0), true=RUINED, is_rate=True, on_policy=True
    ),
    "learning rate x 100, clipped": Treatment(
        Fault(rate=100.0, clip=1.0),
        true=RUINED | codes("NONFINITE_LOSS_DESPITE_CLIPPING"),
        is_rate=True,
    ),
    "learning rate x 100 midway, no clip": Treatment(
        Fault(decays=0.0, late_rate=100.0), true=RUINED, is_rate=True, on_policy=True
    ),
    "learning rate x 1000 by and by": Treatment(
        Fault(decays=0.0, growth=1000.0), true=RUINED, is_rate=True
    ),
    "NaN batch, no clip": Treatment(
        Fault(begin=0.5, end=0.52, loss_factor=NAN), BROKEN, on_policy=True
    ),
    "NaN batch, clipped": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, loss_factor=NAN),
        BROKEN | codes("NONFINITE_LOSS_DESPITE_CLIPPING"),
    ),
    "clip 100 times too tight": Treatment(Fault(clip=0.01), codes("OVER_CLIPPED")),
    "clip 100 times too loose": Treatment(
        Fault(clip=100.0), codes("NEVER_CLIPPED"), on_policy=True
    ),
    "clip turned on after bad batches": Treatment(
        Fault(clip=1.0, clip_from=0.5, begin=0.3, end=0.34, loss_factor=100.0),
        codes("CLIPPED_TOO_LATE"),
        RUINED | OTHER_SCALE | codes("NONFINITE_LOSS_DESPITE_CLIPPING"),
    ),
    "values clipped far too tight": Treatment(
        Fault(clip=1e-5),
        codes("DIRECTION_DISTORTED"),
        codes("OVER_CLIPPED"),
        kind="value",
    ),
    "half of the batches NaN, guarded": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, share=0.5, loss_factor=NAN),
        codes("SKIP_STORM"),
        WORKS | codes("STEPS_SKIPPED"),
        kind="guard",
        on_policy=True,
    ),
    "skips above 0.7 of the typical norm": Treatment(
        Fault(skip_above=0.7),
        codes("SKIP_STORM"),
        codes("STEPS_SKIPPED"),
        kind="guard",
    ),
    "labels shuffled for a while": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, shuffled=1.0),
        codes("LOSS_SPIKE_WITHOUT_NORM_SPIKE"),
        WORKS,
    ),
    "loss misread by 2 nats for a while": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, loss_offset=2.0),
        codes("LOSS_SPIKE_WITHOUT_NORM_SPIKE"),
        WORKS,
    ),
    "loss x 5 from midway": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, loss_factor=5.0),
        codes("REGIME_SHIFT"),
        OTHER_SCALE,
    ),
    "inputs x 3 from midway": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, input_factor=3.0),
        codes("REGIME_SHIFT"),
        OTHER_SCALE,
    ),
    "cut off at a third": Treatment(Fault(rate=0.3, decays=0.0), ends="cut"),
    "patience 3 on 16 examples": Treatment(
        Fault(rate=0.3, decays=0.0),
        codes("SHORT_PATIENCE"),
        ends="patience",
    ),
    "recorded for 4 rows": Treatment(
        Fault(), codes("TOO_FEW_ROWS"), on_policy=True, ends="four"
    ),
    "12 layers, weights a tenth": Treatment(
        Fault(), codes("VANISHING"), only=("tiny weights",)
    ),
    "12 sigmoid layers": Treatment(
        Fault(), codes("VANISHING"), only=("sigmoid layers",)
    ),
}
# Runs of `generalization.py` to their end.
TOO_LONG_TITLE = "trained too long"
TOO_LONG = Treatment(Fault(), codes("OVERFITTING"))


def findings_of(
    title: str, subject: str, rows: list[Row], untreated: list[Row]
) -> tuple[frozenset[str], frozenset[str]]:
    """Which findings are due for a run, and which are true.

    Args:
      title: What was done.
      subject: The model.
      rows: Its record.
      untreated: The record of the same run with a clip and nothing else.
    """
    treatment = {**TREATMENTS, TOO_LONG_TITLE: TOO_LONG}[title]
    due, true = treatment.due, treatment.true
    norms = [row.get("grad_norm", NAN) for row in rows]
    half = len(rows) // 2
    if treatment.is_rate:
        is_late = treatment.fault.late_rate > 1 or treatment.fault.growth > 1
        first = half if is_late else 1
        has_risen = _is_above(10, norms[first:], norms[:first])
        due |= codes("EXPLODING" if has_risen else "RATE_TOO_HIGH")
    if due & SHIFT and not _has_moved(rows[half : half + 8], untreated):
        due, true = due - SHIFT, true | SHIFT
    if due & SPIKE and _is_above(3, norms[half : half + 1], norms[half - 20 : half]):
        due, true = due - SPIKE, true | SPIKE
    if subject == "policy":
        due -= WORKS
        num_zero = sum(norm == 0 for norm in norms)
        if len(norms) >= 20 and num_zero >= 0.1 * len(norms):
            due |= codes("ZERO_GRADIENTS")
        elif num_zero:
            true |= codes("ZERO_GRADIENTS")
    return due, true - due


def _is_above(times: float, norms: list[float], before: list[float]) -> bool:
    known = [x for x in before if math.isfinite(x) and x > 0]
    return bool(known) and max(norms) > times * statistics.median(known)


def _has_moved(rows: list[Row], untreated: list[Row]) -> bool:
    without = {row["step"]: row["grad_norm_mean"] for row in untreated}
    return (
        statistics.median(row["grad_norm_mean"] / without[row["step"]] for row in rows)
        >= 3
    )
