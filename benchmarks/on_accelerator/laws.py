"""Do the laws hold on this accelerator? Runs `pytest -m accelerator`, and counts.

First the tests of `tests/test_on_accelerator.py`, which are made for it; then the laws,
norms and clips, which run on a CPU otherwise. Run `bash
benchmarks/on_accelerator.sh OUT laws`.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from typing import Any

# Before JAX looks for devices: the processes of the tests share one with this process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks.on_accelerator import _kit

PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}
SUITES = {
    "test_on_accelerator": ["tests/test_on_accelerator.py"],
    "laws, norms, clips": [
        *("tests/test_laws.py", "tests/test_norms.py", "tests/test_clipping.py")
    ],
}


def arguments_of(suite: str, quick: bool) -> list[str]:
    """What pytest is called with."""
    found = [
        *(*SUITES[suite], "-m", "accelerator and not full and not soak"),
        # Plugins that write to the folder, or time what is not asked for.
        *("-p", "no:cacheprovider", "-p", "no:benchmark"),
    ]
    if quick and suite != "test_on_accelerator":
        found += ["-k", "test_norms and zero"]
    elif quick:
        found += ["-k", "sgd-float32 or donated or host or linen or large"]
    # Each process takes a while to begin, which few tests are not worth.
    if importlib.util.find_spec("xdist") and suite != "test_on_accelerator":
        found += ["-n", str(min(10, os.cpu_count() or 1))]
    return found


def counts_of(junit: pathlib.Path) -> dict[str, Any]:
    """How many tests did what, and which did not pass."""
    found: dict[str, Any] = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0)
    found |= {"not_passed": [], "reasons_to_skip": []}
    if not junit.exists():
        return found
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {each.tag: each.get("message") or "" for each in case}
        if "skipped" in kinds:
            found["skipped"] += 1
            reason = kinds["skipped"].splitlines()[0]
            if reason not in found["reasons_to_skip"]:
                found["reasons_to_skip"].append(reason)
        elif "failure" in kinds or "error" in kinds:
            is_failure = "failure" in kinds
            found["failed" if is_failure else "errors"] += 1
            message = kinds["failure" if is_failure else "error"]
            found["not_passed"].append({"test": name, "message": message[:300]})
        else:
            found["passed"] += 1
    return found


def test(suite: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs a suite in a process of its own, and returns its row."""
    junit = args.out / f"laws-{suite.split(',')[0]}.xml"
    junit.unlink(missing_ok=True)
    platform = PLATFORMS[jax.default_backend()]
    environment = os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or platform
    }
    if args.quick:
        environment["OPTAX_GUARD_DRY_RUN"] = "1"
    command = [sys.executable, "-m", "pytest", *arguments_of(suite, args.quick)]
    command += [f"--junitxml={junit}", "-q"]
    print(" ".join(command[1:-2]))
    start = time.perf_counter()
    try:
        code = subprocess.run(command, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = None  # The row says so: nothing is counted.
    return {
        "suite": suite,
        "exit_code": code,
        "seconds": time.perf_counter() - start,
        **counts_of(junit),
    }


def run(args: argparse.Namespace) -> int:
    report = _kit.Report(args.out / "laws.json")
    for suite in SUITES:
        report.add(test(suite, args, max(1.0, args.seconds - report.seconds())))
    kinds = ("passed", "failed", "errors", "skipped")
    _kit.print_table(
        "Tests on this device",
        ["tests", *kinds, "seconds"],
        [
            [row["suite"], *(str(row[kind]) for kind in kinds), f"{row['seconds']:.0f}"]
            for row in report.rows
        ],
    )
    return int(any(row["exit_code"] != 0 for row in report.rows))


if __name__ == "__main__":
    sys.exit(run(_kit.read_arguments(__doc__)))
