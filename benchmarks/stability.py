"""At which learning rates does training work, and how much wider does clipping make it?

A plain RNN, an LSTM and a transformer of characters, on Python's documentation, and
perceptrons of 2, 8 and 32 layers of tanh whose initial parameters are multiplied by 1,
2 or 4, on handwritten digits: tiny, so that there can be many runs. Each is trained
by SGD with momentum of 0.9 and by Adam, at 7 learning rates over two decades, with 5
seeds, for each contender:

* unclipped; and Optax's clip by global norm, at 0.1, 0.3, 1, 3 and 10: "the sweep";
* clips by the norm of each leaf, or each layer of a stacked leaf, at 0.1, 1 and 10;
* `zscore()`, `quantile(0.9, relative_error=0.05)`, `relative_to_mean(warmup=25)`, in
  both scopes. Defaults, but for memory, and as long a warm-up as the other two have,
  since runs are short; until it ends `relative_to_mean` clips to a global norm of 1,
  and the others clip nothing;
* Optax's clip at what `suggest_max_norm` says of the first 40 norms and losses of a run
  that is only watched, of the same seed: at the same learning rate, or at the lowest
  one. Where too few norms are finite for it to say anything, nothing is clipped.

All see the same initial parameters and batches, and all learning rates, seeds and
scales of a contender are one population. The final loss of a run is the held-out one,
mean of the last three evaluations, and infinite if one of those is not finite. A run
trains if that is below a bar for its model and optimizer: half way from what class
frequencies alone give to the lowest median of all cells, and 0.1 nats below the former
at least. Width is the share of runs that train, by learning rate, summed over decades;
two decades and a third is the most. Regret at a learning rate is the median final loss
above the lowest one of the sweep there; "near best" is the share of models, scales and
rates, at which the sweep trains, with a regret of at most 0.05 nats. No contender,
model, learning rate or seed was left out after its result was seen. Run `python -m
benchmarks.stability`.

`--goals` runs unclipped, Optax's clips and the bounds of `_goals.BOUNDS` only, and says
which of the goals of `_goals` are met; `--seeds 100..104` takes other seeds.
"""

import argparse
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import optax_guard as og
from benchmarks import _goals, _models, _text_run
from benchmarks._results import FOLDER, write
from benchmarks.pictures import draw
from optax_guard.analysis import suggest_max_norm
from optax_guard.flax import TrainState
from optax_guard.loops import train_population


class Settings(NamedTuple):
    """All numbers of the study but those of the models."""

    seeds: int = 5
    first_seed: int = 0
    steps: int = 100
    eval_every: int = 10
    watched: int = 40  # 0: nothing is suggested.
    num_rates: int = 7
    max_norms: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    leaf_max_norms: tuple[float, ...] = (0.1, 1.0, 10.0)
    scales: tuple[float, ...] = (1.0, 2.0, 4.0)  # Of the perceptrons.
    width: int = 16
    embedding: int = 16
    window: int = 16
    batch_size: int = 4
    held_out: int = 16  # Windows of text.


QUICK = Settings(seeds=2, steps=60, eval_every=6, num_rates=3)
FULL = Settings(steps=300, eval_every=15, num_rates=13)

# Nats above the best of the sweep that are no loss worth a word.
NEAR = 0.05
RULES = {
    "zscore": og.threshold.zscore(),
    "quantile": og.threshold.quantile(0.9, relative_error=0.05),
    "relative": og.threshold.relative_to_mean(warmup=25),
}
# The lowest and highest learning rate of each.
OPTIMIZERS = {"SGD": (0.03, 3.0), "Adam": (0.002, 0.2)}
TEXT_SIZES = "width", "embedding", "window", "batch_size", "held_out"
Models = dict[str, tuple[_models.Model, tuple[float, ...]]]


def make_models(settings: Settings) -> Models:
    """Each model, and its initial scales."""
    sizes = {name: getattr(settings, name) for name in TEXT_SIZES}
    of_text = _text_run.Settings(**sizes)
    text = {
        name: (_models.text_model(kind, of_text), (1.0,))
        for name, kind in {
            "RNN": "rnn",
            "LSTM": "lstm",
            "transformer": "transformer",
        }.items()
    }
    perceptrons = {
        f"MLP {depth}": (_models.perceptron(depth, settings.width), settings.scales)
        for depth in (2, 8, 32)
    }
    return text | perceptrons


