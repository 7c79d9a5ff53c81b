"""Are the verdicts right? Precision and recall of `diagnose` on runs of known faults.

Three small models (digits with SGD, characters with Adam, an LSTM with AdamW) are
trained in many ways: well, with one of the faults that `diagnose` knows, or with one
that it must not take for another. What was done to a run says which findings are due,
and which are true as well, as that norms change level once a run has exploded; these
count neither way. All others are false alarms. Learning rates vary by seed over a
factor of 4, thresholds over a factor of 2.

What is due and what is also true was written down before any run was diagnosed. Rules
and treatments may be mended by what the first half of the seeds shows; what is reported
is the second half, which nobody had looked at. Run `python -m benchmarks.verdicts`.
"""

import argparse
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import optax_guard as og
from benchmarks import _text_run, generalization
from benchmarks._results import FOLDER, write
from benchmarks._small_runs import (
    NUM_DIGITS,
    Data,
    Task,
    apply_layers,
    batch_of,
    characters,
    digits,
    init_layers,
    loss_of,
)
from optax_guard._cli.demo_text import load_text
from optax_guard.analysis import FindingCode, Severity, diagnose
from optax_guard.flax import TrainState
from optax_guard.loops import train_population

Row = dict[str, float]
INF, NAN = math.inf, math.nan


class Settings(NamedTuple):
    """How much is run; half of the seeds are for development."""

    seeds: int = 20
    first_seed: int = 0
    steps: int = 600
    lstm_steps: int = 240
    rows: int = 50
    too_long: int = 100
    few: int = 16


QUICK = Settings(seeds=2, steps=100, lstm_steps=50, rows=25, too_long=20)
FULL = Settings(seeds=100)


# What was done to a run -------------------------------------------------------------


class Fault(NamedTuple):
    """Numbers of a run that may differ between members of a population.

    Rate and thresholds are in units of what suits the model; times in shares of the
    run. Batches from ``begin`` to ``end`` are bad, a share of them, in the ways told
    after it.
    """

    rate: float = 1.0
    decays: float = 1.0
    late_rate: float = 1.0
    clip: float = INF
    clip_from: float = 0.0
    skip_above: float = INF
    begin: float = 0.0
    end: float = 0.0
    share: float = 1.0
    loss_factor: float = 1.0
    loss_offset: float = 0.0
    input_factor: float = 1.0
    shuffled: float = 0.0


class Treatment(NamedTuple):
    """What is done, which findings are due for it, and which are also true.

    Attributes:
      fault: The numbers.
      due: Findings without which the verdict is wrong.
      true: Findings that follow from what was done; counted neither way.
      kind: ``clip`` by global norm, ``guard`` around that, or clip by ``value``.
      only: Models that it is done to; all three if empty.
      ends: How the record ends: where the run does, ``cut`` at a third, or where
        ``patience`` stops it on few validation examples.
    """

    fault: Fault
    due: frozenset[str] = frozenset()
    true: frozenset[str] = frozenset()
    kind: str = "clip"
    only: tuple[str, ...] = ()
    ends: str = ""


def codes(*names: str) -> frozenset[str]:
    return frozenset(str(FindingCode[name]) for name in names)


