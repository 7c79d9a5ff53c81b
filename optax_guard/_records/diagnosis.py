"""What a history says about a run, and what to try."""

from collections.abc import Iterable, Mapping
from typing import Any

from optax_guard._checks import check_iterable, check_kind
from optax_guard._guarding.readout import SkippedStep
from optax_guard._records.facts import FactReader
from optax_guard._records.findings import Finding, FindingCode, Severity
from optax_guard._records.readers import rename
from optax_guard._records.rules_clipping import (
    ClippedTooLate,
    ClippingWorks,
    DirectionDistorted,
    NeverClipped,
    NonfiniteLoss,
    OverClipped,
)
from optax_guard._records.rules_losses import Endings, LossSpike, Overfitting
from optax_guard._records.rules_norms import (
    Exploding,
    RegimeShift,
    SkipStorm,
    Vanishing,
)

_RULES = (
    NonfiniteLoss,
    Exploding,
    SkipStorm,
    ClippedTooLate,
    OverClipped,
    DirectionDistorted,
    Vanishing,
    LossSpike,
    Overfitting,
    RegimeShift,
    NeverClipped,
    ClippingWorks,
)
# These say how things stand, and are taken back when they no longer stand so; the
# others say what has happened.
_STANDING = {FindingCode.CLIPPING_WORKS, FindingCode.NEVER_CLIPPED}
# A finding -> those that it rules out. A loss that is lost is no reason to raise the
# threshold.
_RULES_OUT = {
    FindingCode.NONFINITE_LOSS_DESPITE_CLIPPING: {
        FindingCode.CLIPPING_WORKS,
        FindingCode.OVER_CLIPPED,
    },
    FindingCode.EXPLODING: {FindingCode.CLIPPING_WORKS, FindingCode.OVER_CLIPPED},
    FindingCode.SKIP_STORM: {FindingCode.CLIPPING_WORKS},
    FindingCode.OVER_CLIPPED: {FindingCode.CLIPPING_WORKS},
    FindingCode.DIRECTION_DISTORTED: {FindingCode.CLIPPING_WORKS},
}
_KNOWN = {"train_loss", "val_loss", "value", "grad_norm"}
_ORDER = [Severity.ERROR, Severity.WARNING, Severity.INFO]


class Diagnosis:
    """A diagnosis that goes along with the run, in constant time and memory a row.

    As a logger of `optax_guard.flax.fit`, ``loggers=[Diagnosis()]``, it prints every
    finding when it first holds. The rules are those of `diagnose`.

    Args:
      skipped_steps: What `optax_guard.skipped_steps` returned, to name the leaf.

    Examples:
      >>> from optax_guard.analysis import Diagnosis
      >>> diagnosis = Diagnosis()
      >>> row = {"step": 1, "loss": float("nan"), "grad_norm": 100.0}
      >>> [f.code.name for f in diagnosis.update({**row, "clip_threshold": 5.0})]
      ['NONFINITE_LOSS_DESPITE_CLIPPING']
    """

    def __init__(self, skipped_steps: Iterable[SkippedStep] = ()):
        check_iterable("skipped_steps", skipped_steps, "a list of `SkippedStep`")
        skipped_steps = list(skipped_steps)
        for each in skipped_steps:
            check_kind("skipped_steps", each, SkippedStep, "a list of `SkippedStep`")
        self._leaf = next((r.leaf for r in skipped_steps if r.leaf is not None), None)
        self._facts = FactReader()
        self._rules = [rule() for rule in _RULES]
        self._endings = Endings()
        self._held: dict[FindingCode, Finding] = {}
        self._step = 0

    def update(self, row: Mapping[str, Any]) -> list[Finding]:
        """Takes in a row; returns the findings that hold for the first time."""
        facts = self._facts(row)
        self._step = facts.step
        before = {f.code for f in self.findings()}
        for rule in self._rules:
            evidence = rule.update(facts)
            if evidence is not None:
                self._hold(rule.code, evidence)
            elif rule.code in _STANDING:
                self._held.pop(rule.code, None)
        self._endings.update(facts)
        return [f for f in self.findings() if f.code not in before]

    def __call__(self, step: int, row: Mapping[str, Any]) -> None:
        """Takes in a row and prints what is new, as a logger of `fit`."""
        for finding in self.update({**row, "step": step}):
            print(finding, flush=True)

    def findings(self) -> list[Finding]:
        """What holds so far, the worst first."""
        ruled_out = {x for code in self._held for x in _RULES_OUT.get(code, ())}
        found = [f for code, f in self._held.items() if code not in ruled_out]
        return sorted(found, key=lambda f: (_ORDER.index(f.severity), f.step))

    def finish(self) -> list[Finding]:
        """What holds of a run that ends here: the rules about the end are asked too."""
        ending = self._endings.finish()
        if ending is not None and FindingCode.OVERFITTING not in self._held:
            self._hold(*ending)
        return self.findings()

    def _hold(self, code: FindingCode, evidence: dict[str, Any]) -> None:
        if code == FindingCode.NONFINITE_LOSS_DESPITE_CLIPPING and self._leaf:
            evidence = {**evidence, "leaf": str(self._leaf)}
        before = self._held.get(code)
        # Of what happens at a row, the first time is what matters.
        if before is None or code in _STANDING or "phase" in evidence:
            step = self._step if before is None else before.step
            severity = code.severity
            if evidence.get("phase") == "warm-up":
                severity = Severity.INFO
            self._held[code] = Finding(code, severity, evidence, code.advice, step)


