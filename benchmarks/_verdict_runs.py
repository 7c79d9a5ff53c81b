"""The runs of `verdicts.py`: models, faults, and the rows that are recorded."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import optax_guard as og
from benchmarks import _held_out, _text_run, generalization
from benchmarks._faults import TOO_LONG_TITLE, TREATMENTS, UNTREATED, Fault, findings_of
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
from optax_guard.flax import TrainState
from optax_guard.loops import train_population
from optax_guard.loops._last_step import last_step_facts

Row = dict[str, float]


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
      failures: Of parameters and data, instead of a validation loss.
      decimals: To which losses are rounded in the record.
      eval_every: Steps in a row of the record; as many as give `Settings.rows` if None.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    data: dict[str, Any]
    draw: Callable[..., Any]
    batch_size: int
    optimizer: Callable[[Any], optax.GradientTransformation]
    learning_rate: float
    typical_norm: float
    failures: Callable[[Any, Any], jax.Array] | None = None
    decimals: int | None = None
    eval_every: int | None = None


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


def policy() -> Subject:
    made = _held_out.policy()
    return Subject(
        init=made.init,
        loss=made.loss,
        data=made.data,
        draw=made.draw,
        batch_size=2,
        optimizer=optax.adam,
        learning_rate=1e-3,
        typical_norm=1.15,
        failures=made.failures,
        eval_every=1,
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "digits": lambda: of_task(digits(1200, label_noise=0.0), sgd, 0.05, 0.9),
    "characters": lambda: of_task(characters(150_000), optax.adam, 2e-3, 1.6),
    "lstm": lstm,
    "tiny weights": lambda: of_task(deep(jnp.tanh, 0.1, False), sgd, 0.05, 1.0),
    "sigmoid layers": lambda: of_task(deep(jax.nn.sigmoid, 1.0, True), sgd, 0.05, 1.0),
    "convolution": lambda: of_task(_held_out.convolution(), optax.adam, 3e-3, 1.65),
    "fine-tuning": lambda: of_task(
        _held_out.fine_tuning(), optax.adamw, 3e-4, 0.95
    )._replace(decimals=4),
    "policy": policy,
}
HELD_OUT = ("convolution", "fine-tuning", "policy")
# Whose own treatment is the only one.
ODD = {name for t in TREATMENTS.values() for name in t.only}


class Recorded(TrainState):
    """With the parameters before the last step."""

    before: Any = None


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
        grown = fault.growth**time
        return subject.learning_rate * fault.rate * decay * late * grown

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
        new = new.replace(before=state.params)
        return new, loss + jnp.where(is_bad, fault.loss_offset, 0.0)

    def evaluate(state: Any) -> dict[str, jax.Array]:
        last = last_step_facts(state.before, state.params, state.opt_state)
        if subject.failures is not None:
            return {
                **last,
                "failures": subject.failures(state.params, data["val"]),
            }
        some = subject.draw(data["val"], for_few, state.step, few)
        return {
            **last,
            "val_loss": subject.loss(state.params, data["val"], 1.0, False),
            "val_few": subject.loss(state.params, some, 1.0, False),
        }

    params = subject.init(first)
    state = Recorded.create(
        apply_fn=subject.loss,
        params=params,
        tx=tx,
        before=params,
    )
    return {
        "state": state,
        "train_step": train_step,
        "batches": batches,
        "evaluate": evaluate,
    }


class Settings(NamedTuple):
    """How much is run; `rows` of each run are recorded."""

    seeds: int = 3
    first_seed: int = 200
    steps: int = 600
    lstm_steps: int = 240
    policy_steps: int = 200
    rows: int = 50
    too_long: int = 100
    few: int = 16
    healthy: int = 25


class Run(NamedTuple):
    """A recorded run: what was done to it, its history, and what is due and true."""

    treatment: str
    subject: str
    seed: int
    rows: list[Row]
    due: frozenset[str] = frozenset()
    true: frozenset[str] = frozenset()


def varied(fault: Fault, seed: int) -> Fault:
    """The fault with another learning rate and threshold, by factors of 2 and 1.4."""
    rate, clip = 2 ** np.random.default_rng(seed).uniform([-1, -0.5], [1, 0.5])
    return fault._replace(rate=fault.rate * rate, clip=fault.clip * clip)


def treatments_of(name: str) -> tuple[str, ...]:
    """What is done to a model."""
    return tuple(
        title
        for title, treatment in TREATMENTS.items()
        if (treatment.on_policy if name == "policy" else True)
        and name in (treatment.only or SUBJECTS.keys() - ODD)
    )


def runs_of(name: str, titles: tuple[str, ...], settings: Settings) -> list[Run]:
    """Runs of a model, a population for each kind of transformation."""
    subject = SUBJECTS[name]()
    steps = {"lstm": settings.lstm_steps, "policy": settings.policy_steps}
    num_steps = steps.get(name, settings.steps)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    runs = []
    for kind in sorted({TREATMENTS[title].kind for title in titles}):
        keys = [
            (title, seed)
            for title in titles
            for seed in seeds
            if TREATMENTS[title].kind == kind
        ]
        faults = [varied(TREATMENTS[title].fault, seed) for title, seed in keys]
        members = {
            "seed": np.array([seed for _, seed in keys], np.int32),
            "fault": Fault(*np.array(faults, np.float32).T),
        }
        made = functools.partial(build, subject, kind, num_steps, settings.few)
        result = train_population(
            Partial(made, subject.data),
            members,
            num_steps=num_steps,
            eval_every=subject.eval_every or num_steps // settings.rows,
        )
        columns = jax.device_get(result.history)
        initial = first_values(subject, members["seed"])
        for i, (title, seed) in enumerate(keys):
            rows = [
                {column: values[i, j].item() for column, values in columns.items()}
                for j in range(int(result.num_rows[i]))
            ]
            if initial is not None:
                rows[0]["initial_value"] = initial[i].item()
            runs += ended(Run(title, name, seed, rows), subject.decimals)
    return with_findings(runs)


def first_values(subject: Subject, seeds: np.ndarray) -> np.ndarray | None:
    """The validation losses before the first step, as `fit` records them."""
    if subject.failures is not None:
        return None

    @jax.jit
    @jax.vmap
    def first(seed: jax.Array) -> jax.Array:
        params = subject.init(jax.random.split(jax.random.key(seed), 4)[0])
        return subject.loss(params, subject.data["val"], 1.0, False)

    return np.asarray(first(seeds))


# Model and treatment of the healthy runs.
KINDS = [
    ("digits", "healthy, no clip"),
    ("digits", "healthy, 1 batch in 100 x 1e4, clipped"),
    ("characters", "healthy, clip at the typical norm"),
    ("characters", "healthy, 1 batch in 50 NaN, guarded"),
    ("lstm", "healthy, clip at the typical norm"),
    ("convolution", "healthy, learning rate / 10 midway"),
    ("fine-tuning", "healthy, no clip"),
    ("policy", "healthy, no clip"),
]


def healthy_runs(settings: Settings) -> list[Run]:
    """Runs of each kind with seeds of their own."""
    mine = settings._replace(
        seeds=settings.healthy, first_seed=settings.first_seed + 1000
    )
    return [run for name, title in KINDS for run in runs_of(name, (title,), mine)]


PATIENCE = og.early_stopping(og.stop.patience(3), nonfinite="wait")


def ended(run: Run, decimals: int | None = None) -> list[Run]:
    """The run as it is recorded; none where the end came not too early after all.

    It came too early if the whole run brought a loss that is better by 5 %, judged on
    all examples.
    """
    rows, ends = run.rows, TREATMENTS[run.treatment].ends
    last = len(rows) - 1
    if ends == "patience":
        state = PATIENCE.init()
        for row in rows:
            state = PATIENCE.update(row["val_few"], state)
        last = int(state.stopped_at)
        rows = [{**row, "val_loss": row["val_few"]} for row in rows]
    elif ends:
        last = 3 if ends == "four" else len(rows) // 3 - 1
    if ends in ("patience", "cut"):
        fulls = [row["val_loss"] for row in run.rows]
        if last < 0 or min(fulls) > 0.95 * min(fulls[: last + 1]):
            return []
    rows = [_recorded(row, decimals) for row in rows[: last + 1]]
    return [run._replace(rows=rows)]


def with_findings(runs: list[Run]) -> list[Run]:
    """The runs with the findings that are due and true."""
    untreated = {run.seed: run.rows for run in runs if run.treatment == UNTREATED}
    found = []
    for run in runs:
        twin = untreated.get(run.seed, [])
        due, true = findings_of(run.treatment, run.subject, run.rows, twin)
        found.append(run._replace(due=due, true=true))
    return found


def _recorded(row: Row, decimals: int | None) -> Row:
    return {
        k: round(v, decimals) if decimals is not None and k.endswith("_loss") else v
        for k, v in row.items()
        if k != "val_few"
    }


def too_long(settings: Settings) -> list[Run]:
    """The runs of `generalization.py`, to their end."""
    runs = []
    for name, (make, _) in generalization.TASKS.items():
        seeds = list(range(settings.first_seed, settings.first_seed + settings.seeds))
        columns = generalization.record(make(), seeds, settings.too_long)
        for i, seed in enumerate(seeds):
            rows = [
                {
                    column: values[i, j].item()
                    for column, values in columns.items()
                    if not column.startswith("test")
                }
                for j in range(settings.too_long)
            ]
            due, true = findings_of(TOO_LONG_TITLE, name, rows, [])
            runs.append(Run(TOO_LONG_TITLE, name, seed, rows, due, true))
    return runs
