"""Are the verdicts right? Precision and recall of `diagnose` on runs of known faults.

Small models are trained in many ways: well, with one of the faults that `diagnose`
knows, or with one that it must not take for another. What was done to a run says which
findings are due, and which are true as well, as that norms change level once a run has
exploded; these count neither way. All others are false alarms (`_faults.py`). Learning
rates vary by seed over a factor of 4, thresholds over a factor of 2.

Rules were made on seeds below 10 of digits with SGD, characters with Adam, an LSTM with
AdamW and two deep perceptrons. Reported are other seeds, and three models on which no
rule was made: a convolutional net, fine-tuning with losses of 4 decimals, and a policy
that learns from groups of samples (`_held_out.py`). Then 200 healthy runs of 8 kinds.
Run `python -m benchmarks.verdicts`.
"""

import argparse
import math
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks._faults import NAN, TREATMENTS, UNTREATED
from benchmarks._results import FOLDER, write
from benchmarks._verdict_runs import (
    HELD_OUT,
    SUBJECTS,
    Run,
    Settings,
    healthy_runs,
    runs_of,
    too_long,
    treatments_of,
)
from benchmarks.pictures import draw
from optax_guard.analysis import Diagnosis, FindingCode, Severity, diagnose

QUICK = Settings(
    seeds=1, steps=100, lstm_steps=50, policy_steps=50, rows=25, too_long=20, healthy=1
)
FULL = Settings(seeds=100)


# What is measured ---------------------------------------------------------------------


class Judged(NamedTuple):
    """A run and what was found in it."""

    run: Run
    found: frozenset[str]


def judge(runs: list[Run]) -> list[Judged]:
    return [Judged(r, frozenset(str(f.code) for f in diagnose(r.rows))) for r in runs]


def by_code(judged: list[Judged]) -> dict[str, dict[str, Any]]:
    """Of each code: how often it was due and found, and where it was no such thing."""
    table = {}
    for code in map(str, FindingCode):
        due = found = alarms = others = 0
        by: dict[str, int] = {}
        for run, codes_found in judged:
            if code in run.due:
                due += 1
                found += code in codes_found
            elif code not in run.true:
                others += 1
                if code in codes_found:
                    alarms += 1
                    by[run.treatment] = by.get(run.treatment, 0) + 1
        table[code] = {
            "due": due,
            "found": found,
            "recall": found / due if due else NAN,
            "others": others,
            "false_alarms": alarms,
            "precision": found / (found + alarms) if found + alarms else NAN,
            "false_alarms_by_treatment": by,
        }
    return table


def by_treatment(judged: list[Judged]) -> dict[str, dict[str, Any]]:
    """Of each treatment: how many runs, and the share of them with each code."""
    table = {}
    for title in dict.fromkeys(j.run.treatment for j in judged):
        those = [j for j in judged if j.run.treatment == title]
        shares = {
            code: sum(code in j.found for j in those) / len(those)
            for code in map(str, FindingCode)
        }
        wrong = [
            any(
                FindingCode[code].severity != Severity.INFO
                for code in j.found - j.run.due - j.run.true
            )
            for j in those
        ]
        table[title] = {
            "runs": len(those),
            # Where what is due depends on the run, of any of them.
            "due": sorted(frozenset().union(*(j.run.due for j in those))),
            "also_true": sorted(frozenset().union(*(j.run.true for j in those))),
            "found": {code: share for code, share in shares.items() if share},
            "share_wrongly_warned": sum(wrong) / len(wrong),
        }
    return table