def diagnose(
    history: Iterable[Mapping[str, Any]], *, skipped_steps: Iterable[SkippedStep] = ()
) -> list[Finding]:
    """Says what norms and losses of a run mean, and what to try.

    Each rule needs what it reads: without validation losses nothing is said about
    overfitting. "Typical" is the geometric mean of all norms before; noise is measured
    from second differences, so that a trend is none; a clip is in force where there is
    a finite threshold or a step was clipped. Rows are as `fit` makes them, an
    evaluation each, or a step each.

    =============================== ===============================================
    code                            when it holds
    =============================== ===============================================
    EXPLODING                       No clip and no skip, and a norm is not finite, or
                                    the loss is not and the norm not calm. Or: the norm
                                    is above 10 times the typical one (of 3 or more) in
                                    2 rows running and the loss not below the median of
                                    the last 5; with a clip or skips, above the
                                    first loss, of validation as well.
    NONFINITE_LOSS_DESPITE_CLIPPING A clip is in force, and a loss is not finite (of
                                    training, where no step was skipped).
    SKIP_STORM                      Of the steps of the last 5 rows 25 % were skipped,
                                    and at least 5.
    CLIPPED_TOO_LATE                A clip comes into force after a row without one in
                                    which norm or loss was not finite or the norm above
                                    10 times the typical one (of 3 or more).
    OVER_CLIPPED                    In 8 rows running, 90 % of the steps clipped, and
                                    norms (their median) at least 10 times the
                                    threshold, or what is left of them if that is more,
                                    or 3 times while the loss falls by no more than
                                    10 % over these rows. ``phase`` is
                                    "whole run" at 75 % over all rows; else
                                    "warm-up", an info, if it began within the first
                                    3 rows; else "part of the run".
    DIRECTION_DISTORTED             Mean ``update_cosine`` of the last 5 rows (3 or
                                    more) below 0.9, that is turned by 26 degrees.
    VANISHING                       From row 8 on, the median of the last 3 norms at
                                    most 1e-3 of that of the first 5, or 1e-6; the loss
                                    has fallen by less than 5 % of the first.
    LOSS_SPIKE_WITHOUT_NORM_SPIKE   The norm is calm: at most 3 times the median of the
                                    last 20. The loss is above the last 5 by 6 times the
                                    noise, by 20 % of their median and, with fewer than
                                    8 before (3 or more), by 2 times their range; or it
                                    is not finite, and there is no clip.
    OVERFITTING                     5 evaluations without a better one, the mean of the
                                    last 3 above the best such mean by 2 % and 5 times
                                    the noise of the last 50, and the training loss
                                    (mean of 3) 1 % below that at the best.
    REGIME_SHIFT                    The medians of 8 norms and of the 8 after them
                                    differ by 3 times, and their logarithms by 5 times
                                    the median deviation within these rows.
    NEVER_CLIPPED                   10 rows, none clipped, and the threshold at least 2
                                    times the largest norm. Taken back when it ends.
    CLIPPING_WORKS                  A clip is in force, something was clipped, and after
                                    4 losses the mean of the last 3 is 5 % below the
                                    first. Taken back when it ends; ruled out by the
                                    errors, OVER_CLIPPED and DIRECTION_DISTORTED.
    STOPPED_TOO_EARLY               At the end: 10 evaluations, the best among the last
                                    2, and a line through the last 10 falls by 5 %
                                    of their mean and 5 times the noise around it.
    SHORT_PATIENCE                  At the end: the best is not among the last 2 of 10
                                    or more evaluations; a line through the last 20
                                    falls, by 4 standard errors and 3 % in all, and one
                                    through the last 10 at least half as steeply; the
                                    noise is more than the line falls since the best.
    =============================== ===============================================

    False alarms, measured (``tests/test_diagnosis.py``): 300 simulated runs that learn,
    with noisy losses, falling norms with outliers of 2 to 30 times, and in four of five
    a clip at a quantile of 0.5 to 0.99, gave no error, no warning and 8 infos, of how a
    run ended or that norms changed; CLIPPING_WORKS is not counted.

    Args:
      history: A `History`, or rows such as `fit` returns.
      skipped_steps: What `optax_guard.skipped_steps` returned, to name the leaf.

    Returns:
      The findings, the worst first; empty if there is nothing to say.

    Raises:
      ValueError: If the rows have neither a loss nor a gradient norm by a name of
        `COLUMN_NAMES`.

    Examples:
      >>> from optax_guard.analysis import History, diagnose
      >>> history = History()
      >>> norms, losses = [15.2, 12.7, 20.5, 4.8, 3.2], [2.3, 1.8, 1.2, 0.9, 0.7]
      >>> for epoch, (norm, loss) in enumerate(zip(norms, losses), start=1):
      ...     history.append(epoch, grad_norm=norm, clip_threshold=5.0, loss=loss)
      >>> [(f.code.name, f.evidence["clip_share"]) for f in diagnose(history)]
      [('CLIPPING_WORKS', 0.6)]
    """
    check_iterable("history", history, "a `History` or rows")
    diagnosis = Diagnosis(skipped_steps)
    names: set[str] = set()
    for row in history:
        diagnosis.update(row)
        names |= row.keys()
    if names and not _KNOWN & rename(dict.fromkeys(names, 0.0)).keys():
        raise ValueError(
            "`history` must have a loss or a gradient norm under a known name, got "
            f"{sorted(names)}. Rename them, or read with `columns=`."
        )
    return diagnosis.finish()
