"""The box at the top of a report: how long a run was, how good, and how it ended."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optax_guard._records.findings import Finding
from optax_guard._records.rows import as_rows
from optax_guard.stop._rule import StopReason

# The columns that judge a run, and their words. No log says whether `value` is a loss.
_JUDGED = {
    "val_loss": "best val loss",
    "value": "lowest value",
    "train_loss": "lowest train loss",
}
_HEADINGS = (
    *("steps", "rows", *_JUDGED.values()),
    *("stopped by", "skipped steps", "findings"),
)


def summary_of(
    history: Iterable[Mapping[str, Any]], findings: Sequence[Finding]
) -> dict[str, str]:
    """Steps, best evaluation, end, skipped steps and findings, if they are known."""
    rows = as_rows(history)
    summary = {"steps": f"{rows[-1]['step']:.15g}", "rows": f"{len(rows)}"}
    key = next((k for k in _JUDGED if any(k in row for row in rows)), None)
    if key is not None:
        summary[_JUDGED[key]] = _lowest(rows, key)
    stops = [row for row in rows if row.get("stop_reason")]
    if stops:
        reason = StopReason(int(stops[-1]["stop_reason"])).name
        summary["stopped by"] = f"{reason} at step {stops[-1]['step']:.15g}"
    counts = [row["num_skipped"] for row in rows if "num_skipped" in row]
    if counts:
        summary["skipped steps"] = f"{counts[-1]:g}"
    of_kind = Counter(str(finding.severity) for finding in findings)
    told = [f"{of_kind[x]} {x}" for x in ("error", "warning", "info") if of_kind[x]]
    summary["findings"] = ", ".join(told) or "none"
    return summary


def _lowest(rows: Sequence[Mapping[str, float]], key: str) -> str:
    known = [row for row in rows if math.isfinite(row.get(key, math.nan))]
    if not known:
        return "none is finite"
    best = min(known, key=lambda row: row[key])
    return f"{best[key]:.4g} at step {best['step']:.15g}"


def side_by_side(summaries: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """The table of several runs: its heading, and a line for each run by its name."""
    known = {key for summary in summaries.values() for key in summary}
    keys = [key for key in _HEADINGS if key in known]
    lines = [[name, *(x.get(k, "") for k in keys)] for name, x in summaries.items()]
    return [["run", *keys], *lines]
