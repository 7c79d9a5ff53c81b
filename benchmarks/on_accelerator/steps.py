"""What does a guarded step cost on an accelerator, of few leaves and of many?

Every way to protect a step takes turns with Optax's clip, donated and on the same
gradients: ratios are to that clip. Two times are taken of each:

* wall: a Python loop of calls of a jitted step, as a user writes it. Where the device
  is faster than Python dispatches, this is the time of the dispatch.
* device: the time in which the device ran kernels, from the profiler's trace. Where the
  profiler sees no device, as on a CPU, it is the time of steps in one `fori_loop`.

The share of the bandwidth is what a step must move, over the time on the device, beside
what a copy reaches there. A step must move all that it keeps, in and out, and the
gradients; to clip, it must read these once more.

Run `bash benchmarks/on_accelerator.sh OUT steps`, or `many_leaves`.
"""

import argparse
import functools
import importlib
import pathlib
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.on_accelerator import _kit
from benchmarks.on_accelerator._trace import trace
from benchmarks.pictures.step_cost import VARIANTS
from benchmarks.step_cost import (
    OPTIMIZERS,
    Case,
    Run,
    in_turns,
    make_tree,
    num_bytes,
    peak_bandwidth,
    variants,
)

BASE = "optax clip"
COLORS = {name: (color, mark) for name, (_, color, mark) in VARIANTS.items()} | {
    "plain": ("#000000", "+"),
    "guard, update": ("#CC79A7", "<"),
}
# In this order, since a run may be cut: what the goals are about comes first.
SIZES = (25_000_000, 200_000_000, 1_000_000_000, 1_000_000)
DTYPES = ("float32", "bfloat16")
COLUMNS = [
    *("step", "wall ms", "ratio", "quartiles", "device ms", "ratio", "kernels"),
    *("fusions", "of a copy's bandwidth", "of the peak", "state leaves"),
    *("temporaries MB", "compile s"),
]


def cases_of(leaves: int, quick: bool) -> list[Case]:
    sizes = (20_000,) if quick else SIZES
    # Of many leaves each kernel is short, and compilation takes long.
    if leaves > 100 and not quick:
        sizes = (25_000_000, 200_000_000, 1_000_000)
    leaves = min(leaves, 4) if quick else leaves
    return [Case("adamw", n, leaves, dtype) for dtype in DTYPES for n in sizes]


def copy_bandwidth(size: int) -> dict[str, Any]:
    """Bytes per second that one pass over an array reaches, read and written."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))

    def repeat(times: int) -> None:
        y = x
        for _ in range(times):
            y = add(y)
        jax.block_until_ready(y)

    walls = []
    for _ in range(5):
        start = time.perf_counter()
        repeat(20)
        walls.append((time.perf_counter() - start) / 20)
    seen = trace(lambda: repeat(20))
    wall = statistics.median(walls)
    device = seen.busy / seen.kernels if seen and seen.kernels else None
    return {
        "bytes": 2 * x.nbytes,
        "wall_gigabytes_per_second": 2 * x.nbytes / wall / 1e9,
        "device_gigabytes_per_second": device and 2 * x.nbytes / device / 1e9,
        "gigabytes_per_second": 2 * x.nbytes / (device or wall) / 1e9,
    }


def steps_of(case: Case, quick: bool) -> tuple[int, int, int]:
    """Rounds, steps of a turn, which keep the queue full, and steps of a trace."""
    if quick:
        return 3, 3, 3
    if case.params >= 1_000_000_000:
        return 7, 10, 5
    steps = 50 if case.params < 100_000_000 else 30
    return (9, 20, 10) if case.leaves > 100 else (11, steps, 20)


def device_time(run: Run, steps: int) -> dict[str, Any]:
    """Time of a step on the device, and the kernels that ran, where one sees them."""
    seen = trace(lambda: run(steps))
    if seen is not None:
        return {
            "device_from": "trace",
            "device_ms": 1e3 * seen.busy / steps,
            "device_span_ms": 1e3 * seen.span / steps,
            "kernels": seen.kernels / steps,
            "copies": seen.copies / steps,
            "longest": [[name, 1e3 * s / steps] for name, s in seen.longest],
        }

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def loop(params: Any, opt_state: Any, grads: Any) -> Any:
        return jax.lax.fori_loop(
            0, steps, lambda _, both: run.function(*both, grads), (params, opt_state)
        )

    seconds = []
    for _ in range(3):  # The first one compiles.
        start = time.perf_counter()
        run.params, run.opt_state = loop(run.params, run.opt_state, run.grads)
        jax.block_until_ready(run.params)
        seconds.append((time.perf_counter() - start) / steps)
    return {
        "device_from": "loop",
        "device_ms": 1e3 * min(seconds[1:]),
        "device_span_ms": None,
        "kernels": None,
        "copies": None,
        "longest": [],
    }


def row_of(
    case: Case,
    name: str,
    run: Run,
    walls: list[float],
    ratios: list[float],
    device: dict[str, Any],
    copied: float,
) -> dict[str, Any]:
    """All that is told of a variant; `copied` is what a copy reaches, in GB/s."""
    low, median, high = statistics.quantiles(ratios, n=4)
    program = run.program.as_text() or ""
    kept = num_bytes((run.params, run.opt_state))
    moved = 2 * kept + num_bytes(run.grads) * (1 if name == "plain" else 2)
    speed = moved / device["device_ms"] / 1e6
    peak = peak_bandwidth()
    return {
        **case._asdict(),
        "variant": name,
        "wall_ms": 1e3 * statistics.median(walls),
        "wall_ratio": median,
        "wall_quartiles": [low, high],
        **device,
        "least_bytes": moved,
        "gigabytes_per_second": speed,
        "share_of_copy": speed / copied,
        "share_of_peak": peak and 1e9 * speed / peak,
        "state_leaves": len(jax.tree.leaves(run.opt_state)),
        "fusions": len(re.findall(r" fusion\(", program)),
        "conditionals": len(re.findall(r" conditional\(", program)),
        "command_buffers": len(re.findall(r"to_apply=%?command_buffer", program)),
        "temp_bytes": run.temp_bytes,
        "compile_seconds": run.compile_wall_seconds,
        "compile_cpu_seconds": run.compile_seconds,
    }


def reason_to_skip(case: Case) -> str | None:
    """Says why a case does not fit into the device's memory; None if it does."""
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    # Two steps with their moments, the gradients, and temporaries of twice their size.
    needed = 9 * case.params * jnp.dtype(case.dtype).itemsize
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed < free:
        return None
    return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def measure(case: Case, report: _kit.Report, quick: bool) -> None:
    """Adds a row for each variant: each in turns with Optax's clip."""
    rounds, steps, traced = steps_of(case, quick)
    grads = make_tree(case, 1e-2)
    every = variants(OPTIMIZERS[case.optimizer])
    copied = report.about["copy"]["gigabytes_per_second"]

    def add(name: str, run: Run, walls: list[float], ratios: list[float]) -> None:
        device = device_time(run, traced)
        report.add(row_of(case, name, run, walls, ratios, device, copied))

    base = Run(case, *every.pop(BASE), grads)
    walls = [base(steps) for _ in range(rounds)]
    add(BASE, base, walls, [1.0, 1.0])
    for name, (init, step) in every.items():
        run = None  # One that failed makes room for the next.
        try:
            run = Run(case, init, step, grads)
            beside, walls = in_turns(base, run, rounds, steps)
            ratios = [a / b for a, b in zip(walls, beside, strict=True)]
            add(name, run, walls, ratios)
        except jax.errors.JaxRuntimeError as error:
            # Out of memory: the others may still fit.
            reason = str(error).splitlines()[0][:200]
            report.add({**case._asdict(), "variant": name, "skipped": reason})