def rates_of(optimizer: str, settings: Settings) -> np.ndarray:
    return np.geomspace(*OPTIMIZERS[optimizer], settings.num_rates)


def sgd_or_adam(is_adam: Any, learning_rate: Any) -> optax.GradientTransformation:
    """Either, by a traced choice: what costs most here is to compile a program."""
    both = optax.trace(decay=0.9), optax.scale_by_adam()

    def init(params: Any) -> Any:
        return tuple(each.init(params) for each in both)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        by_sgd, by_adam = (
            each.update(updates, of_each)
            for each, of_each in zip(both, state, strict=True)
        )
        step = jax.tree.map(
            lambda a, b: -learning_rate * jnp.where(is_adam, a, b),
            by_adam[0],
            by_sgd[0],
        )
        return step, (by_sgd[1], by_adam[1])

    return optax.GradientTransformation(init, update)


# Runs -------------------------------------------------------------------------------


class Cells(NamedTuple):
    """Float arrays, each [optimizer, scale, learning rate, seed]."""

    final: np.ndarray  # Loss, infinite if it is not finite; as is the next.
    best: np.ndarray
    max_norm: np.ndarray  # Infinite if there is none.


def clips_of(model: _models.Model) -> dict[str, Callable[[Any], Any]]:
    """Each kind of clip, of a threshold that it may not need."""
    by_leaf = functools.partial(og.clip_by_leaf_norm, layer_axis=model.layer_axis)
    clips: dict[str, Callable[[Any], Any]] = {
        "optax": optax.clip_by_global_norm,
        "leaf": by_leaf,
    }
    for name, rule in RULES.items():
        clips[name] = lambda _, rule=rule: og.clip_by_global_norm(rule)
        clips[f"{name}, leaf"] = lambda _, rule=rule: by_leaf(rule)
    return clips


