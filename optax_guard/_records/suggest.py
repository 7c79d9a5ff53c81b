"""A threshold for the norm, from the norms and losses of a recorded run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_guard._checks import check_fraction
from optax_guard._records.rows import as_rows
from optax_guard._records.step_shares import StepNorms, step_norms

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# Fewer norms do not show a tail.
FEWEST = 20
# A reason names a drift or a largest norm from these factors on.
DRIFT, SPIKE = 2.0, 10.0
# Of norms that are all too large, this part of the usual threshold is suggested.
ALL_TOO_LARGE = 0.1
# A clip of more steps than these is not one of rare steps.
_MANY = 0.2
# A run of which more steps were clipped says nothing of norms without a clip.
MOST_CLIPPED = 0.5


class Suggestion(NamedTuple):
    """A threshold, and the reasons for it.

    Attributes:
      max_norm: The threshold, in units of the gradient, to two digits.
      clip_rate: Share of all steps with a norm above it; an estimate if rows are of
        intervals.
      num_norms: How many rows have a norm that is finite and not zero.
      quantiles: Norms of steps by quantile, from the median to the largest; estimates
        if rows are of intervals, but for the largest.
      reasons: Sentences on norms and losses, and what they mean for a threshold.
      are_all_too_large: Whether all norms are too large for the learning rate, not only
        the rare ones; ``None`` if the rows cannot tell.
    """

    max_norm: float
    clip_rate: float
    num_norms: int
    quantiles: dict[float, float]
    reasons: tuple[str, ...]
    are_all_too_large: bool | None

    def __str__(self) -> str:
        """A line for the threshold, and a line for each reason."""
        return "\n".join([f"max_norm {self.max_norm:g}", *self.reasons])


def suggest_max_norm(
    history: Iterable[Mapping[str, Any]], *, clip_rate: float = 0.1
) -> Suggestion:
    """Suggests a threshold for the global norm, from norms and losses of a run.

    In the second half of the run ``clip_rate`` of the steps have a norm above the
    threshold; the first half does not count, because the first steps have unusual
    norms. Norms are those before clipping, so the run may have been clipped.

    That is for rare large norms. If the training loss has not fallen, all norms may be
    too large for the learning rate. The threshold is then a tenth of that. The loss has
    fallen if the mean of its last quarter is below that of its first eighth by more
    than twice the error of this difference; the noise of a row is
    ``median(abs(diff(losses))) / (0.6745 * sqrt(2))``. It has not if most of the last
    quarter is not finite; single rows that are not finite are left out. Watch the run
    from its start, at the learning rate that it is to have: 40 rows are enough. Without
    ``train_loss``, and if the run was itself clipped in most steps, this cannot be
    told. Only a trial shows whether a run with this threshold ends better: see
    `sweep_max_norm`.

    Args:
      history: A `History`, or rows such as `fit` returns, with ``grad_norm`` and, if
        possible, ``train_loss``. If a row has ``grad_norm_mean``, it is of the steps
        since the row before; the share of steps is then estimated from mean and largest
        norm, and a reason gives its bounds. `optax_guard.norm_quantile` counts steps.
      clip_rate: Share of the steps to clip, between 0 and 1.

    Returns:
      A `Suggestion`; printed, it gives its reasons.

    Raises:
      TypeError: If ``history`` has no rows, or ``clip_rate`` is not a number.
      ValueError: If ``clip_rate`` is out of range, or fewer than 20 rows have a norm
        that is finite and not zero.

    Examples:
      >>> from optax_guard.analysis import suggest_max_norm
      >>> rows = [{"step": i + 1, "grad_norm": 1 + i % 10 / 10} for i in range(100)]
      >>> suggestion = suggest_max_norm(rows)
      >>> suggestion.max_norm, suggestion.clip_rate
      (1.8, 0.1)
      >>> for i, row in enumerate(rows):
      ...     row["train_loss"] = 2.0 + 0.1 * (i % 2)
      >>> suggestion = suggest_max_norm(rows)
      >>> suggestion.max_norm, suggestion.are_all_too_large
      (0.18, True)

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013, section 3.2: a threshold from the
      average norm over many updates
    """
    check_fraction("clip_rate", clip_rate)
    rows = [row for row in as_rows(history) if "grad_norm" in row]
    usable = usable_norms(rows)
    if len(usable) < FEWEST:
        raise ValueError(
            f"`history` must have {FEWEST} rows with a finite `grad_norm` above 0, got "
            f"{len(usable)}. Record more steps (`guard(tx)` records without a clip), "
            "or name the column with `columns={'grad_norm': ...}` of `History.read`."
        )
    norms = step_norms(rows)
    half = (len(usable) + 1) // 2
    first, last = norms.part(slice(half)), norms.part(slice(half, None))
    usual = last.quantile(1 - clip_rate)
    are_too_large, reason_on_losses = _judge_losses(rows, usual)
    max_norm = _round_to_two_digits(usual * (ALL_TOO_LARGE if are_too_large else 1.0))
    rate = norms.share_above(max_norm)
    largest = usable[int(norms.largest.argmax())]
    reasons = (
        f"About {100 * last.share_above(usual):.3g} % of the steps of the second half "
        f"have a norm above {usual:.3g}.",
        reason_on_losses,
        _reason_on_share(norms, max_norm, rate),
        _reason_on_largest(largest, max_norm, rate),
        *_reasons_on_drift(first, last),
        *_reasons_on_unusable(len(rows) - len(usable)),
    )
    quantiles = {q: norms.quantile(q) for q in QUANTILES[:-1]}
    quantiles[1.0] = float(norms.largest.max())
    return Suggestion(max_norm, rate, len(usable), quantiles, reasons, are_too_large)


def _judge_losses(
    rows: Sequence[Mapping[str, float]], usual: float
) -> tuple[bool | None, str]:
    """Whether all norms are too large, and the evidence in words."""
    usually = f"{usual:.3g} is for rare large norms."
    unknown = "Whether all norms are too large cannot be told: "
    clipped = float(np.median([row.get("clip_rate", 0.0) for row in rows]))
    if clipped > MOST_CLIPPED:
        return None, (
            f"{unknown}the run was itself clipped, in {100 * clipped:.3g} % of its "
            f"steps (median of the rows). {usually}"
        )
    losses = np.array([row["train_loss"] for row in rows if "train_loss" in row])
    is_finite = np.isfinite(losses)
    is_lost = len(losses) >= FEWEST and not np.median(is_finite[-len(losses) // 4 :])
    losses = losses[is_finite]
    if len(losses) < FEWEST and not is_lost:
        return None, (
            f"{unknown}{len(losses)} rows have a finite `train_loss`, and {FEWEST} are "
            f"needed. {usually}"
        )
    advice = (
        "All norms are too large for this learning rate, not only the rare ones: the "
        f"suggestion is a tenth of {usual:.3g}. A lower learning rate may do the same."
    )
    if is_lost:
        return True, f"Most of the last training losses are not finite. {advice}"
    start, end, needed = _fall(losses)
    if end < start - needed:
        return False, (
            f"The training loss fell from {start:.4g} to {end:.4g}, by more than noise "
            f"({needed:.2g}): norms in general are not too large. {usually}"
        )
    return True, (
        f"The training loss went from {start:.4g} to {end:.4g}; a fall of more than "
        f"{needed:.2g} would be more than noise. {advice}"
    )


def _fall(losses: np.ndarray) -> tuple[float, float, float]:
    """Mean loss at the start and at the end, and the fall that is more than noise."""
    num_first, num_last = len(losses) // 8, len(losses) // 4
    noise = float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))
    needed = 2 * noise * math.sqrt(1 / num_first + 1 / num_last)
    start, end = losses[:num_first].mean(), losses[-num_last:].mean()
    return float(start), float(end), needed


def _reason_on_share(norms: StepNorms, max_norm: float, rate: float) -> str:
    total = f"{int(norms.num_steps.sum())} steps"
    if norms.is_exact:
        return f"Of all {total}, {100 * rate:.3g} % have a norm above {max_norm:g}."
    low, high = norms.bounds_above(max_norm)
    return (
        f"Of all {total}, about {100 * rate:.3g} % have a norm above {max_norm:g}, and "
        f"for certain {100 * low:.3g} to {100 * high:.3g} %: a row holds only mean and "
        "largest norm of its steps. `norm_quantile(state, q)` of the run counts steps."
    )


def _reason_on_largest(row: Mapping[str, float], max_norm: float, rate: float) -> str:
    excess = row["grad_norm"] / max_norm
    meaning = "no step stands out, and a clip will rarely matter."
    if excess >= SPIKE:
        meaning = "a clip is for such steps."
    if rate > _MANY:
        meaning = f"it clips {100 * rate:.3g} % of the steps, ordinary ones too."
    return (
        f"The largest norm, {row['grad_norm']:.3g} at step {row['step']:g}, is "
        f"{excess:.3g} times the threshold: {meaning}"
    )


def _reasons_on_drift(first: StepNorms, last: StepNorms) -> list[str]:
    drift = last.quantile(0.5) / first.quantile(0.5)
    if 1 / DRIFT < drift < DRIFT:
        return []
    return [
        f"The median norm changed by a factor of {drift:.2g} from the first half to "
        "the second: no number fits both. `threshold.zscore()` follows the norms."
    ]


def _reasons_on_unusable(num_rows: int) -> list[str]:
    if not num_rows:
        return []
    return [
        f"{num_rows} norms were 0 or not finite, and do not count. A clip does not "
        "help against norms that are not finite; `guard` does."
    ]


def usable_norms(rows: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The rows with a norm that is finite and above 0."""
    return [row for row in rows if 0 < row.get("grad_norm", math.nan) < math.inf]


def _round_to_two_digits(x: float) -> float:
    return float(f"{x:.1e}")
