"""When to stop: what does a rule save, and what does it cost on test data?

Two small models learn too much: digits of which three labels in ten are drawn at
random, in training and validation, and the characters of a short text. Each run is
trained to the end once, with validation and test evaluated all along; each stop rule is
then played its validation losses, which is exact, since a stop changes nothing before
it. A seed has its own split or excerpt, label noise, initial parameters and batches.

The rules are patience 1 to 20, Prechelt's 14 criteria and the lag rule, on validation
losses as they are and smoothed. They were listed before any was played; settings of the
training were chosen, on a seed that is not reported, so that runs over-fit.

Beside the parameters of the best evaluation, a stopper could hand back an average: of
the parameters of the last 3, 5 or 10 evaluations, at the best evaluation, at the stop,
or where the average's own validation loss was best until the stop. It wins if, for the
same number and place, the test score's gain over the best parameters is more than two
standard errors with patience 5 and with patience 10, on both tasks. This was written
before any average was computed. `early_stopping(average_last=5)` came of it and was
added later: the mean of the last 5 to 9. Run `python -m benchmarks.generalization`.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

import optax_guard as og
from benchmarks._results import FOLDER, write
from benchmarks._small_runs import (
    Task,
    batch_of,
    characters,
    digits,
    loss_of,
    wrong_share,
)
from optax_guard.flax import TrainState
from optax_guard.loops import train_population


class Settings(NamedTuple):
    """How much is run."""

    seeds: int = 40
    evaluations: int = 150


QUICK = Settings(seeds=4, evaluations=40)
FULL = Settings(seeds=200)

# Rules see the validation loss; this is what the test is scored by.
SCORES = {
    "test_loss": "test loss, nats",
    "test_error": "share of the test that is wrong",
}
# Task -> its score that is drawn: images are classified, a text is predicted.
TASKS: dict[str, tuple[Callable[[], Task], str]] = {
    "digits": (digits, "test_error"),
    "characters": (characters, "test_loss"),
}
# Family -> a rule of a number that may be traced, and the numbers. Prechelt's are those
# of his study.
FAMILIES: dict[str, tuple[Callable[[Any], og.stop.StopRule], tuple[float, ...]]] = {
    "patience": (og.stop.patience, tuple(range(1, 21))),
    "GL": (og.stop.generalization_loss, (1, 2, 3, 5)),
    "PQ": (functools.partial(og.stop.progress_quotient, k=5), (0.5, 0.75, 1, 2, 3)),
    "UP": (functools.partial(og.stop.successive_rises, k=5), (2, 3, 4, 6, 8)),
}
# Here the number is the size of an array, and each rule a program of its own.
LAGS = {k: functools.partial(og.stop.lag, k) for k in (1, 2, 3, 5, 10, 20)}
SMOOTHERS = {
    "raw": None,
    "ema(0.7)": og.stop.ema(0.7),
    "median(5)": og.stop.median(5),
}

# Averages are of the parameters of the last so many evaluations.
AVERAGED = (3, 5, 10)
# And the library's own.
BUILT_IN = "5 to 9"
AVERAGING = og.early_stopping(og.stop.patience(10**6), average_last=5)
CONTENDERS = (*AVERAGED, BUILT_IN)
PLACES = ("at the best", "at the stop", "by its own validation")

Curves = dict[str, np.ndarray]


class Averaging(TrainState):
    """A state that holds the parameters of the last evaluations, in a ring."""

    ring: Any = struct.field(default=None)
    stop: Any = struct.field(default=None)

    def average(self, number: int | str, eval_every: int) -> Any:
        """The mean of the last ``number`` of them, or of as many as there are."""
        if isinstance(number, str):
            return AVERAGING.average(self.stop, self.params)
        evaluation = self.step // eval_every - 1
        ages = (evaluation - jnp.arange(max(AVERAGED))) % max(AVERAGED)
        is_in = (ages < number) & (ages <= evaluation)
        weights = is_in / is_in.sum()
        return jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), self.ring)


def build(task: Task, member: Any, averages: bool = False) -> dict[str, Any]:
    """A run of `train_population`, of which each evaluation is recorded."""
    first, key = jax.random.split(jax.random.key(member["seed"]))
    # Norms are of no use here, but `verdicts.py` reads these runs as well.
    tx = optax.chain(og.record_norm(), optax.adam(task.learning_rate))

    def train_step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: loss_of(task, p, batch))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    def averaging_step(state: Any, batch: Any) -> Any:
        state, loss = train_step(state, batch)
        evaluation, left = jnp.divmod(state.step, task.eval_every)
        place = jnp.where(left == 0, (evaluation - 1) % max(AVERAGED), max(AVERAGED))
        ring = jax.tree.map(
            lambda x, p: x.at[place].set(p, mode="drop"), state.ring, state.params
        )
        stop = jax.lax.cond(
            left == 0,
            lambda: AVERAGING.update(0.0, state.stop, state.params),
            lambda: state.stop,
        )
        return state.replace(ring=ring, stop=stop), loss

    def scores(params: Any) -> dict[str, jax.Array]:
        return {
            "val_loss": loss_of(task, params, member["val"]),
            "test_loss": loss_of(task, params, member["test"]),
            "test_error": wrong_share(task, params, member["test"]),
        }

    def evaluate(state: Any) -> dict[str, jax.Array]:
        found = scores(state.params)
        for number in CONTENDERS if averages else ():
            of_average = scores(state.average(number, task.eval_every))
            found |= {f"{name}_{number}": x for name, x in of_average.items()}
        return found

    params = task.init(first)
    state = TrainState.create(apply_fn=task.logits, params=params, tx=tx)
    if averages:
        ring = jax.tree.map(lambda p: jnp.stack([p] * max(AVERAGED)), params)
        # The best are of no use here.
        stop = AVERAGING.init(params)._replace(best_params=None)
        state = Averaging.create(
            apply_fn=task.logits, params=params, tx=tx, ring=ring, stop=stop
        )
    return {
        "state": state,
        "train_step": averaging_step if averages else train_step,
        "batches": lambda step: batch_of(member["train"], key, step, task.batch_size),
        "evaluate": evaluate,
    }


def record(
    task: Task, seeds: list[int], evaluations: int, averages: bool = False
) -> Curves:
    """Columns of the history of whole runs, [seed, evaluation]."""
    splits = [task.split(seed) for seed in seeds]
    members = jax.tree.map(lambda *parts: np.stack(parts), *splits)
    result = train_population(
        functools.partial(build, task, averages=averages),
        {**members, "seed": np.array(seeds, np.int32)},
        num_steps=evaluations * task.eval_every,
        eval_every=task.eval_every,
    )
    return jax.device_get(result.history)


# What rules make of it --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("make", "smooth"))
def play(make: Any, smooth: Any, numbers: Any, vals: Any, trains: Any) -> Any:
    """Where rules stop, and the best evaluation until there, each [number, seed].

    The last evaluation if a rule does not stop.
    """

    def one(number: Any, val: jax.Array, train: jax.Array) -> Any:
        rule = make() if number is None else make(number)
        stopper = og.early_stopping(rule, smooth=smooth)

        def judge(state: Any, seen: Any) -> Any:
            return stopper.update(seen[0], state, train_value=seen[1]), None

        state, _ = jax.lax.scan(judge, stopper.init(), (val, train))
        last = len(val) - 1
        stopped = jax.numpy.where(state.should_stop, state.stopped_at, last)
        return stopped, state.best_eval, state.should_stop

    by_seed = jax.vmap(one, in_axes=(None, 0, 0))
    if numbers is None:
        return jax.tree.map(lambda x: x[None], by_seed(None, vals, trains))
    return jax.vmap(by_seed, in_axes=(0, None, None))(numbers, vals, trains)


class Stops(NamedTuple):
    """What a rule made of each seed's run, [seed]."""

    stopped: np.ndarray
    best: np.ndarray
    has_stopped: np.ndarray


