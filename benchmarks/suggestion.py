"""Is the threshold that `suggest_max_norm` suggests a good one for the run it watched?

The models, scales, optimizers and learning rates are those of `stability.py`: 12
settings, SGD with momentum and Adam, 7 rates over two decades. The seeds are others:
the rule on losses was found on seeds from 0 on, and is judged here on 10 from 1000 on.
A run is watched for 40 steps without a clip; then the same seed is trained with the
threshold that is suggested, from the first step on. Contenders:

* unclipped, and Optax's clip at 0.1, 0.3, 1, 3 and 10: "the sweep";
* *norms alone*: the suggestion without the losses, a tenth of the steps clipped;
* *suggested*: with the losses, watched at the learning rate of the run;
* *at lowest*: the same, watched at the lowest learning rate;
* *tenth*: always a tenth of *norms alone*, to see whether the losses matter.

Where too few norms are finite to suggest anything, nothing is clipped.

What is measured, for each setting and optimizer. *Regret*: median final loss above the
lowest of the sweep, both at their own best learning rates; goal of *suggested*: mean at
most 0.05 nats, largest 0.15. *Regret at each rate*: the same at one learning rate, over
all cells at which the sweep trains, with the share of cells below 0.05. *Slowdown*: in
cells that are healthy, at which unclipped training is within 0.05 nats of the sweep's
best, the median over seeds of a run's final loss less that of the same seed unclipped;
goal: no cell above 0.02. *Told*: share of runs for which all norms were said to be too
large, of those in healthy cells and of those in cells at which unclipped does not train
and the sweep does. All this was written before the first run on these seeds. Run
`python -m benchmarks.suggestion`.
"""

import argparse
import math
import os
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import optax

import optax_guard as og
from benchmarks import _models, stability
from benchmarks._results import FOLDER, write
from optax_guard.analysis import suggest_max_norm
from optax_guard.loops import train_population

FIRST_SEED = 1000
FULL = stability.Settings(seeds=10)
QUICK = stability.Settings(seeds=2, steps=60, eval_every=6, num_rates=3)
GOALS = {"mean regret": 0.05, "largest regret": 0.15, "largest slowdown": 0.02}


class Watched(NamedTuple):
    """What was suggested of each run: [optimizer, scale, learning rate, seed]."""

    norms_alone: np.ndarray
    suggested: np.ndarray
    is_told: np.ndarray  # Whether all norms were said to be too large.


class Study:
    """The runs of one model: a program to watch, and one to train with a clip."""

    def __init__(
        self,
        model: _models.Model,
        scales: tuple[float, ...],
        settings: stability.Settings,
    ):
        self.settings = settings
        settings = settings._replace(first_seed=FIRST_SEED)
        inputs = stability.make_inputs(model, settings)
        rates = [stability.rates_of(name, settings) for name in stability.OPTIMIZERS]
        self.shape = len(rates), len(scales), settings.num_rates, settings.seeds
        places = np.indices(self.shape).reshape(len(self.shape), -1)
        self.members = {
            "is_adam": places[0] == list(stability.OPTIMIZERS).index("Adam"),
            "scale": np.array(scales, np.float32)[places[1]],
            "learning_rate": np.array(rates, np.float32)[places[0], places[2]],
            "seed": places[3].astype(np.int32),
        }

        def optimizer(member: Any) -> Any:
            return stability.sgd_or_adam(member["is_adam"], member["learning_rate"])

        def clipped(member: Any) -> Any:
            clip = optax.clip_by_global_norm(member["max_norm"])
            return optax.chain(clip, optimizer(member))

        self._watch = stability.make_build(
            model, inputs, lambda m: og.guard(optimizer(m)), is_evaluated=False
        )
        self._train = stability.make_build(model, inputs, clipped, is_evaluated=True)

    def watch(self) -> Watched:
        history = train_population(
            self._watch,
            self.members,
            num_steps=self.settings.watched,
            eval_every=1,
        ).history
        columns = (np.asarray(history[x]) for x in ("grad_norm", "train_loss"))
        found = [suggested(*pair) for pair in zip(*columns, strict=True)]
        return Watched(
            *(np.array(x).reshape(self.shape) for x in zip(*found, strict=True))
        )

    def train(self, max_norm: Any) -> np.ndarray:
        """Final losses, infinite if not finite; mean of the last three evaluations."""
        max_norm = np.broadcast_to(np.asarray(max_norm, np.float32), self.shape)
        history = train_population(
            self._train,
            self.members | {"max_norm": max_norm.ravel()},
            num_steps=self.settings.steps,
            eval_every=self.settings.eval_every,
        ).history
        values = np.asarray(history["value"], np.float64)
        values = np.where(np.isfinite(values), values, np.inf)
        return values[:, -3:].mean(axis=1).reshape(self.shape)


