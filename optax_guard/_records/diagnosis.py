"""The diagnosis of a run from its history, row by row or at once."""

from collections.abc import Iterable, Mapping
from typing import Any

from optax_guard._checks import check_iterable, check_kind
from optax_guard._guarding.skip_readout import SkippedStep
from optax_guard._records.facts import FactReader
from optax_guard._records.findings import Evidence, Finding, FindingCode, Severity
from optax_guard._records.readers import rename
from optax_guard._records.rules_clipping import (
    FALLS_WELL,
    ClippedTooLate,
    ClippingWorks,
    DirectionDistorted,
    NeverClipped,
    OverClipped,
)
from optax_guard._records.rules_finite import (
    NonfiniteBatch,
    NonfiniteLoss,
    NonfiniteParameters,
    SkipStorm,
    StepsSkipped,
)
from optax_guard._records.rules_losses import Endings, LossSpike, Overfitting
from optax_guard._records.rules_norms import RegimeShift, Vanishing, ZeroGradients
from optax_guard._records.rules_steps import Unstable

_RULES = (
    NonfiniteLoss,
    NonfiniteParameters,
    NonfiniteBatch,
    Unstable,
    SkipStorm,
    StepsSkipped,
    ZeroGradients,
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
# These tell a state, and are taken back when the state ends. The others tell an event.
_STANDING = {
    FindingCode.CLIPPING_WORKS,
    FindingCode.NEVER_CLIPPED,
    FindingCode.NONFINITE_PARAMETERS,
    FindingCode.STEPS_SKIPPED,
    FindingCode.ZERO_GRADIENTS,
}
# A finding -> the findings that it rules out. A loss that is not finite is no reason to
# raise the threshold.
_GOOD = {FindingCode.CLIPPING_WORKS, FindingCode.OVER_CLIPPED}
_ENDS = {FindingCode.SHORT_PATIENCE}
# Where steps are too large, a loss that leaps needs no bad batch.
_LEAPS = {FindingCode.LOSS_SPIKE_WITHOUT_NORM_SPIKE}
_RULES_OUT = {
    FindingCode.NONFINITE_LOSS_DESPITE_CLIPPING: _GOOD,
    FindingCode.NONFINITE_PARAMETERS: _GOOD | _ENDS,
    FindingCode.EXPLODING: {*_GOOD, *_ENDS, *_LEAPS, FindingCode.RATE_TOO_HIGH},
    FindingCode.RATE_TOO_HIGH: _GOOD | _ENDS | _LEAPS,
    FindingCode.SKIP_STORM: {FindingCode.CLIPPING_WORKS, FindingCode.STEPS_SKIPPED},
    FindingCode.OVER_CLIPPED: {FindingCode.CLIPPING_WORKS},
    FindingCode.DIRECTION_DISTORTED: {FindingCode.CLIPPING_WORKS},
    FindingCode.OVERFITTING: _ENDS,
}
# Findings that steps of the guard's record explain.
_NAMED = {
    FindingCode.NONFINITE_LOSS_DESPITE_CLIPPING,
    FindingCode.NONFINITE_BATCH,
    FindingCode.STEPS_SKIPPED,
}
_KNOWN = {"train_loss", "val_loss", "value", "grad_norm"}
_ORDER = [Severity.ERROR, Severity.WARNING, Severity.INFO]


class Diagnosis:
    """A diagnosis during the run. A row costs constant time and memory.

    As a logger of `optax_guard.loops.fit`, ``loggers=[Diagnosis()]``, it prints every
    finding when it first holds. The rules are those of `diagnose`.

    Args:
      skipped_steps: The steps that `optax_guard.skipped_steps` returned; they name the
        leaf of a loss that is not finite.

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
        self._skipped = skipped_steps
        self._facts = FactReader()
        self._rules = [rule() for rule in _RULES]
        self._endings = Endings()
        self._held: dict[FindingCode, Finding] = {}
        self._step = 0

    def update(self, row: Mapping[str, Any]) -> list[Finding]:
        """Adds a row; returns the findings that hold for the first time."""
        facts = self._facts(row)
        self._step = facts.step
        before = {f.code for f in self.findings()}
        for rule in self._rules:
            found = rule.update(facts)
            if isinstance(rule, Unstable):
                # It holds under one of two codes.
                if isinstance(found, tuple):
                    self._hold(*found)
            elif isinstance(found, dict):
                self._hold(rule.code, found)
            elif rule.code in _STANDING:
                self._held.pop(rule.code, None)
        self._endings.update(facts)
        return [f for f in self.findings() if f.code not in before]

    def __call__(self, step: int, row: Mapping[str, Any]) -> None:
        """Adds a row and prints new findings, as a logger of `fit`."""
        for finding in self.update({**row, "step": step}):
            print(finding, flush=True)

    def findings(self) -> list[Finding]:
        """The findings that hold so far, the worst first."""
        ruled_out = {x for code in self._held for x in _RULES_OUT.get(code, ())}
        found = [f for code, f in self._held.items() if code not in ruled_out]
        return sorted(found, key=lambda f: (_ORDER.index(f.severity), f.step))

    def finish(self) -> list[Finding]:
        """The findings of a run that ends here, with those about its end."""
        ending = self._endings.finish()
        if ending is not None:
            self._hold(*ending)
        elif not self._held and (too_few := self._endings.too_few()):
            self._hold(*too_few)
        return self.findings()

    def _hold(self, code: FindingCode, evidence: Evidence) -> None:
        before = self._held.get(code)
        # An event keeps the evidence of the row at which it first held.
        if before is None or code in _STANDING or "phase" in evidence:
            step = self._step if before is None else before.step
            severity = code.severity
            does_no_harm = evidence.get("loss_then") == FALLS_WELL
            if does_no_harm or evidence.get("phase") == "warm-up":
                severity = Severity.INFO
            evidence = evidence | self._named_steps(code)
            self._held[code] = Finding(code, severity, evidence, code.advice, step)

    def _named_steps(self, code: FindingCode) -> Evidence:
        """The leaf of a loss that is lost; steps and reasons of those skipped."""
        if not self._skipped or code not in _NAMED:
            return {}
        leaf = next((x.leaf for x in self._skipped if x.leaf is not None), None)
        named: Evidence = {} if leaf is None else {"leaf": str(leaf)}
        if code == FindingCode.STEPS_SKIPPED:
            named["at_steps"] = ", ".join(
                f"{x.update} ({x.reason.name})" for x in self._skipped[-5:]
            )
        return named


def diagnose(
    history: Iterable[Mapping[str, Any]], *, skipped_steps: Iterable[SkippedStep] = ()
) -> list[Finding]:
    """Explains the norms and losses of a run, and advises what to try.

    A row is an evaluation, as `fit` makes them, or a step. A rule is silent without its
    columns: overfitting needs validation losses. The *typical* norm is the geometric
    mean of all norms before. *Noise* is measured by second differences, so that a trend
    does not count. *A clip is in force* if the threshold is finite or a step was
    clipped.

    =============================== ===============================================
    code                            condition
    =============================== ===============================================
    EXPLODING                       The norm of a row is above 10 times the typical
                                    one (*risen*), in this row or the 9 before,
                                    and: 2 successive such rows with a loss not
                                    below the median of the last 5 (with a clip or
                                    skips: above the first losses); or a step that
                                    is not finite and not skipped; or what
                                    RATE_TOO_HIGH asks for.
    RATE_TOO_HIGH                   Norms have not risen. The median
                                    ``update_ratio`` of 3 rows is above 0.1 and the
                                    loss does not fall, or above 0.05 and the loss
                                    above 0.95 times that before training; or it is
                                    above 0.03 and in the first row the training
                                    loss is 1.05 times that before training (and
                                    the validation loss is, too, or it is within a
                                    factor of 2 of the next training loss); or
                                    later the ratio is 10 times its median and the
                                    loss above the last 5; or the last 3 validation
                                    losses are above that before training
                                    (``baseline``, else ``initial_value`` beside
                                    ``val_loss``), unless no ratio was above 0.03.
    NONFINITE_BATCH                 A gradient or loss is not finite, was not
                                    skipped, and norms had not risen.
    NONFINITE_PARAMETERS            Losses and norms of 3 successive rows are not
                                    finite. It is taken back if one is.
    NONFINITE_LOSS_DESPITE_CLIPPING A clip is in force, and a loss is not finite.
                                    The training loss counts if no step was
                                    skipped.
    STEPS_SKIPPED                   Steps were skipped. SKIP_STORM rules it out.
    SKIP_STORM                      In the last 5 rows at least 5 steps and 25 % of
                                    the steps were skipped.
    ZERO_GRADIENTS                  Of 20 norms or more 10 % are exactly 0.
    CLIPPED_TOO_LATE                A clip comes into force after a row without one
                                    in which the norm or the loss was not finite,
                                    or the norm above 10 times the typical one (of
                                    3 or more).
    OVER_CLIPPED                    In 8 successive rows 90 % of the steps are
                                    clipped, and the median norm is at least 10
                                    times the threshold (or the clipped norm, if
                                    that is larger), or 3 times while the loss
                                    falls by at most 10 %. An info if the loss
                                    falls by more. ``phase`` is "whole run" if 75 %
                                    of all steps are clipped; "warm-up", an info,
                                    if it began within the first 3 rows; "part of
                                    the run" otherwise.
    DIRECTION_DISTORTED             The mean ``update_cosine`` of the last 5 rows
                                    (3 or more) is below 0.9: a turn by 26 degrees.
    VANISHING                       From row 8 on: the median of the last 3 norms
                                    above 0 is at most 1e-3 of that of the first 5,
                                    or at most 1e-6, and the loss has fallen by
                                    less than 5 %. Or the median
                                    ``leaf_norm_ratio`` of 8 rows is at most 1e-3,
                                    and the loss has fallen by less than 5 % since
                                    row 5.
    LOSS_SPIKE_WITHOUT_NORM_SPIKE   The norm is calm: at most 3 times the median of
                                    the last 20. The loss exceeds the last 5 by 20
                                    % of their median, 2 % of the first loss, 6
                                    times the noise, 10 units of its last decimal,
                                    twice the largest rise of the last 20 and, if
                                    there are only 3 to 7 before, 2 times their
                                    range. EXPLODING and RATE_TOO_HIGH rule it out.
    OVERFITTING                     5 evaluations bring no better one; the mean of
                                    the last 3 exceeds the best such mean by 2 %
                                    and 5 times the noise; since the best,
                                    validation losses rise and training losses fall
                                    (Mann-Kendall z of 2.5), no single step makes
                                    half of the rise, and the training loss is
                                    never 20 % above its level at the best, and now
                                    below its least before by twice its noise.
    REGIME_SHIFT                    The medians of 8 norms and of the next 8 differ
                                    by a factor of 3, and their logarithms by 5
                                    times the median deviation within these rows.
    NEVER_CLIPPED                   10 rows have no clipped step, and the threshold
                                    is at least 2 times the largest norm. It is
                                    taken back when that ends.
    CLIPPING_WORKS                  A clip is in force, a step was clipped, and
                                    from 4 losses on the mean of the last 3 is
                                    below that of the first 3 by 5 % and 4 times
                                    the noise. It is taken back when that ends;
                                    errors, OVER_CLIPPED and DIRECTION_DISTORTED
                                    rule it out.
    SHORT_PATIENCE                  At the end of 6 or more evaluations the best is
                                    3 to 6 rows old, and over the last 10 the
                                    training loss falls by 2 % (3 standard errors)
                                    and the validation loss by 1.5 %, or one of
                                    them more clearly.
    TOO_FEW_ROWS                    At the end there are fewer than 5 rows, and
                                    nothing else was found.
    =============================== ===============================================

    False alarms were measured (``tests/test_diagnosis.py``) on 300 simulated runs that
    learn, with noisy losses, falling norms with outliers of 2 to 30 times, and in four
    of five runs a clip at a quantile of 0.5 to 0.99. They gave no error, no warning and
    8 infos (CLIPPING_WORKS is not counted): on the end of a run, or a change of norms.

    Args:
      history: A `History`, or rows such as `fit` returns.
      skipped_steps: The steps that `optax_guard.skipped_steps` returned; they name the
        leaf of a loss that is not finite.

    Returns:
      The findings, the worst first; empty if no rule holds.

    Raises:
      TypeError: If ``history`` has no rows, or ``skipped_steps`` holds anything else.
      ValueError: If the rows have neither a loss nor a gradient norm under a name that
        `History.read` knows.

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
            f"{sorted(names)}. Rename them, or read the file with `columns=`."
        )
    return diagnosis.finish()