def macro(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The means of recall and precision over the codes that were due or found."""
    return {
        name: float(np.nanmean([row[name] for row in table.values()]))
        for name in ("recall", "precision")
    }


def lead_times(runs: list[Run]) -> dict[str, Any]:
    """Of runs with a rate too high: rows from the first word of it to divergence.

    A run has diverged at the first row whose validation loss is not finite or above
    the one before training, for good. What comes after that has a negative lead.
    """
    leads = []
    for run in runs:
        if not TREATMENTS.get(run.treatment, TREATMENTS[UNTREATED]).is_rate:
            continue
        start = run.rows[0].get("initial_value", NAN)
        is_bad = [not row.get("val_loss", NAN) <= start for row in run.rows]
        told = told_at(run)
        if math.isfinite(start) and is_bad[-1] and told is not None:
            leads.append(
                len(is_bad) - is_bad[::-1].index(False) - told
                if False in is_bad
                else -told
            )
    return {
        "runs": len(leads),
        "rows": sorted(leads),
        "median": statistics.median(leads) if leads else NAN,
    }


def told_at(run: Run) -> int | None:
    """The row at which EXPLODING or RATE_TOO_HIGH is first said, from 0."""
    diagnosis = Diagnosis()
    for i, row in enumerate(run.rows):
        if {"EXPLODING", "RATE_TOO_HIGH"} & {f.code for f in diagnosis.update(row)}:
            return i
    return None


def alarms_of(runs: list[Run]) -> dict[str, int]:
    """How many runs have a warning or an error, by its code, and how many are there."""
    counts: dict[str, int] = {"runs": len(runs), "alarmed": 0}
    for run in runs:
        found = [f for f in diagnose(run.rows) if f.severity != Severity.INFO]
        counts["alarmed"] += bool(found)
        for finding in found:
            counts[finding.code] = counts.get(finding.code, 0) + 1
    return counts


# Showing it ---------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """Prints all tables."""
    print("lead of EXPLODING and RATE_TOO_HIGH, in rows:", results["lead"])
    print("healthy runs with a warning or an error:", results["healthy"])
    for part in ("all", "held-out models"):
        found = results[part]
        print(f"\n{part}: macro {found['macro']}")
        print(
            f"{'':32}{'due':>5}{'recall':>8}{'others':>8}{'alarms':>8}",
            end="",
        )
        print(f"{'precision':>11}")
        for code, row in found["by_code"].items():
            print(
                f"{code:32}{row['due']:5}{row['recall']:8.2f}{row['others']:8}"
                f"{row['false_alarms']:8}{row['precision']:11.2f}  "
                + ", ".join(
                    f"{n} {t}" for t, n in row["false_alarms_by_treatment"].items()
                )
            )
        print()
        for title, row in found["by_treatment"].items():
            shares = ", ".join(
                f"{'' if c in row['due'] else '~' if c in row['also_true'] else '!'}"
                f"{c} {share:.2f}"
                for c, share in row["found"].items()
            )
            print(f"{title:40}{row['runs']:4}  {shares}")


def study(settings: Settings) -> dict[str, Any]:
    """What was found in all runs, and in those of models that no rule was made on."""
    runs = [
        run for name in SUBJECTS for run in runs_of(name, treatments_of(name), settings)
    ]
    return results_of(runs + too_long(settings), healthy_runs(settings))


def results_of(runs: list[Run], healthy: list[Run]) -> dict[str, Any]:
    """Tables of runs, of all and of the held-out models."""
    judged = judge(runs)
    parts = {
        "all": judged,
        "held-out models": [j for j in judged if j.run.subject in HELD_OUT],
    }
    results: dict[str, Any] = {}
    for name, part in parts.items():
        codes = by_code(part)
        results[name] = {
            "by_code": codes,
            "by_treatment": by_treatment(part),
            "macro": macro(codes),
        }
    results["lead"] = lead_times(runs)
    results["healthy"] = alarms_of(healthy)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed, short runs")
    size.add_argument("--full", action="store_true", help="a hundred seeds")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    started = time.monotonic()
    results = study(settings)
    show(results)
    path = args.out / "verdicts.json"
    write(path, settings, started, results)
    draw("verdicts", path)


if __name__ == "__main__":
    main()
