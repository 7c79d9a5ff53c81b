"""A threshold for the norm, from the norms of a recorded run."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_guard._checks import check_fraction
from optax_guard._records.rows import as_rows

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# Fewer norms do not show a tail.
FEWEST = 20
# A reason names a drift or a largest norm from these factors on.
DRIFT, SPIKE = 2.0, 10.0


class Suggestion(NamedTuple):
    """A threshold, and the reasons for it.

    Attributes:
      max_norm: The threshold, in units of the gradient, to two digits.
      clip_rate: Share of the norms that are above it.
      num_norms: How many norms are finite and not zero.
      quantiles: Norms by quantile, from the median to the largest.
      reasons: Sentences on the norms, and what they mean for a threshold.
    """

    max_norm: float
    clip_rate: float
    num_norms: int
    quantiles: dict[float, float]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """A line for the threshold, and a line for each reason."""
        return "\n".join([f"max_norm {self.max_norm:g}", *self.reasons])


def suggest_max_norm(
    history: Iterable[Mapping[str, Any]], *, clip_rate: float = 0.1
) -> Suggestion:
    """Suggests a threshold for the global norm, from the norms of a recorded run.

    In the second half of the run ``clip_rate`` of the norms are above the threshold;
    the first half does not count, because the first steps have unusual norms. Norms are
    those before clipping, so the run may have been clipped. Only a trial shows whether
    a run with this threshold ends better: see `sweep_max_norm`.

    Args:
      history: A `History`, or rows such as `fit` returns, with ``grad_norm``. A row of
        an interval has the largest norm of the interval: then the threshold clips fewer
        steps than ``clip_rate``. `optax_guard.norm_quantile` counts every step.
      clip_rate: Share of the norms to clip, between 0 and 1.

    Returns:
      A `Suggestion`; printed, it gives its reasons.

    Raises:
      TypeError: If ``history`` has no rows, or ``clip_rate`` is not a number.
      ValueError: If ``clip_rate`` is out of range, or fewer than 20 rows have a norm
        that is finite and not zero.

    Examples:
      >>> from optax_guard.analysis import suggest_max_norm
      >>> rows = [{"step": i, "grad_norm": 1 + i % 10 / 10} for i in range(100)]
      >>> suggestion = suggest_max_norm(rows)
      >>> suggestion.max_norm, suggestion.clip_rate
      (1.8, 0.1)

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
            f"{len(usable)}. Record more steps (`guard(tx)` records without a clip) or "
            "name the column."
        )
    norms = np.array([row["grad_norm"] for row in usable])
    first, last = np.array_split(norms, 2)
    # The lower of two norms, so that the threshold does not depend on interpolation.
    at = np.quantile(last, 1 - clip_rate, method="lower")
    max_norm = _round_to_two_digits(float(at))
    rate = float(np.mean(norms > max_norm))
    reasons = (
        f"{1 - clip_rate:.4g} of the last {len(last)} norms are at most {at:.3g}; of "
        f"all {len(norms)}, {100 * rate:.3g} % are above {max_norm:g}.",
        _reason_on_largest(usable[int(norms.argmax())], max_norm),
        *_reasons_on_drift(first, last),
        *_reasons_on_unusable(len(rows) - len(usable)),
    )
    quantiles = {q: float(np.quantile(norms, q)) for q in QUANTILES}
    return Suggestion(max_norm, rate, len(norms), quantiles, reasons)


def _reason_on_largest(row: Mapping[str, float], max_norm: float) -> str:
    excess = row["grad_norm"] / max_norm
    meaning = "no step stands out, and a clip will rarely matter."
    if excess >= SPIKE:
        meaning = "a clip, or `skip.spike()`, is for such steps."
    return (
        f"The largest norm, {row['grad_norm']:.3g} at step {row['step']:g}, is "
        f"{excess:.3g} times the threshold: {meaning}"
    )


def _reasons_on_drift(first: np.ndarray, last: np.ndarray) -> list[str]:
    drift = float(np.median(last) / np.median(first))
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