def stops_of(curves: Curves) -> dict[tuple[str, float, str], Stops]:
    """What each family, number and smoother makes of the runs."""
    seen = curves["val_loss"], curves["train_loss"]
    found = {}
    for smoother, smooth in SMOOTHERS.items():
        for family, (make, numbers) in FAMILIES.items():
            played = jax.device_get(play(make, smooth, np.array(numbers), *seen))
            for number, *row in zip(numbers, *played, strict=True):
                found[family, number, smoother] = Stops(*row)
        for k, make in LAGS.items():
            played = jax.device_get(play(make, smooth, None, *seen))
            found["lag", k, smoother] = Stops(*(x[0] for x in played))
    return found


def mean_and_error(values: np.ndarray) -> list[float]:
    """The mean over seeds, and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return [float(values.mean()), float(error)]


def measure(
    curves: Curves, stops: dict[tuple[str, float, str], Stops], score: str
) -> dict[str, Any]:
    """The reference points, and a row for each rule; means over seeds with errors.

    Percent are above the least score of the same run, which only an oracle knows; of
    the tenth of the seeds that a rule suits least, it is by so much at least.
    """
    test, val = curves[score], curves["val_loss"]
    seeds, num_evaluations = test.shape
    rows = np.arange(seeds)
    oracle = test.min(1)

    def regret(scores: np.ndarray) -> list[float]:
        return mean_and_error(100 * (scores / oracle - 1))

    def worst(scores: np.ndarray) -> float:
        return float(np.quantile(100 * (scores / oracle - 1), 0.9))

    references = {
        "oracle": test.min(1),
        "best_of_all_by_validation": test[rows, val.argmin(1)],
        "end": test[:, -1],
    }
    rules = [
        {
            "family": family,
            "number": number,
            "smoothed": smoother,
            "test": mean_and_error(test[rows, found.best]),
            "percent_above_oracle": regret(test[rows, found.best]),
            "worst_percent_above_oracle": worst(test[rows, found.best]),
            "last_percent_above_oracle": regret(test[rows, found.stopped]),
            "evaluations": mean_and_error(found.stopped + 1.0),
            "percent_saved": 100
            * (1 - float(found.stopped.mean() + 1) / num_evaluations),
            "share_stopped": float(found.has_stopped.mean()),
        }
        for (family, number, smoother), found in stops.items()
    ]
    return {
        "references": {
            name: {"test": mean_and_error(x), "percent_above_oracle": regret(x)}
            for name, x in references.items()
        },
        "oracle_at_evaluation": mean_and_error(test.argmin(1) + 1.0),
        "validation_best_at_evaluation": mean_and_error(val.argmin(1) + 1.0),
        "rules": rules,
    }


def measure_averages(
    curves: Curves, stops: dict[tuple[str, float, str], Stops], score: str
) -> list[dict[str, Any]]:
    """The gain of each average over the best parameters: percent of these, with errors.

    A gain of more than two errors is told as one.
    """
    rows = np.arange(len(curves[score]))
    found = []
    for patience in (5, 10):
        seen = stops["patience", patience, "raw"]
        best = curves[score][rows, seen.best]
        for number in CONTENDERS:
            val, test = curves[f"val_loss_{number}"], curves[f"{score}_{number}"]
            is_seen = np.arange(val.shape[1]) <= seen.stopped[:, None]
            own = np.where(is_seen, val, np.inf).argmin(1)
            for place, at in zip(PLACES, (seen.best, seen.stopped, own), strict=True):
                gain = mean_and_error(100 * (1 - test[rows, at] / best))
                found.append(
                    {
                        "patience": patience,
                        "number": number,
                        "place": place,
                        "percent_gained": gain,
                        "is_gain": gain[0] > 2 * gain[1],
                    }
                )
    return found


def winners(averages: dict[str, list[dict[str, Any]]]) -> list[tuple[int | str, str]]:
    """The averages that gain with both patiences on all tasks, by number and place."""
    rows = [row for of_task in averages.values() for row in of_task]
    return [
        (number, place)
        for number in CONTENDERS
        for place in PLACES
        if all(
            row["is_gain"]
            for row in rows
            if (row["number"], row["place"]) == (number, place)
        )
    ]


# Showing it ---------------------------------------------------------------------------


def name_of(row: dict[str, Any]) -> str:
    smoothed = "" if row["smoothed"] == "raw" else f", {row['smoothed']}"
    return f"{row['family']}({row['number']:g}){smoothed}"


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Prints what each rule has saved and cost."""
    for task, by_score in results.items():
        for score, found in by_score.items():
            at = found["oracle_at_evaluation"][0]
            print(
                f"\n{task}, {SCORES[score]}: least at evaluation {at:.1f} on the mean"
            )
            for name, row in found["references"].items():
                above, error = row["percent_above_oracle"]
                print(f"{name:28}{row['test'][0]:9.4f}{above:8.1f} % +- {error:.1f}")
            print(
                f"{'':28}{'test':>9}{'% above':>9}{'+-':>6}{'last':>8}{'worst':>8}"
                f"{'used':>8}{'saved':>9}"
            )
            for row in found["rules"]:
                above, error = row["percent_above_oracle"]
                print(
                    f"{name_of(row):28}{row['test'][0]:9.4f}{above:9.2f}{error:6.2f}"
                    f"{row['last_percent_above_oracle'][0]:8.2f}"
                    f"{row['worst_percent_above_oracle']:8.2f}"
                    f"{row['evaluations'][0]:8.1f}{row['percent_saved']:8.1f}%"
                )