WORKS = codes("CLIPPING_WORKS")
STILL_FALLS = codes("STOPPED_TOO_EARLY")
# Of a run that was ruined, all of these may be true.
RUINED = codes("EXPLODING", "REGIME_SHIFT", "VANISHING")
# As may these where norms are of another size for good.
OTHER_SCALE = codes("CLIPPING_WORKS", "OVER_CLIPPED")
TREATMENTS = {
    "healthy, no clip": Treatment(Fault()),
    "healthy, clip at the typical norm": Treatment(Fault(clip=1.0), WORKS),
    "healthy, 1 batch in 50 NaN, guarded": Treatment(
        Fault(clip=1.0, end=1.0, share=0.02, loss_factor=NAN), WORKS, kind="guard"
    ),
    "healthy, 1 batch in 100 x 1e4, clipped": Treatment(
        Fault(clip=1.0, end=1.0, share=0.01, loss_factor=1e4), WORKS
    ),
    "healthy, learning rate / 10 midway": Treatment(
        Fault(decays=0.0, late_rate=0.1), true=codes("REGIME_SHIFT")
    ),
    "learning rate x 100, no clip": Treatment(
        Fault(rate=100.0), codes("EXPLODING"), RUINED
    ),
    "learning rate x 100, clipped": Treatment(
        Fault(rate=100.0, clip=1.0), codes("EXPLODING"), RUINED
    ),
    "learning rate x 100 midway, no clip": Treatment(
        Fault(decays=0.0, late_rate=100.0), codes("EXPLODING"), RUINED
    ),
    "NaN batch, no clip": Treatment(
        Fault(begin=0.5, end=0.52, loss_factor=NAN), codes("EXPLODING")
    ),
    "NaN batch, clipped": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, loss_factor=NAN),
        codes("NONFINITE_LOSS_DESPITE_CLIPPING"),
    ),
    "clip 100 times too tight": Treatment(
        Fault(clip=0.01), codes("OVER_CLIPPED"), STILL_FALLS
    ),
    "clip 100 times too loose": Treatment(Fault(clip=100.0), codes("NEVER_CLIPPED")),
    "clip turned on after bad batches": Treatment(
        Fault(clip=1.0, clip_from=0.5, begin=0.3, end=0.34, loss_factor=100.0),
        codes("CLIPPED_TOO_LATE"),
        RUINED | OTHER_SCALE | codes("NONFINITE_LOSS_DESPITE_CLIPPING"),
    ),
    "values clipped far too tight": Treatment(
        Fault(clip=1e-5),
        codes("DIRECTION_DISTORTED"),
        codes("OVER_CLIPPED") | STILL_FALLS,
        kind="value",
    ),
    "half of the batches NaN, guarded": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, share=0.5, loss_factor=NAN),
        codes("SKIP_STORM"),
        WORKS,
        kind="guard",
    ),
    "skips above 0.7 of the typical norm": Treatment(
        Fault(skip_above=0.7), codes("SKIP_STORM"), STILL_FALLS, kind="guard"
    ),
    "labels shuffled for a while": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, shuffled=1.0),
        codes("LOSS_SPIKE_WITHOUT_NORM_SPIKE"),
        WORKS,
    ),
    "loss misread by 2 nats for a while": Treatment(
        Fault(clip=1.0, begin=0.5, end=0.52, loss_offset=2.0),
        codes("LOSS_SPIKE_WITHOUT_NORM_SPIKE"),
        WORKS,
    ),
    "loss x 5 from midway": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, loss_factor=5.0),
        codes("REGIME_SHIFT"),
        OTHER_SCALE,
    ),
    "inputs x 3 from midway": Treatment(
        Fault(clip=1.0, begin=0.5, end=1.0, input_factor=3.0),
        codes("REGIME_SHIFT"),
        OTHER_SCALE,
    ),
    "cut off at a third": Treatment(
        Fault(rate=0.3, decays=0.0), STILL_FALLS, ends="cut"
    ),
    "patience 3 on 16 examples": Treatment(
        Fault(rate=0.3, decays=0.0),
        codes("SHORT_PATIENCE"),
        STILL_FALLS,
        ends="patience",
    ),
    "12 layers, weights a tenth": Treatment(
        Fault(), codes("VANISHING"), only=("tiny weights",)
    ),
    "12 sigmoid layers": Treatment(
        Fault(), codes("VANISHING"), only=("sigmoid layers",)
    ),
}
# Runs of `generalization.py` to their end.
TOO_LONG_TITLE = "trained too long"
TOO_LONG = Treatment(Fault(), codes("OVERFITTING"))


# The runs -----------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and its data, and what suits it.

    Attributes:
      init: Parameters of a key.
      loss: Of parameters, batch, factor of the inputs, and whether targets are
        shuffled.
      data: ``train`` and ``val``, as `draw` takes them.
      draw: A batch of the data, a key, a step and a size.
      optimizer: Of a learning rate.
      learning_rate: What suits the optimizer.
      typical_norm: Mean norm in the first half of a run, of a seed that is not
        reported.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    data: dict[str, Any]
    draw: Callable[..., Any]
    batch_size: int
    optimizer: Callable[[Any], optax.GradientTransformation]
    learning_rate: float
    typical_norm: float


def of_task(
    task: Task, optimizer: Any, learning_rate: float, typical_norm: float
) -> Subject:
    def loss(params: Any, batch: Data, factor: Any, is_shuffled: Any) -> jax.Array:
        wrong = jnp.roll(batch.targets, 1)
        targets = jnp.where(is_shuffled, wrong, batch.targets)
        return loss_of(task, params, batch._replace(targets=targets), factor)

    return Subject(
        init=task.init,
        loss=loss,
        data=task.split(0),
        draw=batch_of,
        batch_size=32,
        optimizer=optimizer,
        learning_rate=learning_rate,
        typical_norm=typical_norm,
    )


