"""The inputs of the rules of a diagnosis: a row, and a summary of those before it."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from optax_guard._records.rows import Completer

# How many rows, or evaluations, a rule can look back.
RECENT = 20


class Facts(NamedTuple):
    """A row, and a summary of the rows before it. NaN means unknown.

    Attributes:
      step: Steps done.
      num_steps: Steps since the row before, at least 1; by ``num_updates`` if a guard
        counted them, for a loop may give the epoch as the step.
      norm: Largest norm of these steps before clipping; may be infinite.
      mean_norm: Mean norm of these steps; ``norm`` if it is not recorded.
      threshold: Threshold of the clip; infinite if there is none.
      clipped_norm: Norm after clipping.
      clip_share: Share of the steps that were clipped.
      has_clip: Whether a clip is in force.
      nonfinite_share: Share of the steps with a gradient that was not finite; 0 if
        unknown.
      skip_share: Share of the steps that a guard skipped.
      train: Training loss; may be infinite.
      val: Validation loss; may be infinite.
      is_loss_nonfinite: Whether a loss of this row is known and not finite. The
        training loss does not count if steps were skipped: such steps do no harm.
      lost_loss: The loss that is not finite if there is one, else ``loss``.
      loss: The training loss, or the validation loss if there is none.
      cosine: Cosine between gradients before and after clipping.
      learning_rate: The learning rate.
      update_ratio: Norm of a step's update in units of that of the parameters; a mean
        over the row's steps, or that of its last step.
      leaf_norm_ratio: Of the matrices, the smallest norm of a leaf's gradients in units
        of the largest.
      start_loss: The loss before training: the user's baseline, else the validation
        loss before the first step, else NaN.
      stop_reason: The `StopReason` of the stopper that stopped here; 0 without one.
      typical_norm: Geometric mean of the finite norms above 0 of all rows before.
      num_norms: How many such norms there are.
      past_norms: The last of these norms, at most `RECENT`.
      past_losses: The last finite losses of the rows before, at most `RECENT`.
      first_loss: The first finite loss.
    """

    step: int
    num_steps: int
    norm: float
    mean_norm: float
    threshold: float
    clipped_norm: float
    clip_share: float
    has_clip: bool
    nonfinite_share: float
    skip_share: float
    train: float
    val: float
    is_loss_nonfinite: bool
    lost_loss: float
    loss: float
    cosine: float
    learning_rate: float
    update_ratio: float
    leaf_norm_ratio: float
    start_loss: float
    stop_reason: int
    typical_norm: float
    num_norms: int
    past_norms: Sequence[float]
    past_losses: Sequence[float]
    first_loss: float


class FactReader:
    """Makes facts of rows, in their order. A row costs constant time and memory."""

    def __init__(self):
        self._complete = Completer()
        self._last_step = 0
        self._last_skipped = 0.0
        self._had_clip = False
        self._log_norms = 0.0
        self._num_norms = 0
        self._norms: deque[float] = deque(maxlen=RECENT)
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._first_loss = self._start_loss = math.nan

    def __call__(self, row: Mapping[str, Any]) -> Facts:
        """The facts of a row."""
        row = self._complete(row)

        def get(name: str) -> float:
            return row.get(name, math.nan)

        norm, train = get("grad_norm"), get("train_loss")
        val = row.get("val_loss", get("value"))
        loss = train if "train_loss" in row else val
        num_new = self._complete.num_new or int(row["step"]) - self._last_step
        num_steps = max(1, int(num_new))
        skip_share = self._skip_share(row, num_steps)
        is_train_lost = "train_loss" in row and not math.isfinite(train)
        is_val_lost = not math.isfinite(val) and ("val_loss" in row or "value" in row)
        is_known = self._num_norms > 0
        if math.isnan(self._start_loss):
            self._start_loss = row.get("baseline", math.nan)
            if math.isnan(self._start_loss) and "val_loss" in row:
                # Under another name it may be no loss, but an accuracy.
                self._start_loss = get("initial_value")
        facts = Facts(
            step=int(row["step"]),
            num_steps=num_steps,
            norm=norm,
            mean_norm=row.get("grad_norm_mean", norm),
            threshold=row.get("clip_threshold", math.inf),
            clipped_norm=get("clipped_norm"),
            clip_share=get("clip_rate"),
            has_clip=self._has_clip(row),
            nonfinite_share=row.get(
                "nonfinite_rate", float("grad_norm" in row and not math.isfinite(norm))
            ),
            skip_share=skip_share,
            train=train,
            val=val,
            is_loss_nonfinite=is_val_lost or (is_train_lost and not skip_share > 0),
            lost_loss=val if is_val_lost and math.isfinite(loss) else loss,
            loss=loss,
            cosine=get("update_cosine"),
            learning_rate=get("learning_rate"),
            # A step that moved nothing was skipped.
            update_ratio=get("update_ratio") or math.nan,
            leaf_norm_ratio=get("leaf_norm_ratio"),
            start_loss=self._start_loss,
            stop_reason=int(row.get("stop_reason", 0)),
            typical_norm=math.exp(self._log_norms / self._num_norms)
            if is_known
            else math.nan,
            num_norms=self._num_norms,
            past_norms=tuple(self._norms),
            past_losses=tuple(self._losses),
            first_loss=self._first_loss,
        )
        self._last_step = facts.step
        if math.isfinite(norm) and norm > 0:
            self._log_norms += math.log(norm)
            self._num_norms += 1
            self._norms.append(norm)
        if math.isfinite(loss):
            self._losses.append(loss)
            if math.isnan(self._first_loss):
                self._first_loss = loss
        return facts

    def _has_clip(self, row: Mapping[str, float]) -> bool:
        limit = row.get("clip_threshold", math.nan)
        # If no norm was finite, the threshold is NaN: the one before still holds.
        if row.get("clip_rate", 0) > 0 or math.isfinite(limit):
            self._had_clip = True
        elif not math.isnan(limit):
            self._had_clip = False
        return self._had_clip

    def _skip_share(self, row: Mapping[str, float], num_steps: int) -> float:
        total = row.get("num_skipped", math.nan)
        before, self._last_skipped = self._last_skipped, total
        if "skip_rate" in row:
            return row["skip_rate"]
        return min(1.0, max(0.0, total - before) / num_steps) if total >= 0 else total


def is_calm(facts: Facts) -> bool:
    """Whether the norm is finite and at most 3 times the median of the recent norms."""
    limit = 3 * median(facts.past_norms or [math.inf])
    return math.isfinite(facts.norm) and facts.norm <= limit


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the noise on a smooth curve; 0 for fewer than 3 values.

    It is measured by the median size of second differences. A trend does not change
    that, and a few jumps hardly do. For normal noise the median is 0.6745 * sqrt(6)
    standard deviations. Rounded values have at least the noise of the rounding.
    """
    if len(values) < 3:
        return 0.0
    triples = zip(values, values[1:], values[2:], strict=False)
    # A third of each, so that finite losses have a finite sum.
    spread = 3 * median(abs(a / 3 - 2 * (b / 3) + c / 3) for a, b, c in triples)
    # Rounding moves a value by up to half a unit, evenly.
    return max(spread / (0.6745 * 6**0.5), unit_of(values) / 12**0.5)


def unit_of(values: Sequence[float]) -> float:
    """The unit of the last decimal of values that are rounded to at most 6; else 0."""
    decimals = 6
    if any(x != round(x, decimals) for x in values):
        return 0.0
    while decimals > 1 and all(x == round(x, decimals - 1) for x in values):
        decimals -= 1
    return 10.0**-decimals


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [x for x in values if not math.isnan(x)]
    return sum(x / len(known) for x in known) if known else math.nan