def plot(
    results: dict[str, Any], curves: dict[str, Curves], path: pathlib.Path
) -> None:
    """Draws Prechelt's trade-off for each task, above it the curves of some seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=[1, 2.2])
    families = [*FAMILIES, "lag"]
    colors = {family: f"C{i}" for i, family in enumerate(families)}
    markers = dict(zip(SMOOTHERS, "o^s", strict=True))
    # Where points of several families lie on each other, their numbers do not.
    below_by = dict(zip(families, (7, -13, -35, -24, 18), strict=True))
    for i, (task, by_score) in enumerate(results.items()):
        score = TASKS[task][1]
        found = by_score[score]
        draw_curves(axes[0, i], curves[task][score], SCORES[score])
        axes[0, i].set_title(task)
        ax = axes[1, i]
        for row in found["rules"]:
            family, smoother = row["family"], row["smoothed"]
            at = row["evaluations"][0], row["percent_above_oracle"][0]
            ax.plot(
                *at,
                color=colors[family],
                marker=markers[smoother],
                markersize=5,
                markerfacecolor=colors[family] if smoother == "raw" else "none",
            )
            is_told = family != "patience" or row["number"] in (1, 2, 3, 5, 10, 20)
            if smoother == "raw" and is_told:
                ax.annotate(
                    f"{row['number']:g}",
                    at,
                    xytext=(0, below_by[family]),
                    textcoords="offset points",
                    ha="center",
                    color=colors[family],
                    fontsize=8,
                )
        end, best = (
            found["references"][name]["percent_above_oracle"][0]
            for name in ("end", "best_of_all_by_validation")
        )
        ax.axhline(best, color="black", linewidth=0.9, linestyle="-.")
        ax.axvline(found["oracle_at_evaluation"][0], color="0.6", linewidth=0.9)
        ax.text(
            0.98,
            0.95,
            f"last parameters of all {curves[task][score].shape[1]}: {end:.0f} %",
            transform=ax.transAxes,
            ha="right",
        )
        ax.set_ylim(0, 1.1 * max(r["percent_above_oracle"][0] for r in found["rules"]))
        ax.set_xscale("log")
        ticks = (10, 15, 20, 30, 50, 100, 150)
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set_xlim(8, 1.1 * curves[task][score].shape[1])
        ax.set_xlabel("evaluations used (mean)")
        ax.set_ylabel("test score of what is handed back,\n% above the oracle's")
    ax = axes[1, 0]
    handles = [
        *(ax.plot([], [], "o", color=c, label=f)[0] for f, c in colors.items()),
        *(
            ax.plot(
                [],
                [],
                marker=marker,
                color="0.3",
                markerfacecolor="0.3" if smoother == "raw" else "none",
                linestyle="",
                label=smoother if smoother == "raw" else f"smoothed, {smoother}",
            )[0]
            for smoother, marker in markers.items()
        ),
        ax.plot([], [], "k-.", label="never stopped, best by validation")[0],
        ax.plot([], [], color="0.6", label="the oracle stops (mean)")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def draw_curves(ax: Any, test: np.ndarray, label: str) -> None:
    """Draws test scores over evaluations, of ten seeds and the mean of all."""
    x = np.arange(1, test.shape[1] + 1)
    for one in test[:10]:
        ax.plot(x, one, color="0.75", linewidth=0.8)
    ax.plot([], [], color="0.75", label="ten seeds")
    ax.plot(x, test.mean(0), color="black", label="mean of all")
    ax.set_ylabel(label)
    ax.set_xlabel("evaluation")
    ax.set_ylim(0.97 * test.min(), np.quantile(test[:, 5:], 0.999))
    ax.legend(loc="upper center", ncols=2, frameon=False)


def study(
    settings: Settings,
) -> tuple[dict[str, Curves], dict[str, Any], dict[str, Any]]:
    """The recorded runs by task; what was measured, by task and score; averages."""
    curves = {
        name: record(make(), list(range(settings.seeds)), settings.evaluations, True)
        for name, (make, _) in TASKS.items()
    }
    results, averages = {}, {}
    for name, found in curves.items():
        stops = stops_of(found)
        results[name] = {score: measure(found, stops, score) for score in SCORES}
        averages[name] = measure_averages(found, stops, TASKS[name][1])
    return curves, results, averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="four seeds, short runs")
    size.add_argument("--full", action="store_true", help="two hundred seeds")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    started = time.monotonic()
    curves, results, averages = study(settings)
    show(results)
    for task, rows in averages.items():
        print(f"\n{task}: gain of an average, % of {TASKS[task][1]}, with its error")
        for row in rows:
            gain, error = row["percent_gained"]
            print(
                f"patience {row['patience']:2}, last {row['number']!s:6} "
                f"{row['place']:24}{gain:8.2f} +- {error:.2f}"
            )
    print(f"averages that win: {winners(averages) or 'none'}")
    content = {
        "results": results,
        "averages": averages,
        "averages_that_win": [list(x) for x in winners(averages)],
    }
    write(args.out / "generalization.json", settings, started, content)
    plot(results, curves, args.out / "generalization.png")


if __name__ == "__main__":
    main()
