"""What do a few corrupt batches cost, and how long until they are forgotten?

A character LSTM learns Python's documentation with AdamW. In the middle of the run some
batches are corrupt; each fault is tried on each contender, which otherwise see the same
initial parameters and batches. Peers are the published rules of `_peers.py` with their
published settings, ours the defaults. No contender, fault or setting was left out after
its result was seen.

A run with a fault is compared with the same contender's run without: how far the
held-out loss rises above it (nats per character), how many steps after the first
corrupt batch it is within 5 % of it for good, how many healthy steps are skipped, and
whether parameters and moments are finite in the end. Run `python -m
benchmarks.bad_batches`.
"""

import argparse
import math
import os
import pathlib
import statistics
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optax_guard as og
from benchmarks import _peers
from benchmarks._results import FOLDER, write
from benchmarks._text_run import Batches, Run, Settings, healthy, init_params, make_half

QUICK = Settings(seeds=1, half=80)
FULL = Settings(seeds=5, half=600)


class Fault(NamedTuple):
    """What becomes of the first batches of the second half."""

    field: str
    value: float
    length: int | None  # None: of all of them, which is then no fault of a batch.

    def batches(self, steps: int) -> Batches:
        batches = healthy(steps)
        getattr(batches, self.field)[: self.length] = self.value
        return batches

    def is_corrupt(self, steps: int) -> np.ndarray:
        return np.arange(steps) < (self.length or 0)


FAULTS = {
    "none": Fault("loss_factor", 1.0, 0),
    "NaN": Fault("loss_factor", math.nan, 1),
    "loss x 1e4": Fault("loss_factor", 1e4, 1),
    "loss x 1e30": Fault("loss_factor", 1e30, 1),
    "inputs x 1e3": Fault("input_factor", 1e3, 1),
    "8 shuffled": Fault("is_shuffled", True, 8),
    "32 shuffled": Fault("is_shuffled", True, 32),
    "loss x 5 for good": Fault("loss_factor", 5.0, None),
}


def contenders(learning_rate: float) -> dict[str, Any]:
    """Every way to protect the same AdamW.

    Published rules that skip have a clip of 1 beside them, as in their own projects'
    configurations.
    """
    adamw = optax.adamw(learning_rate)
    clip = optax.clip_by_global_norm(1.0)
    clipped = optax.chain(clip, adamw)
    return {
        "unguarded": adamw,
        "optax clip": clipped,
        "apply_if_finite": optax.apply_if_finite(adamw, 10),
        "apply_if_finite(clip)": optax.apply_if_finite(clipped, 10),
        "ZClip": optax.chain(_peers.zclip(), adamw),
        "OLMo": _peers.olmo(clipped),
        "MaxText": optax.chain(clip, _peers.maxtext(adamw)),
        "levanter": _peers.levanter(clipped),
        "guard(clip=1)": og.guard(adamw, clip=1.0),
        "guard(zscore)": og.guard(adamw, clip=og.threshold.zscore()),
        "guard(quantile)": og.guard(adamw, clip=og.threshold.quantile(0.9)),
        "guard(relative)": og.guard(adamw, clip=og.threshold.relative_to_mean()),
        "guard(clip=1, spike)": og.guard(adamw, clip=1.0, skip=og.skip.spike()),
        "guard(adagc)": og.guard(adamw, clip=og.adagc()),
    }


def run_contender(tx: Any, settings: Settings) -> dict[str, list[Run]]:
    """The second half with every fault, and without: a run for each seed."""
    half = make_half(tx, settings)
    runs: dict[str, list[Run]] = {fault: [] for fault in FAULTS}
    for seed in settings.first_seed + np.arange(settings.seeds):
        first, key = jax.random.split(jax.random.key(seed))
        params = init_params(first, settings)
        before = half(params, tx.init(params), 0, key, healthy(settings.half))
        for name, fault in FAULTS.items():
            batches = fault.batches(settings.half)
            start = before.params, before.opt_state
            runs[name].append(jax.device_get(half(*start, settings.half, key, batches)))
    return runs


# What is measured --------------------------------------------------------------------


