"""The findings of a diagnosis: their codes, severities, meanings and advice."""

import enum
import math
from typing import Any, NamedTuple

# Numbers by name, and a few words.
Evidence = dict[str, float | str]


class Severity(enum.StrEnum):
    """How bad a finding is: "info", "warning" or "error"."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class FindingCode(enum.StrEnum):
    """The kind of a finding. Reports store the names, so that no name ever changes.

    Attributes:
      severity: How bad it is.
      meaning: A sentence that says what it means.
      advice: Sentences that say what to try.
    """

    severity: Severity
    meaning: str
    advice: str

    # It has defaults because mypy checks `FindingCode("EXPLODING")` as a call of it.
    def __new__(
        cls,
        code: str,
        severity: Severity = Severity.INFO,
        meaning: str = "",
        advice: str = "",
    ) -> "FindingCode":
        """Attaches meaning and advice to the name."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.severity = severity
        member.meaning = meaning
        member.advice = advice
        return member

    CLIPPING_WORKS = (
        "CLIPPING_WORKS",
        Severity.INFO,
        "Clipping works: it bounds large gradients, and the loss falls.",
        "Change nothing. If few steps are clipped by now, keep the threshold as "
        "insurance.",
    )
    EXPLODING = (
        "EXPLODING",
        Severity.ERROR,
        "Gradients explode: norms rose far above the typical one, and the loss got "
        "worse or was lost.",
        "Clip by global norm, at about the norm of healthy steps (`guard(tx, "
        "clip=...)`). Lower the learning rate or warm it up. If norms are clipped "
        "already, the learning rate is too high, or the loss is wrong.",
    )
    OVER_CLIPPED = (
        "OVER_CLIPPED",
        Severity.WARNING,
        "Nearly all steps are clipped, to much less than their norm.",
        "If the loss falls too slowly, raise the threshold to about the norm of a "
        "typical step, or let it follow the norms (`threshold.zscore`, "
        "`threshold.quantile`). Adam and its kin divide the scale of the gradients "
        "out, so that with them a constant factor does little.",
    )
    NEVER_CLIPPED = (
        "NEVER_CLIPPED",
        Severity.INFO,
        "No step was clipped: the threshold is so high that it bounds extreme steps "
        "only.",
        "Lower the threshold to just above the largest norm of a healthy step, or "
        "keep it as insurance.",
    )
    VANISHING = (
        "VANISHING",
        Severity.WARNING,
        "Gradients are tiny, of the whole run or of some layers, while the loss "
        "hardly falls.",
        "Clipping does not help: it only shrinks gradients. Find the layers by their "
        "norms (`analysis.leaf_columns`): some may be saturated, cut off "
        "(`stop_gradient`), or begin at a scale that is too small. In float16, raise "
        "the scale of the loss.",
    )
    NONFINITE_LOSS_DESPITE_CLIPPING = (
        "NONFINITE_LOSS_DESPITE_CLIPPING",
        Severity.ERROR,
        "The loss is not finite although norms are clipped: clipping is not enough.",
        "Lower the threshold or the learning rate. Look for a bug: a log or a division "
        "by zero, overflow in float16, a broken batch. `guard` skips steps with "
        "non-finite gradients, and `skipped_steps(opt_state, params)` names the leaf.",
    )
    NONFINITE_BATCH = (
        "NONFINITE_BATCH",
        Severity.WARNING,
        "Steps were not finite though norms were calm before: the input or the "
        "numerics are at fault, not the learning rate.",
        "Skip such steps: `guard(tx)`; `skipped_steps(opt_state, params)` then names "
        'the leaf, and `fit(on_skip="explain")` the operation. Look at the batch of '
        "that step, and for a log or a division by zero.",
    )
    STEPS_SKIPPED = (
        "STEPS_SKIPPED",
        Severity.INFO,
        "The guard skipped steps, and the parameters stayed as they were.",
        "A few are its purpose. `skipped_steps(opt_state, params)` tells step, norm, "
        "reason and leaf of the last ones.",
    )
    ZERO_GRADIENTS = (
        "ZERO_GRADIENTS",
        Severity.INFO,
        "Some steps had a gradient of exactly zero: they taught nothing.",
        "If advantages are taken within groups, as in GRPO, these are groups of equal "
        "rewards: mix in prompts that are neither always nor never solved, or make "
        "groups larger. Otherwise look for a mask that hides all of the loss.",
    )
    NONFINITE_PARAMETERS = (
        "NONFINITE_PARAMETERS",
        Severity.ERROR,
        "Since that step nothing has been finite: the parameters are lost.",
        "Go back to a checkpoint from before it. Training on does not help. "
        "`guard(tx)` keeps steps that are not finite out of the parameters.",
    )
    RATE_TOO_HIGH = (
        "RATE_TOO_HIGH",
        Severity.ERROR,
        "Steps are too large: the loss is worse than before them, and norms do not "
        "tell it.",
        "Lower the learning rate by 3 to 10 times, or warm it up. `guard(tx, "
        "max_update=...)` bounds each step relative to the parameters. Go back to a "
        "checkpoint from before that step.",
    )
    TOO_FEW_ROWS = (
        "TOO_FEW_ROWS",
        Severity.INFO,
        "There are too few rows to judge the run.",
        "Log more often, or wait.",
    )
    LOSS_SPIKE_WITHOUT_NORM_SPIKE = (
        "LOSS_SPIKE_WITHOUT_NORM_SPIKE",
        Severity.WARNING,
        "The loss jumped while gradient norms were calm. The cause is the data or a "
        "bug, not the gradients.",
        "Look at the batches of these steps: labels and preprocessing. Look at the "
        "loss function. Clipping does not help here.",
    )
    DIRECTION_DISTORTED = (
        "DIRECTION_DISTORTED",
        Severity.WARNING,
        "Clipping by value turns the steps away from the gradient.",
        "Clip by global norm, which keeps the direction, or raise `max_value`.",
    )
    CLIPPED_TOO_LATE = (
        "CLIPPED_TOO_LATE",
        Severity.WARNING,
        "Clipping began after the run had become unstable. Parameters and the "
        "optimizer's moments are damaged already.",
        "Clip from the first step. For this run, go back to a checkpoint from before "
        "that.",
    )
    SKIP_STORM = (
        "SKIP_STORM",
        Severity.ERROR,
        "The guard skips a large share of the steps: the model hardly learns.",
        "`skipped_steps(opt_state, params)` tells the reason and the leaf. If it is "
        "non-finite gradients, there is a bug, or the parameters are bad already: go "
        "back to a checkpoint. If it is spikes, the skip rule is too strict or the "
        "learning rate too high.",
    )
    REGIME_SHIFT = (
        "REGIME_SHIFT",
        Severity.INFO,
        "Gradient norms moved to another level, and stayed there for 8 rows.",
        "Look for a change at that step: data, learning rate, an unfrozen layer. A "
        "fixed threshold may no longer fit; one that follows the norms does "
        "(`threshold.zscore`).",
    )
    OVERFITTING = (
        "OVERFITTING",
        Severity.WARNING,
        "The validation loss rises while the training loss falls.",
        "Use the parameters of the best evaluation (`early_stopping(stop.patience(5))` "
        "keeps them). Regularize, add data, or make the model smaller.",
    )
    SHORT_PATIENCE = (
        "SHORT_PATIENCE",
        Severity.INFO,
        "The run ended after some evaluations without a better one, while under their "
        "noise the loss was still falling.",
        "Raise the patience, smooth the value (`smooth=stop.ema(...)`), or evaluate "
        "on more data.",
    )


class Finding(NamedTuple):
    """One finding of `diagnose`.

    Attributes:
      code: The kind of finding.
      severity: How bad it is.
      evidence: The numbers that show it, by name; ``phase`` and ``leaf`` are words.
      advice: Sentences that say what to try.
      step: Step of the row at which it first held.
    """

    code: FindingCode
    severity: Severity
    evidence: Evidence
    advice: str
    step: int

    def numbers(self) -> str:
        """The evidence in one line."""
        return ", ".join(
            f"{name.replace('_', ' ')} {_as_text(value)}"
            for name, value in self.evidence.items()
        )

    def __str__(self) -> str:
        return (
            f"{self.severity.upper()} {self.code} (step {self.step}): "
            f"{self.code.meaning} [{self.numbers()}] Try: {self.advice}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The finding for strict JSON; numbers that are not finite are strings."""
        return {
            "code": str(self.code),
            "severity": str(self.severity),
            "step": self.step,
            "meaning": self.code.meaning,
            "evidence": {
                name: _as_text(value) if _is_nonfinite(value) else value
                for name, value in self.evidence.items()
            },
            "advice": self.advice,
        }


def _is_nonfinite(value: float | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _as_text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