def deep(activation: Any, scale: float, has_bias: bool) -> Task:
    """Digits through 12 hidden layers."""
    task = digits(1200, label_noise=0.0)
    sizes = [64, *[32] * 12, NUM_DIGITS]

    def logits(layers: Any, inputs: Any, factor: Any) -> jax.Array:
        if not has_bias:
            layers = [{**layer, "bias": 0.0} for layer in layers]
        return apply_layers(layers, inputs * factor, activation)

    return task._replace(init=lambda key: init_layers(key, sizes, scale), logits=logits)


def lstm() -> Subject:
    """The model of `bad_batches.py`, smaller; an example is a window of the text."""
    settings = _text_run.Settings(width=32, embedding=16, window=16)
    text = load_text()

    def windows(part: np.ndarray, every: int) -> np.ndarray:
        starts = np.arange(0, len(part) - settings.window - 1, every)
        return part[starts[:, None] + np.arange(settings.window + 1)]

    def draw(data: Any, key: Any, step: Any, size: int) -> jax.Array:
        key = jax.random.fold_in(key, step)
        return data[jax.random.randint(key, (size,), 0, len(data))]

    return Subject(
        init=functools.partial(_text_run.init_params, settings=settings),
        loss=_text_run.loss_of,
        data={
            "train": windows(text.train, 5),
            "val": windows(text.validation, len(text.validation) // 64)[:64],
        },
        draw=draw,
        batch_size=settings.batch_size,
        optimizer=optax.adamw,
        learning_rate=settings.learning_rate,
        typical_norm=0.55,
    )


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "digits": lambda: of_task(digits(1200, label_noise=0.0), sgd, 0.05, 0.9),
    "characters": lambda: of_task(characters(150_000), optax.adam, 2e-3, 1.6),
    "lstm": lstm,
    "tiny weights": lambda: of_task(deep(jnp.tanh, 0.1, False), sgd, 0.05, 1.0),
    "sigmoid layers": lambda: of_task(deep(jax.nn.sigmoid, 1.0, True), sgd, 0.05, 1.0),
}
# Whose own treatment is the only one.
ODD = {name for t in TREATMENTS.values() for name in t.only}


def build(
    subject: Subject, kind: str, num_steps: int, few: int, data: Any, member: Any
) -> dict[str, Any]:
    """A run of `train_population` with a fault."""
    fault = member["fault"]
    keys = jax.random.split(jax.random.key(member["seed"]), 4)
    first, for_batches, for_faults, for_few = keys

    def rate(step: Any) -> jax.Array:
        time = step / num_steps
        decay = jnp.where(fault.decays > 0, 0.5 + 0.5 * jnp.cos(jnp.pi * time), 1.0)
        late = jnp.where(time < 0.5, 1.0, fault.late_rate)
        return subject.learning_rate * fault.rate * decay * late

    def threshold(step: Any) -> jax.Array:
        limit = fault.clip * subject.typical_norm
        return jnp.where(step < fault.clip_from * num_steps, jnp.inf, limit)

    inner = subject.optimizer(rate)
    if kind == "guard":
        too_large = og.skip.norm_above(fault.skip_above * subject.typical_norm)
        # No end of patience, or the run would end.
        tx = og.guard(
            inner, clip=threshold, skip=too_large, max_consecutive_skips=num_steps + 1
        )
    elif kind == "value":
        tx = optax.chain(og.clip_by_value(fault.clip), inner)
    else:
        tx = optax.chain(og.clip_by_global_norm(threshold), inner)

    def batches(step: Any) -> Any:
        time = step / num_steps
        drawn = jax.random.uniform(jax.random.fold_in(for_faults, step))
        is_bad = (time >= fault.begin) & (time < fault.end) & (drawn < fault.share)
        batch = subject.draw(data["train"], for_batches, step, subject.batch_size)
        return batch, is_bad

    def train_step(state: Any, inputs: Any) -> Any:
        batch, is_bad = inputs

        def loss_fn(params: Any) -> jax.Array:
            factor = jnp.where(is_bad, fault.input_factor, 1.0)
            loss = subject.loss(params, batch, factor, is_bad & (fault.shuffled > 0))
            return loss * jnp.where(is_bad, fault.loss_factor, 1.0)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        new = state.apply_gradients(grads=grads, value=loss)
        return new, loss + jnp.where(is_bad, fault.loss_offset, 0.0)

    def evaluate(state: Any) -> dict[str, jax.Array]:
        some = subject.draw(data["val"], for_few, state.step, few)
        return {
            "val_loss": subject.loss(state.params, data["val"], 1.0, False),
            "val_few": subject.loss(state.params, some, 1.0, False),
        }

    params = subject.init(first)
    return {
        "state": TrainState.create(apply_fn=subject.loss, params=params, tx=tx),
        "train_step": train_step,
        "batches": batches,
        "evaluate": evaluate,
    }


