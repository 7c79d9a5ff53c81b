"""The box at the top of a report: how long a run was, how good, and how it ended."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optax_guard._records.findings import Finding
from optax_guard._records.rows import as_rows
from optax_guard.stop._rule import StopReason

# Names of files that many runs share: their folder names the run.
_COMMON = {"history", "metrics", "trainer_state", "trainer_log", "progress"}


def run_name(source: Path) -> str:
    """The name of a run by its file."""
    folder = source.resolve().parent.name
    return folder if source.stem in _COMMON and folder else source.name


def summary_of(
    history: Iterable[Mapping[str, Any]], findings: Sequence[Finding]
) -> dict[str, str]:
    """Steps, best evaluation, end, skipped steps and findings, if they are known."""
    rows = as_rows(history)
    last = rows[-1]
    summary = {"steps": f"{last['step']:g}", "rows": f"{len(rows)}"}
    key = next((k for k in ("val_loss", "value") if any(k in r for r in rows)), None)
    known = [r for r in rows if key is not None and math.isfinite(r.get(key, math.nan))]
    if key == "val_loss" and known:
        best = min(known, key=lambda row: row["val_loss"])
        summary["best val loss"] = f"{best['val_loss']:.4g} at step {best['step']:g}"
    reasons = [row["stop_reason"] for row in rows if row.get("stop_reason")]
    if reasons:
        summary["stopped by"] = StopReason(int(reasons[-1])).name
    if "num_skipped" in last:
        summary["skipped steps"] = f"{last['num_skipped']:g}"
    counts = Counter(str(finding.severity) for finding in findings)
    told = [f"{counts[x]} {x}" for x in ("error", "warning", "info") if counts[x]]
    summary["findings"] = ", ".join(told) or "none"
    return summary