def suggested(norms: np.ndarray, losses: np.ndarray) -> tuple[float, float, bool]:
    """By the norms alone, by both, and whether all norms are said to be too large."""
    rows = [
        {"step": i + 1, "grad_norm": float(norm), "train_loss": float(loss)}
        for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    ]
    try:
        by_both = suggest_max_norm(rows)
    except ValueError:
        return math.inf, math.inf, False
    for row in rows:
        del row["train_loss"]
    told = by_both.are_all_too_large is True
    return suggest_max_norm(rows).max_norm, by_both.max_norm, told


def run_all(
    models: stability.Models, settings: stability.Settings
) -> dict[str, tuple[Watched, dict[str, np.ndarray]]]:
    """Of each model what was suggested, and the final losses of each contender."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def begin(name: str) -> tuple[Study, Watched, np.ndarray]:
            made = Study(*models[name], settings)
            # The first training compiles, for all that follow.
            return made, made.watch(), made.train(np.inf)

        begun = dict(zip(models, pool.map(begin, models), strict=True))
        tasks = {}
        for name, (made, watched, unclipped) in begun.items():
            thresholds: dict[str, Any] = {f"{x:g}": x for x in settings.max_norms}
            thresholds |= {
                "norms alone": watched.norms_alone,
                "suggested": watched.suggested,
                "at lowest": watched.suggested[:, :, :1],
                "tenth": watched.norms_alone / 10,
            }
            tasks[name] = {
                contender: pool.submit(made.train, threshold)
                for contender, threshold in thresholds.items()
            } | {"unclipped": pool.submit(lambda x=unclipped: x)}
        return {
            name: (begun[name][1], {k: task.result() for k, task in of_name.items()})
            for name, of_name in tasks.items()
        }


# What is measured ---------------------------------------------------------------------


def measure(
    watched: Watched,
    finals: dict[str, np.ndarray],
    trivial: float,
    settings: stability.Settings,
) -> list[list[dict[str, Any]]]:
    """Of each optimizer and scale what each contender comes to, by learning rate."""
    medians = {name: np.median(x, axis=-1) for name, x in finals.items()}
    sweep = ["unclipped", *(f"{x:g}" for x in settings.max_norms)]
    lowest = np.min([medians[name] for name in sweep], axis=0)
    # As in `stability.py`, by optimizer.
    lowest_of_all = lowest.min(axis=(1, 2))
    bars = np.minimum((trivial + lowest_of_all) / 2, trivial - 0.1)[:, None, None]
    trains = lowest <= bars
    is_healthy = trains & (medians["unclipped"] <= lowest + stability.NEAR)
    is_lost = trains & (medians["unclipped"] > bars)

    def seen(name: str, at: tuple[int, int]) -> dict[str, Any]:
        with np.errstate(invalid="ignore"):
            slower = np.median(finals[name][at] - finals["unclipped"][at], axis=-1)
            regret = np.where(trains[at], medians[name][at] - lowest[at], np.nan)
        return {
            "regret": float(medians[name][at].min() - lowest[at].min()),
            "regret_at_each_rate": regret.tolist(),
            "slowdown": np.where(is_healthy[at], slower, np.nan).tolist(),
            "final_loss": medians[name][at].tolist(),
        }

    num_optimizers, num_scales, _ = lowest.shape
    return [
        [
            {
                "trains": trains[i, j].tolist(),
                "told_if_healthy": watched.is_told[i, j][is_healthy[i, j]].tolist(),
                "told_if_lost": watched.is_told[i, j][is_lost[i, j]].tolist(),
                "max_norm": np.median(watched.suggested[i, j], axis=-1).tolist(),
                "contenders": {name: seen(name, (i, j)) for name in finals},
            }
            for j in range(num_scales)
        ]
        for i in range(num_optimizers)
    ]


def summarize(settings_of: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Over settings, of those in which something trains; empty if there is none."""
    settings_of = [x for x in settings_of if any(x["trains"])]
    if not settings_of:
        return {}

    def of_all(name: str) -> dict[str, float]:
        rows = [setting["contenders"][name] for setting in settings_of]
        regrets = np.array([row["regret"] for row in rows])
        each = np.concatenate([row["regret_at_each_rate"] for row in rows])
        each = each[~np.isnan(each)]
        slower = np.concatenate([row["slowdown"] for row in rows])
        slower = slower[~np.isnan(slower)]
        return {
            "mean regret": float(regrets.mean()),
            "largest regret": float(regrets.max()),
            "mean regret at each rate": float(each.mean()),
            "largest regret at each rate": float(each.max()),
            "share near best": float(np.mean(each <= stability.NEAR)),
            "mean slowdown": float(slower.mean()) if slower.size else math.nan,
            "largest slowdown": float(slower.max()) if slower.size else math.nan,
            "healthy cells": int(slower.size),
        }

    return {name: of_all(name) for name in settings_of[0]["contenders"]}