class Run(NamedTuple):
    """A recorded run: what was done to it, and its history."""

    treatment: str
    subject: str
    seed: int
    rows: list[Row]


def varied(fault: Fault, seed: int) -> Fault:
    """The fault with another learning rate and threshold, by factors of 2 and 1.4."""
    rate, clip = 2 ** np.random.default_rng(seed).uniform([-1, -0.5], [1, 0.5])
    return fault._replace(rate=fault.rate * rate, clip=fault.clip * clip)


def runs_of(name: str, settings: Settings) -> list[Run]:
    """All runs of a model, a population for each kind of transformation."""
    subject = SUBJECTS[name]()
    num_steps = settings.lstm_steps if name == "lstm" else settings.steps
    mine = {
        title: treatment
        for title, treatment in TREATMENTS.items()
        if name in (treatment.only or SUBJECTS.keys() - ODD)
    }
    runs = []
    for kind in sorted({treatment.kind for treatment in mine.values()}):
        keys = [
            (title, seed)
            for title, treatment in mine.items()
            for seed in seeds_of(settings)
            if treatment.kind == kind
        ]
        faults = [varied(mine[title].fault, seed) for title, seed in keys]
        members = {
            "seed": np.array([seed for _, seed in keys], np.int32),
            "fault": Fault(*np.array(faults, np.float32).T),
        }
        made = functools.partial(build, subject, kind, num_steps, settings.few)
        result = train_population(
            Partial(made, subject.data),
            members,
            num_steps=num_steps,
            eval_every=num_steps // settings.rows,
        )
        columns = jax.device_get(result.history)
        for i, (title, seed) in enumerate(keys):
            rows = [
                {column: values[i, j].item() for column, values in columns.items()}
                for j in range(int(result.num_rows[i]))
            ]
            runs += ended(Run(title, name, seed, rows), mine[title].ends)
    return runs


PATIENCE = og.early_stopping(og.stop.patience(3), nonfinite="wait")