def kinds_of(model: _models.Model) -> dict[str, Callable[[Any, Any], Any]]:
    """Each kind of contender, of a threshold and an optimizer; a program each."""

    def before(clip: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda max_norm, inner: optax.chain(clip(max_norm), inner)

    clips = {name: before(clip) for name, clip in clips_of(model).items()}
    return clips | _goals.bounds_of(model.layer_axis)


def make_inputs(model: _models.Model, settings: Settings) -> tuple[Any, ...]:
    """Data, and of each seed the initial parameters and where its batches lie."""
    seeds = settings.first_seed + np.arange(settings.seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    shape = settings.steps, settings.batch_size
    places = [
        np.random.default_rng(int(seed)).integers(0, model.num_places, shape)
        for seed in seeds
    ]
    params = jax.jit(jax.vmap(model.init))(keys)
    return model.data, model.held_out, params, jnp.asarray(np.array(places, np.int32))


def make_build(
    model: _models.Model,
    inputs: tuple[Any, ...],
    transformation: Callable[[Any], Any],
    is_evaluated: bool,
) -> Partial:
    """What `train_population` builds each member by, from its four numbers."""

    def build(
        data: Any, held_out: Any, params: Any, places: Any, member: Any
    ) -> dict[str, Any]:
        seed, scale = member["seed"], member["scale"]

        def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            loss, grads = jax.value_and_grad(model.loss_of)(state.params, batch)
            return state.apply_gradients(grads=grads, value=loss), loss

        parts = {
            "state": TrainState.create(
                apply_fn=model.loss_of,
                params=jax.tree.map(lambda p: scale * p[seed], params),
                tx=transformation(member),
            ),
            "train_step": train_step,
            "batches": lambda step: model.batch(data, places[seed, step]),
        }
        if is_evaluated:
            parts["evaluate"] = lambda state: model.loss_of(state.params, held_out)
        return parts

    return Partial(build, *inputs)


def run_kind(
    model: _models.Model,
    inputs: tuple[Any, ...],
    scales: tuple[float, ...],
    kind: str,
    settings: Settings,
) -> dict[str, Cells]:
    """All runs of the contenders of this kind."""
    of_kind = kinds_of(model)[kind]
    rates = [rates_of(optimizer, settings) for optimizer in OPTIMIZERS]
    shape = len(rates), len(scales), settings.num_rates, settings.seeds
    places = np.indices(shape).reshape(len(shape), -1)
    members = {
        "is_adam": places[0] == list(OPTIMIZERS).index("Adam"),
        "scale": np.array(scales, np.float32)[places[1]],
        "learning_rate": np.array(rates, np.float32)[places[0], places[2]],
        "seed": places[3].astype(np.int32),
    }

    def optimizer(member: Any) -> Any:
        return sgd_or_adam(member["is_adam"], member["learning_rate"])

    def transformation(member: Any) -> Any:
        return of_kind(member["max_norm"], optimizer(member))

    build = make_build(model, inputs, transformation, is_evaluated=True)

    def train(max_norm: Any) -> Cells:
        max_norm = np.broadcast_to(np.asarray(max_norm, np.float32), shape)
        result = train_population(
            build,
            members | {"max_norm": max_norm.ravel()},
            num_steps=settings.steps,
            eval_every=settings.eval_every,
        )
        values = np.asarray(result.history["value"], np.float64)
        values = np.where(np.isfinite(values), values, np.inf)
        last = values[:, -3:].mean(axis=1)
        return Cells(last.reshape(shape), values.min(axis=1).reshape(shape), max_norm)

    if kind not in ("optax", "leaf"):
        return {kind: train(np.inf)}
    if kind == "leaf":
        return {f"leaf {norm:g}": train(norm) for norm in settings.leaf_max_norms}
    swept = {
        "unclipped": train(np.inf),
        **{f"optax {norm:g}": train(norm) for norm in settings.max_norms},
    }
    if not settings.watched:
        return swept
    watched = train_population(
        make_build(model, inputs, lambda m: og.guard(optimizer(m)), is_evaluated=False),
        members,
        num_steps=settings.watched,
        eval_every=1,
    )
    columns = (np.asarray(watched.history[x]) for x in ("grad_norm", "train_loss"))
    pairs = zip(*columns, strict=True)
    suggested = np.array([suggestion(*pair) for pair in pairs]).reshape(shape)
    at_lowest = np.broadcast_to(suggested[:, :, :1], shape)
    return swept | {
        "suggested": train(suggested),
        "suggested at lowest": train(at_lowest),
    }


def suggestion(norms: np.ndarray, losses: np.ndarray | None = None) -> float:
    """What `suggest_max_norm` says of the norms of all steps; inf if nothing."""
    columns = {"grad_norm": norms}
    if losses is not None:
        columns["train_loss"] = losses
    rows = [
        {"step": i + 1} | {name: float(x[i]) for name, x in columns.items()}
        for i in range(len(norms))
    ]
    try:
        return suggest_max_norm(rows).max_norm
    except ValueError:
        return math.inf


def study(
    settings: Settings, models: Models, kinds: Iterable[str] | None = None
) -> dict[str, dict[str, Cells]]:
    """All runs, by model and by contender; of some kinds only, if that is said."""
    runs: dict[str, list[Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (model, scales) in models.items():
            inputs = make_inputs(model, settings)
            runs[name] = [
                pool.submit(run_kind, model, inputs, scales, kind, settings)
                for kind in (kinds or clips_of(model))
            ]
        return {
            name: {
                contender: cells
                for kind in of_kinds
                for contender, cells in kind.result().items()
            }
            for name, of_kinds in runs.items()
        }


# What is measured ---------------------------------------------------------------------


def is_swept(contender: str) -> bool:
    return contender == "unclipped" or contender.startswith("optax ")


def measure(cells: dict[str, Cells], trivial: float) -> list[list[dict[str, Any]]]:
    """For each optimizer and scale what was seen; lists are by learning rate."""
    medians = {name: np.median(each.final, axis=-1) for name, each in cells.items()}
    sweep = [medians[name] for name in cells if is_swept(name)]
    lowest = np.min(sweep, axis=0)
    lowest_of_all = np.min(list(medians.values()), axis=(0, 2, 3))
    # One for each optimizer.
    bars = np.minimum((trivial + lowest_of_all) / 2, trivial - 0.1)
    num_optimizers, num_scales, num_rates = lowest.shape
    decades = 2 / (num_rates - 1)

    def seen(name: str, at: tuple[int, int]) -> dict[str, Any]:
        is_trained = cells[name].final[at] <= bars[at[0]]
        median = medians[name][at]
        # Where nothing in the sweep trains there is nothing to regret.
        regret = np.where(lowest[at] <= bars[at[0]], median - lowest[at], np.nan)
        return {
            "width": float(is_trained.mean(axis=1).sum() * decades),
            "seeds_that_train": is_trained.sum(axis=1).tolist(),
            "final_loss": median.tolist(),
            "best_loss": np.median(cells[name].best[at], axis=-1).tolist(),
            "max_norm": np.median(cells[name].max_norm[at], axis=-1).tolist(),
            "regret": regret.tolist(),
            "regret_at_best_rate": float(median.min() - lowest[at].min()),
        }

    return [
        [
            {"bar": float(bars[i]), "contenders": {n: seen(n, (i, j)) for n in cells}}
            for j in range(num_scales)
        ]
        for i in range(num_optimizers)
    ]


def summarize(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """For each optimizer and contender what it comes to over models and scales."""

    def of_all(settings: list[dict[str, Any]], name: str) -> dict[str, float]:
        rows = [setting["contenders"][name] for setting in settings]
        base = [setting["contenders"]["unclipped"]["width"] for setting in settings]
        gains = np.array([row["width"] for row in rows]) - base
        regrets = np.array([row["regret"] for row in rows])
        # Where nothing trains at the best rate either, there is no choice to judge.
        at_best = [
            row["regret_at_best_rate"]
            for row, of_rates in zip(rows, regrets, strict=True)
            if not np.isnan(of_rates).all()
        ]
        return {
            "mean_width": float(np.mean([row["width"] for row in rows])),
            "wider_than_unclipped": int(np.sum(gains > 0)),
            "narrower_than_unclipped": int(np.sum(gains < 0)),
            "mean_regret_at_best_rate": float(np.mean(at_best)),
            "largest_regret_at_best_rate": float(np.max(at_best)),
            "share_near_best": float(np.mean(regrets[~np.isnan(regrets)] <= NEAR)),
        }

    summary = {}
    for i, optimizer in enumerate(OPTIMIZERS):
        settings = [
            setting for by_optimizer in found.values() for setting in by_optimizer[i]
        ]
        names = settings[0]["contenders"]
        summary[optimizer] = {name: of_all(settings, name) for name in names}
    return summary


def show(summary: dict[str, Any]) -> None:
    """Prints a table for each optimizer."""
    for optimizer, rows in summary.items():
        print(
            f"\n{optimizer}: over all models and scales\n{'':20}"
            f"{'width':>7}{'wider':>7}{'narrower':>10}{'regret':>8}{'most':>7}"
            f"{'near best':>11}"
        )
        for name, row in rows.items():
            print(
                f"{name:20}{row['mean_width']:7.2f}{row['wider_than_unclipped']:7}"
                f"{row['narrower_than_unclipped']:10}"
                f"{row['mean_regret_at_best_rate']:8.3f}"
                f"{row['largest_regret_at_best_rate']:7.2f}"
                f"{row['share_near_best']:11.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few and short runs")
    size.add_argument("--full", action="store_true", help="longer, and more rates")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    parser.add_argument(
        "--goals", action="store_true", help="bounds; which goals are met"
    )
    parser.add_argument("--seeds", default=None, help="first..last, such as 100..104")
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    if args.seeds:
        first, last = (int(x) for x in args.seeds.split(".."))
        settings = settings._replace(first_seed=first, seeds=last - first + 1)
    if args.goals:
        settings = settings._replace(watched=0)
    # A GPU would else multiply with ten bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    started = time.monotonic()
    models = make_models(settings)
    runs = study(settings, models, ["optax", *_goals.BOUNDS] if args.goals else None)
    found = {
        name: measure(cells, models[name][0].trivial) for name, cells in runs.items()
    }
    summary = summarize(found)
    show(summary)
    name = "stability"
    goals: dict[str, Any] = {}
    if args.goals:
        name = "stability_goals"
        goals = _goals.judge(found, summary, settings)
    results = {
        f"{name}, {optimizer}, scale {scale:g}": found[name][i][j]
        for name, (_, scales) in models.items()
        for i, optimizer in enumerate(OPTIMIZERS)
        for j, scale in enumerate(scales)
    }
    content = {
        "learning_rates": {
            name: rates_of(name, settings).tolist() for name in OPTIMIZERS
        },
        "trivial_loss": {name: model.trivial for name, (model, _) in models.items()},
        "units": "losses and regrets in nats, medians over seeds; widths in decades; "
        "lists are by learning rate",
        "summary": summary,
        **goals,
        "results": results,
    }
    path = args.out / f"{name}.json"
    write(path, settings, started, content)
    if not args.goals:
        draw("stability", path)


if __name__ == "__main__":
    main()