def told(settings_of: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of runs for which all norms were said to be too large."""
    shares = {}
    for key in ("told_if_healthy", "told_if_lost"):
        runs = [x for setting in settings_of for cell in setting[key] for x in cell]
        shares[key] = float(np.mean(runs)) if runs else math.nan
        shares[f"runs_{key}"] = len(runs)
    return shares


def show(summary: dict[str, Any], shares: dict[str, Any]) -> None:
    for optimizer, rows in summary.items():
        print(
            f"\n{optimizer}\n{'':14}{'regret':>8}{'most':>7}{'each rate':>11}"
            f"{'most':>8}"
            f"{'near best':>11}{'slowdown':>10}{'most':>8}"
        )
        for name, row in rows.items():
            print(
                f"{name:14}{row['mean regret']:8.3f}{row['largest regret']:7.2f}"
                f"{row['mean regret at each rate']:11.3f}"
                f"{row['largest regret at each rate']:8.2f}"
                f"{row['share near best']:11.0%}{row['mean slowdown']:10.3f}"
                f"{row['largest slowdown']:8.3f}"
            )
        print(f"all norms said to be too large: {shares[optimizer]}")


def judge(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal, for both optimizers, and whether it is met."""
    return [
        {
            "optimizer": optimizer,
            "goal": f"{goal} at most {most:g}",
            "found": rows["suggested"][goal],
            "is_met": rows["suggested"][goal] <= most,
        }
        for optimizer, rows in summary.items()
        if rows
        for goal, most in GOALS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short runs")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER / "suggestion.json")
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL
    started = time.monotonic()
    models = stability.make_models(settings)
    runs = run_all(models, settings)
    found = {
        name: measure(*run, models[name][0].trivial, settings)
        for name, run in runs.items()
    }
    by_optimizer = {
        optimizer: [setting for of_model in found.values() for setting in of_model[i]]
        for i, optimizer in enumerate(stability.OPTIMIZERS)
    }
    summary = {name: summarize(x) for name, x in by_optimizer.items()}
    shares = {name: told(x) for name, x in by_optimizer.items()}
    show(summary, shares)
    goals = judge(summary)
    for line in goals:
        print("met" if line["is_met"] else "MISSED", line)
    results = {
        f"{name}, {optimizer}, scale {scale:g}": found[name][i][j]
        for name, (_, scales) in models.items()
        for i, optimizer in enumerate(stability.OPTIMIZERS)
        for j, scale in enumerate(scales)
    }
    content = {
        "first_seed": FIRST_SEED,
        "units": "losses, regrets and slowdowns in nats; lists are by learning rate",
        "goals": goals,
        "summary": summary,
        "told": shares,
        "results": results,
    }
    write(args.out, settings, started, content)


if __name__ == "__main__":
    main()
