"""What do a few corrupt batches cost, and how long until they are forgotten?

A character LSTM learns Python's documentation with AdamW. In the middle of the run some
batches are corrupt; each fault is tried on each contender, which otherwise see the same
initial parameters and batches. Peers are the published rules of `_peers.py` with their
published settings, ours the defaults. No contender, fault or setting was left out after
its result was seen.

A run with a fault is compared with the same contender's run without: how far the
held-out loss rises above it (nats per character), how many steps after the first
corrupt batch it is within 5 % of it for good, how many healthy steps are skipped, and
whether parameters and moments are finite in the end.

Two contenders also rewind: they are runs of `fit` with a checkpoint at each
evaluation, in processes of their own, and a rewind is a held-out loss more than 5 %
above the best. `GOALS` were set before the first run of this form, for `RULE` and, of
100 batches, for `RULE` with rewinds; the table says whether they are met. Run `python
-m benchmarks.bad_batches`.
"""

import argparse
import functools
import math
import multiprocessing
import os
import pathlib
import shutil
import statistics
import tempfile
import time
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optax_guard as og
from benchmarks import _peers
from benchmarks._results import FOLDER, write
from benchmarks._text_run import (
    Batches,
    Run,
    Settings,
    healthy,
    init_params,
    make_evaluation,
    make_half,
    make_step,
)
from benchmarks.pictures import draw
from optax_guard.flax import Checkpointer, Rewind, TrainState, fit

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
        batches.is_corrupt[: self.length or 0] = True
        return batches


FAULTS = {
    "none": Fault("loss_factor", 1.0, 0),
    "NaN": Fault("loss_factor", math.nan, 1),
    "loss x 1e4": Fault("loss_factor", 1e4, 1),
    "loss x 1e30": Fault("loss_factor", 1e30, 1),
    "inputs x 1e3": Fault("input_factor", 1e3, 1),
    "8 shuffled": Fault("is_shuffled", True, 8),
    "32 shuffled": Fault("is_shuffled", True, 32),
    "100 shuffled": Fault("is_shuffled", True, 100),
    "loss x 5 for good": Fault("loss_factor", 5.0, None),
}


class Goal(NamedTuple):
    """Largest medians over seeds that are good enough."""

    excursion: float
    steps: float = math.inf
    healthy_skipped: float = math.inf


RULE, REWOUND = "guard(clip=1, spike)", "guard(clip=1, spike), rewind"
GOALS = {
    (RULE, "none"): Goal(0.0, 0, 0),
    (RULE, "8 shuffled"): Goal(0.08, 0, 0),
    (RULE, "32 shuffled"): Goal(0.08, 0, 0),
    (REWOUND, "100 shuffled"): Goal(0.30, healthy_skipped=0),
    (RULE, "loss x 5 for good"): Goal(0.12),
}
REWIND = Rewind(times=3, lr_factor=1.0, max_rise=0.05, leave_out=64)


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
        RULE: og.guard(adamw, clip=1.0, skip=og.skip.spike()),
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


# Runs of `fit`, with rewinds ----------------------------------------------------------


def rewinding(learning_rate: float) -> dict[str, Any]:
    adamw = optax.adamw(learning_rate)
    return {
        "guard(clip=1), rewind": og.guard(adamw, clip=1.0),
        REWOUND: og.guard(adamw, clip=1.0, skip=og.skip.spike()),
    }


def run_rewinding(name: str, settings: Settings, seed: int) -> dict[str, Run]:
    """The second half with every fault, resumed from the checkpoint of the first."""
    tx = rewinding(settings.learning_rate)[name]
    half, step_of = settings.half, jax.jit(make_step(tx, settings))
    evaluation = make_evaluation(settings)
    first, key = jax.random.split(jax.random.key(seed))

    def train_step(state: Any, batch: Any) -> Any:
        params, opt_state, loss, (taken, skipped) = step_of(
            state.params, state.opt_state, key, *batch
        )
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss, "taken": 1.0 * taken, "skipped": 1.0 * skipped}

    evaluate = jax.jit(lambda state: evaluation(state.params))
    start = TrainState.create(
        apply_fn=evaluation, params=init_params(first, settings), tx=tx
    )
    stopper = og.early_stopping(og.stop.patience(2 * half))

    def train(directory: pathlib.Path, num_steps: int, fault: Fault) -> Any:
        # Batches that are left out are followed by healthy ones.
        bad = fault.batches(half + REWIND.times * REWIND.leave_out)
        usual = jax.tree.map(lambda x: x[0], healthy(1))

        def batch_at(step: int) -> Any:
            at = jax.tree.map(lambda x: x[step - half], bad) if step >= half else usual
            return np.int32(step), at

        return fit(
            start,
            train_step,
            batch_at,
            num_steps=num_steps,
            eval_every=settings.eval_every,
            evaluate=evaluate,
            stopper=stopper,
            checkpointer=Checkpointer(directory),
            rewind=REWIND,
        )

    runs = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Each rewind warns.
        before = pathlib.Path(folder) / "before"
        train(before, half, FAULTS["none"])
        for i, (fault_name, fault) in enumerate(FAULTS.items()):
            directory = before.with_name(str(i))
            shutil.copytree(before, directory)
            runs[fault_name] = as_run(train(directory, 2 * half, fault), settings)
            shutil.rmtree(directory)
    return runs