def ended(run: Run, ends: str) -> list[Run]:
    """The run as it is recorded; none where patience did not cut it too short."""
    rows = run.rows
    fulls = [row["val_loss"] for row in rows]
    if ends == "patience":
        state = PATIENCE.init()
        for row in rows:
            state = PATIENCE.update(row["val_few"], state)
        last = int(state.stopped_at)
        # Too short it was if the run, judged on all examples, had 5 % before it.
        if last < 0 or min(fulls) > 0.95 * min(fulls[: last + 1]):
            return []
        rows = [{**row, "val_loss": row["val_few"]} for row in rows[: last + 1]]
    elif ends == "cut":
        rows = rows[: len(rows) // 3]
    rows = [{k: v for k, v in row.items() if k != "val_few"} for row in rows]
    return [run._replace(rows=rows)]


def too_long(settings: Settings) -> list[Run]:
    """The runs of `generalization.py`, to their end."""
    runs = []
    for name, (make, _) in generalization.TASKS.items():
        seeds = list(range(settings.seeds))
        columns = generalization.record(make(), seeds, settings.too_long)
        for seed in seeds:
            rows = [
                {
                    column: values[seed, j].item()
                    for column, values in columns.items()
                    if not column.startswith("test")
                }
                for j in range(settings.too_long)
            ]
            runs.append(Run(TOO_LONG_TITLE, name, seed, rows))
    return runs


# What is measured ---------------------------------------------------------------------


class Judged(NamedTuple):
    """A run and what was found in it."""

    run: Run
    found: frozenset[str]


def judge(runs: list[Run]) -> list[Judged]:
    return [Judged(r, frozenset(str(f.code) for f in diagnose(r.rows))) for r in runs]


def treatment_of(title: str) -> Treatment:
    return {**TREATMENTS, TOO_LONG_TITLE: TOO_LONG}[title]


def by_code(judged: list[Judged]) -> dict[str, dict[str, Any]]:
    """Of each code: how often it was due and found, and where it was no such thing."""
    table = {}
    for code in map(str, FindingCode):
        due = found = alarms = others = 0
        by: dict[str, int] = {}
        for run, codes_found in judged:
            treatment = treatment_of(run.treatment)
            if code in treatment.due:
                due += 1
                found += code in codes_found
            elif code not in treatment.true:
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
        treatment = treatment_of(title)
        shares = {
            code: sum(code in j.found for j in those) / len(those)
            for code in map(str, FindingCode)
        }
        wrong = [
            any(
                FindingCode[code].severity != Severity.INFO
                for code in j.found - treatment.due - treatment.true
            )
            for j in those
        ]
        table[title] = {
            "runs": len(those),
            "due": sorted(treatment.due),
            "also_true": sorted(treatment.true - treatment.due),
            "found": {code: share for code, share in shares.items() if share},
            "share_wrongly_warned": sum(wrong) / len(wrong),
        }
    return table


def halves(judged: list[Judged], settings: Settings) -> dict[str, dict[str, Any]]:
    """Both tables of the development half and of the one that is reported."""
    middle = settings.seeds // 2
    parts = {
        "development": [j for j in judged if j.run.seed < middle],
        "reported": [j for j in judged if j.run.seed >= middle],
    }
    return {
        name: {"by_code": by_code(part), "by_treatment": by_treatment(part)}
        for name, part in parts.items()
    }


# Showing it ---------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints both tables of both halves."""
    for half, found in results.items():
        print(
            f"\n{half}\n{'':32}{'due':>5}{'recall':>8}{'others':>8}{'alarms':>8}",
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


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws which findings each treatment has, and marks those that are due."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    titles = [*TREATMENTS, TOO_LONG_TITLE]
    rows = {
        t: results["by_treatment"][t] for t in titles if t in results["by_treatment"]
    }
    names = [str(code) for code in FindingCode]
    shares = np.array(
        [[row["found"].get(code, 0.0) for code in names] for row in rows.values()]
    )
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    ax = figure.subplots()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for i, row in enumerate(rows.values()):
        for j, code in enumerate(names):
            is_due, is_true = code in row["due"], code in row["also_true"]
            if shares[i, j] or is_due:
                is_wrong = not (is_due or is_true)
                ax.text(
                    j,
                    i,
                    f"{100 * shares[i, j]:.0f}",
                    ha="center",
                    va="center",
                    color="C3" if is_wrong else "black",
                    fontweight="bold" if is_wrong or is_due else "normal",
                )
            if is_due or is_true:
                ax.add_patch(
                    Rectangle(
                        (j - 0.47, i - 0.45),
                        0.94,
                        0.9,
                        fill=False,
                        edgecolor="black" if is_due else "0.6",
                        linewidth=2 if is_due else 1,
                        linestyle="-" if is_due else ":",
                    )
                )
    ax.set_yticks(
        range(len(rows)), [f"{title} ({row['runs']})" for title, row in rows.items()]
    )
    labels = []
    for code in names:
        row = results["by_code"][code]
        both = [
            "-" if math.isnan(row[x]) else f"{100 * row[x]:.0f} %"
            for x in ("precision", "recall")
        ]
        labels.append(f"{code.replace('_', ' ').lower()}\n{both[0]}, {both[1]}")
    ax.set_xticks(
        range(len(names)), labels, rotation=45, ha="left", rotation_mode="anchor"
    )
    ax.xaxis.tick_top()
    ax.set_xlabel(
        "% of the runs with each finding; below its name precision, recall\n"
        "framed: due; dotted: also true; red: false alarm"
    )
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=110)


def study(settings: Settings) -> dict[str, Any]:
    """What was found in all runs, by half."""
    runs = [run for name in SUBJECTS for run in runs_of(name, settings)]
    return halves(judge(runs + too_long(settings)), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two seeds, short runs")
    size.add_argument("--full", action="store_true", help="a hundred seeds")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    settings = QUICK if args.quick else FULL if args.full else Settings()
    started = time.monotonic()
    results = study(settings)
    show(results)
    write(args.out / "verdicts.json", settings, started, results)
    plot(results["reported"], args.out / "verdicts.png")


if __name__ == "__main__":
    main()