def print_case(rows: list[dict[str, Any]]) -> None:
    case = Case(*(rows[0][field] for field in Case._fields))
    done = [row for row in rows if "skipped" not in row]
    base = next(row for row in done if row["variant"] == BASE)
    _kit.print_table(
        f"AdamW, {case.params / 1e6:g}M parameters in {case.leaves} leaves, "
        f"{case.dtype}; ratios are to Optax's clip",
        COLUMNS,
        [
            [
                row["variant"],
                _kit.number(row["wall_ms"], 3),
                _kit.number(row["wall_ratio"]),
                "{:.2f} to {:.2f}".format(*row["wall_quartiles"]),
                _kit.number(row["device_ms"], 3),
                _kit.number(row["device_ms"] / base["device_ms"]),
                _kit.number(row["kernels"], 0),
                str(row["fusions"]),
                _kit.percent(row["share_of_copy"]),
                _kit.percent(row["share_of_peak"]),
                str(row["state_leaves"]),
                _kit.number(row["temp_bytes"] and row["temp_bytes"] / 1e6, 1),
                _kit.number(row["compile_seconds"], 1),
            ]
            for row in done
        ],
    )


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Both times over that of Optax's clip, against size, for each dtype."""
    plt = importlib.import_module("matplotlib.pyplot")
    rows = [row for row in rows if "skipped" not in row]
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharex=True, squeeze=False)
    for line, what in enumerate(("wall", "device")):
        for column, dtype in enumerate(DTYPES):
            ax = axes[line][column]
            here = [row for row in rows if row["dtype"] == dtype]
            base = {
                row["params"]: row["device_ms"]
                for row in here
                if row["variant"] == BASE
            }
            for name, (color, marker) in COLORS.items():
                points = sorted(
                    (
                        row["params"] / 1e6,
                        row["wall_ratio"]
                        if what == "wall"
                        else row["device_ms"] / base[row["params"]],
                    )
                    for row in here
                    if row["variant"] == name
                )
                if points:
                    ax.plot(*zip(*points, strict=True), marker, color=color, ls="-")
            ax.set(title=f"{what}, {dtype}", xscale="log")
            ax.axhline(1.03, color="black", linewidth=0.8, linestyle=":")
            ax.set_xlabel("parameters [millions]")
        axes[line][0].set_ylabel(f"{what} time, Optax's clip = 1")
    handles = [
        plt.Line2D([], [], color=color, marker=marker, label=name)
        for name, (color, marker) in COLORS.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(f"{jax.devices()[0].device_kind}; dotted: 3 % over Optax's clip")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args: argparse.Namespace, name: str, leaves: int) -> None:
    copy = copy_bandwidth(1 << 22 if args.quick else 1 << 30)
    report = _kit.Report(
        args.out / f"{name}.json",
        copy=copy,
        peak_gigabytes_per_second=(peak := peak_bandwidth()) and peak / 1e9,
        memory_stats=jax.devices()[0].memory_stats(),
    )
    longest = 0.0
    for case in cases_of(leaves, args.quick):
        reason = reason_to_skip(case)
        if report.seconds() + longest > args.seconds:
            reason = f"no time was left after {report.seconds():.0f} s"
        if reason:
            print(f"\nLeft out: {case}: {reason}.")
            report.add({**case._asdict(), "variant": None, "skipped": reason})
            continue
        started, first = report.seconds(), len(report.rows)
        measure(case, report, args.quick)
        longest = max(longest, report.seconds() - started)
        print_case(report.rows[first:])
        draw(report.rows, args.out / f"{name}.png")
    print(f"Took {report.seconds():.0f} s.")


if __name__ == "__main__":
    run(_kit.read_arguments(__doc__), "steps", leaves=20)