def as_run(result: Any, settings: Settings) -> Run:
    """The second half of a run of `fit`."""
    rows = [row for row in result.history if row["step"] > settings.half]
    taken, skipped = (
        round(settings.eval_every * sum(row[f"train_{name}"] for row in rows))
        for name in ("taken", "skipped")
    )
    return Run(
        params=jax.device_get(result.state.params),
        opt_state=jax.device_get(result.state.opt_state),
        losses=np.array([row["value"] for row in rows]),
        corrupt_taken=taken,
        healthy_skipped=skipped,
        num_rewinds=len(result.rewinds),
    )


def use_cpu() -> None:
    """For processes beside the one that holds the accelerator."""
    jax.config.update("jax_platforms", "cpu")


def run_all_rewinding(
    settings: Settings, pool: Executor
) -> dict[str, dict[str, list[Run]]]:
    """Of each contender and fault a run for each seed."""
    names = list(rewinding(settings.learning_rate))
    run = functools.partial(run_rewinding, settings=settings)
    tasks = {
        name: [pool.submit(run, name, seed=seed) for seed in range(settings.seeds)]
        for name in names
    }
    found = {
        name: [task.result() for task in of_name] for name, of_name in tasks.items()
    }
    return {
        name: {fault: [runs[fault] for runs in by_seed] for fault in FAULTS}
        for name, by_seed in found.items()
    }


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
    for name in FAULTS:
        rows = []
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
                    "healthy_steps_skipped": int(run.healthy_skipped),
                    "corrupt_steps_taken": int(run.corrupt_taken),
                    "num_rewinds": int(run.num_rewinds),
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
            f"\n{fault}\n{'':30}{'excursion':>10}{'steps to recover':>24}{'skipped':>9}"
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
                f"{name:30}{statistics.median(seen['peak_excursion']):10.3f}"
                f"{span:>24}"
                f"{statistics.median(seen['healthy_steps_skipped']):9g}"
                f"{statistics.median(seen['corrupt_steps_taken']):7g}"
                f"{statistics.median(seen['final_loss']):8.3f}"
                f"{statistics.median(seen['second_moment_ratio']):10.2g}  "
                f"{', '.join(bad)}"
            )


def judge(
    results: dict[str, dict[str, dict[str, list[float]]]],
) -> list[dict[str, Any]]:
    """Each goal with the medians that were found, and whether it is met."""
    lines = []
    for (name, fault), goal in GOALS.items():
        if name not in results:  # Without the runs of `fit`.
            continue
        seen = results[name][fault]
        found = Goal(
            statistics.median(seen["peak_excursion"]),
            statistics.median(seen["steps_to_recover"]),
            statistics.median(seen["healthy_steps_skipped"]),
        )
        lines.append(
            {
                "contender": name,
                "fault": fault,
                "goal": goal._asdict(),
                "found": found._asdict(),
                "is_met": all(x <= most for x, most in zip(found, goal, strict=True)),
            }
        )
    return lines


def study(
    settings: Settings, transformations: dict[str, Any], jobs: int | None = None
) -> dict[str, dict[str, list[Run]]]:
    """All runs, by contender and fault; those of `fit` only in ``jobs`` processes."""
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            name: pool.submit(run_contender, tx, settings)
            for name, tx in transformations.items()
        }
        rewound = {}
        if jobs is not None:
            with ProcessPoolExecutor(jobs, spawn, initializer=use_cpu) as processes:
                rewound = run_all_rewinding(settings, processes)
        return {name: future.result() for name, future in futures.items()} | rewound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed, short runs")
    size.add_argument("--full", action="store_true", help="long runs")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="processes for the runs of `fit`, which need Orbax; 0: leave them out",
    )
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    started = time.monotonic()
    runs = study(settings, contenders(settings.learning_rate), args.jobs or None)
    results = {name: measure(run, settings) for name, run in runs.items()}
    show(results)
    goals = judge(results)
    for line in goals:
        print("met" if line["is_met"] else "MISSED", line)
    content = {
        "faults": {name: fault._asdict() for name, fault in FAULTS.items()},
        "units": "losses and excursions in nats per character; lists are by seed",
        "goals": goals,
        "results": results,
    }
    path = args.out / "bad_batches.json"
    write(path, settings, started, content)
    draw("bad_batches", path)


if __name__ == "__main__":
    main()
