"""What a diagnosis can find: codes, how bad they are, and what to try."""

import enum
import math
from typing import Any, NamedTuple


class Severity(enum.StrEnum):
    """How bad a finding is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class FindingCode(enum.StrEnum):
    """What was found. Names are written into reports: one is never renamed.

    Attributes:
      severity: How bad it is.
      meaning: What it means.
      advice: What to try.
    """

    severity: Severity
    meaning: str
    advice: str

    # Defaults, because mypy checks `FindingCode("EXPLODING")` as a call of this.
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
        "Nothing to change. If hardly a step is clipped any more, the threshold is now "
        "insurance; keep it.",
    )
    EXPLODING = (
        "EXPLODING",
        Severity.ERROR,
        "Gradients explode: norms are far beyond what was typical, or not finite, and "
        "the loss is no better for it.",
        "Clip by global norm, at about the norm that healthy steps have "
        "(`guard(tx, clip=...)`), and lower the learning rate or warm it up. If norms "
        "are clipped already, the learning rate is too high, or the loss is wrong.",
    )
    OVER_CLIPPED = (
        "OVER_CLIPPED",
        Severity.WARNING,
        "Nearly all steps are clipped, and to much less than their norm: the threshold "
        "is too tight, steps become tiny, and convergence slow.",
        "Raise the threshold to about the norm of a typical step, or let it follow the "
        "norms (`threshold.zscore`, `threshold.quantile`). In a warm-up, a schedule of "
        "the threshold that starts high is enough.",
    )
    NEVER_CLIPPED = (
        "NEVER_CLIPPED",
        Severity.INFO,
        "No step was clipped: the threshold is so high that it protects from nothing "
        "but extremes.",
        "Lower the threshold to a little above the largest norm of a healthy step, or "
        "leave it as insurance on purpose.",
    )
    VANISHING = (
        "VANISHING",
        Severity.WARNING,
        "Gradients vanish while the loss hardly falls.",
        "Clipping does not cure this, it only shrinks. Try residual or gated "
        "connections, normalisation, another initial scale or activation, and look for "
        "layers that are saturated or cut off (`stop_gradient`).",
    )
    NONFINITE_LOSS_DESPITE_CLIPPING = (
        "NONFINITE_LOSS_DESPITE_CLIPPING",
        Severity.ERROR,
        "The loss is not finite although norms are clipped: clipping is not enough.",
        "Lower the threshold or the learning rate, and look for the bug: a log or a "
        "division by zero, overflow in float16, a broken batch. `guard` skips "
        "steps with non-finite gradients, and `skipped_steps(opt_state, params)` names "
        "the leaf.",
    )
    LOSS_SPIKE_WITHOUT_NORM_SPIKE = (
        "LOSS_SPIKE_WITHOUT_NORM_SPIKE",
        Severity.WARNING,
        "The loss jumped while gradient norms were calm: data or a bug, not gradients.",
        "Look at the batches of these steps, at labels, preprocessing and the loss "
        "itself. Clipping does not help here.",
    )
    DIRECTION_DISTORTED = (
        "DIRECTION_DISTORTED",
        Severity.WARNING,
        "Clipping by value turns the steps away from the gradient.",
        "Clip by global norm instead, which keeps the direction, or raise `max_value`.",
    )
    CLIPPED_TOO_LATE = (
        "CLIPPED_TOO_LATE",
        Severity.WARNING,
        "Clipping began after the run had become unstable: parameters and the "
        "optimizer's moments have taken the damage already.",
        "Clip from the first step; for this run, go back to a checkpoint from before "
        "the instability.",
    )
    SKIP_STORM = (
        "SKIP_STORM",
        Severity.ERROR,
        "The guard skips a large share of the steps: hardly anything is learnt.",
        "Look at `skipped_steps(opt_state, params)` for reason and leaf. Non-finite: a "
        "bug, or parameters that are bad already; go back to a checkpoint. Spikes: the "
        "skip rule is too strict, or the learning rate too high.",
    )
    REGIME_SHIFT = (
        "REGIME_SHIFT",
        Severity.INFO,
        "Gradient norms changed to another level and stayed there.",
        "Find what changed at that step: data, learning rate, a layer that was "
        "unfrozen. A fixed threshold chosen before may no longer fit; one that follows "
        "the norms does (`threshold.zscore`).",
    )
    OVERFITTING = (
        "OVERFITTING",
        Severity.WARNING,
        "The validation loss rises while the training loss falls.",
        "Use the parameters of the best evaluation (`early_stopping(stop.patience(5))` "
        "keeps them). Regularize, add data, or make the model smaller.",
    )
    STOPPED_TOO_EARLY = (
        "STOPPED_TOO_EARLY",
        Severity.INFO,
        "The run ended while the validation loss was still falling.",
        "Train on. If a rule stopped the run, raise its patience or lower `min_delta`.",
    )
    SHORT_PATIENCE = (
        "SHORT_PATIENCE",
        Severity.INFO,
        "The run ended in a stretch without a better evaluation that is no more than "
        "the noise of the validation loss, which was still falling under it.",
        "Raise the patience, smooth what is judged (`smooth=stop.ema(...)`), or "
        "evaluate on more data.",
    )


class Finding(NamedTuple):
    """One finding of `diagnose`.

    Attributes:
      code: What was found.
      severity: How bad it is.
      evidence: The numbers by which it was found; ``phase`` and ``leaf`` are words.
      advice: What to try.
      step: Step of the row at which it first held.
    """

    code: FindingCode
    severity: Severity
    evidence: dict[str, Any]
    advice: str
    step: int

    def numbers(self) -> str:
        """The evidence in a line."""
        return ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else _g(value)}"
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
                name: str(_g(value)) if _is_odd(value) else value
                for name, value in self.evidence.items()
            },
            "advice": self.advice,
        }


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _g(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
