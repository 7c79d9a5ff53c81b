"""A threshold for the norm, from the norms that a run has seen."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_guard._checks import check_fraction
from optax_guard._records.rows import as_rows

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# Fewer say nothing of a tail.
FEWEST = 20
# From where on a difference of sizes is worth a word.
DRIFT, SPIKE = 2.0, 10.0


class Suggestion(NamedTuple):
    """A threshold, and why.

    Attributes:
      max_norm: The threshold, in units of the gradient, to two digits.
      clip_rate: Share of the norms seen that are above it.
      num_norms: How many norms were seen: all that are finite and not zero.
      quantiles: Norms by quantile, from the median to the largest.
      reasons: What was seen, and what it means; sentences.
    """

    max_norm: float
    clip_rate: float
    num_norms: int
    quantiles: dict[float, float]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """A line for the threshold, and one for each reason."""
        return "\n".join([f"max_norm {self.max_norm:g}", *self.reasons])


def suggest_max_norm(
    history: Iterable[Mapping[str, Any]], *, clip_rate: float = 0.1
) -> Suggestion:
    """Suggests a threshold for the global norm, from the norms of a recorded run.

    It is the quantile of the second half of the run that ``clip_rate`` of the norms
    are above: the first steps of a run, with norms of their own, do not count. Norms
    are those before clipping, so a run that was clipped serves as well. Whether a run
    with that threshold ends better is not known before it is tried: see
    `sweep_max_norm`.

    Args:
      history: A `History`, or rows such as `fit` returns, with ``grad_norm``. In rows
        of intervals that is the largest norm of each interval, so that fewer steps than
        ``clip_rate`` will be clipped; ``norm_quantile`` of the optimizer's state counts
        every step.
      clip_rate: Share of the norms to clip, between 0 and 1.

    Returns:
      A `Suggestion`; as text it gives its reasons.

    Raises:
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
            f"`history` must have {FEWEST} rows with a finite `grad_norm` above 0 at "
            f"least, got {len(usable)}. Record more steps, with `guard(tx)` to only "
            "watch, or name the column."
        )
    norms = np.array([row["grad_norm"] for row in usable])
    first, last = np.array_split(norms, 2)
    # To an observed norm, so that rounding decides what is above.
    at = np.quantile(last, 1 - clip_rate, method="lower")
    max_norm = _two_digits(float(at))
    rate = float(np.mean(norms > max_norm))
    reasons = [
        f"{1 - clip_rate:.4g} of the last {len(last)} norms are at most {at:.3g}; of "
        f"all {len(norms)}, {100 * rate:.3g} % are above {max_norm:g}."
    ]
    largest = usable[int(norms.argmax())]
    excess = largest["grad_norm"] / max_norm
    reasons.append(
        f"The largest, {largest['grad_norm']:.3g} at step {largest['step']:g}, is "
        + (
            f"{excess:.3g} times that: a clip, or `skip.spike()`, is for such steps."
            if excess >= SPIKE
            else f"{excess:.3g} times that: no step stands out, and a clip will rarely "
            "matter."
        )
    )
    drift = float(np.median(last) / np.median(first))
    if not 1 / DRIFT < drift < DRIFT:
        reasons.append(
            f"The median norm changed by a factor of {drift:.2g} from the first half "
            "to the second: no number fits both. `threshold.zscore()` follows."
        )
    if bad := len(rows) - len(usable):
        reasons.append(
            f"{bad} norms were 0 or not finite, and do not count; a clip does not cure "
            "what is not finite: `guard`."
        )
    quantiles = {q: float(np.quantile(norms, q)) for q in QUANTILES}
    return Suggestion(max_norm, rate, len(norms), quantiles, tuple(reasons))


def usable_norms(rows: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The rows with a norm that is finite and above 0."""
    return [row for row in rows if 0 < row.get("grad_norm", math.nan) < math.inf]


def _two_digits(x: float) -> float:
    return float(f"{x:.1e}")