def is_finite(tree: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def steps_to_recover(losses: np.ndarray, clean: np.ndarray, every: int) -> float:
    """Until all later losses are within 5 % of the clean run's; 0 if all are."""
    is_off = ~(losses <= 1.05 * clean)
    if not is_off.any():
        return 0
    last = int(np.flatnonzero(is_off)[-1])
    return math.inf if last == len(losses) - 1 else (last + 2) * every


def measure(
    runs: dict[str, list[Run]], settings: Settings
) -> dict[str, dict[str, list[float]]]:
    """For each fault what was seen, by seed."""
    table = {}
    for name, fault in FAULTS.items():
        rows = []
        corrupt = fault.is_corrupt(settings.half)
        for run, clean in zip(runs[name], runs["none"], strict=True):
            rise = np.max(run.losses - clean.losses)
            moments = [optax.tree.get(r.opt_state, "nu") for r in (run, clean)]
            sizes = [sum(float(np.sum(x)) for x in m.values()) for m in moments]
            finite = is_finite(optax.tree.get(run.opt_state, "mu"))
            rows.append(
                {
                    "peak_excursion": float(np.nan_to_num(rise, nan=np.inf)),
                    "steps_to_recover": steps_to_recover(
                        run.losses, clean.losses, settings.eval_every
                    ),
                    "healthy_steps_skipped": int(np.sum(~run.is_taken & ~corrupt)),
                    "corrupt_steps_taken": int(np.sum(run.is_taken & corrupt)),
                    "finite_params": is_finite(run.params),
                    "finite_moments": finite and math.isfinite(sizes[0]),
                    "second_moment_ratio": sizes[0] / sizes[1],
                    "final_loss": float(run.losses[-1]),
                }
            )
        table[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return table


def show(results: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Prints a table for each fault: medians, and the range of steps, over seeds."""
    for fault in FAULTS:
        print(
            f"\n{fault}\n{'':24}{'excursion':>10}{'steps to recover':>24}{'skipped':>9}"
            f"{'taken':>7}{'final':>8}{'moment x':>10}  not finite"
        )
        for name, table in results.items():
            seen = table[fault]
            steps = sorted(seen["steps_to_recover"])
            span = f"{steps[len(steps) // 2]:g} ({steps[0]:g} to {steps[-1]:g})"
            span = span.replace("inf", "never")
            bad = [
                what
                for what in ("params", "moments")
                if not all(seen[f"finite_{what}"])
            ]
            print(
                f"{name:24}{statistics.median(seen['peak_excursion']):10.3f}"
                f"{span:>24}"
                f"{statistics.median(seen['healthy_steps_skipped']):9g}"
                f"{statistics.median(seen['corrupt_steps_taken']):7g}"
                f"{statistics.median(seen['final_loss']):8.3f}"
                f"{statistics.median(seen['second_moment_ratio']):10.2g}  "
                f"{', '.join(bad)}"
            )


def study(
    settings: Settings, transformations: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All runs, and what was measured, both by contender and fault."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            name: pool.submit(run_contender, tx, settings)
            for name, tx in transformations.items()
        }
        runs = {name: future.result() for name, future in futures.items()}
    return runs, {name: measure(run, settings) for name, run in runs.items()}


def plot(
    runs: dict[str, dict[str, list[Run]]], settings: Settings, path: pathlib.Path
) -> None:
    """Draws a panel for each fault: what the first seed's losses are above clean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    steps = settings.eval_every * np.arange(1, settings.half // settings.eval_every + 1)
    handles: list[Any] = []
    for ax, fault in zip(axes, list(FAULTS)[1:], strict=False):
        for i, (name, by_fault) in enumerate(runs.items()):
            is_ours = name.startswith("guard")
            rise = by_fault[fault][0].losses - by_fault["none"][0].losses
            (line,) = ax.plot(
                steps,
                rise,
                color=f"C{i % 10}" if not is_ours else f"C{(i + 2) % 10}",
                linestyle="-" if is_ours else "--",
                linewidth=1.6 if is_ours else 1.2,
                marker=".os^v<>*"[i % 8],
                markevery=(3 * i % 20, 20),
                markersize=4,
                label=name,
            )
            if ax is axes[0]:
                handles.append(line)
        gone = [n for n, by in runs.items() if not is_finite(by[fault][0].losses)]
        if gone:
            text = f"not finite: {', '.join(gone)}"
            ax.text(
                0.97,
                0.95,
                textwrap.fill(text, 38),
                transform=ax.transAxes,
                ha="right",
                va="top",
            )
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set_title(fault)
        ax.set_yscale("symlog", linthresh=0.05)
        ax.set_ylim(-0.06, 4)
        ax.set_yticks([-0.05, 0, 0.05, 0.1, 0.3, 1, 3])
        ax.set_yticklabels(["-0.05", "0", "0.05", "0.1", "0.3", "1", "3"])
        ax.set_xlabel("steps after the first corrupt batch")
    for ax in axes[::4]:
        ax.set_ylabel("held-out loss above the clean run's\n[nats per character]")
    axes[-1].axis("off")
    axes[-1].legend(handles=handles, loc="center", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed, short runs")
    size.add_argument("--full", action="store_true", help="five seeds, long runs")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    started = time.monotonic()
    runs, results = study(settings, contenders(settings.learning_rate))
    show(results)
    content = {
        "faults": {name: fault._asdict() for name, fault in FAULTS.items()},
        "units": "losses and excursions in nats per character; lists are by seed",
        "results": results,
    }
    write(args.out / "bad_batches.json", settings, started, content)
    plot(runs, settings, args.out / "bad_batches.png")


if __name__ == "__main__":
    main()
