"""What does a loop cost that stops early: on the host, on the device, for many runs?

A small MLP on handwritten digits is trained to the same stop by a Python loop with
Flax's `EarlyStopping`, which reads the loss at every evaluation, by `fit`, which never
waits, and by `train_on_device`; then 16 and 256 members by the same Python loop, one
after another, and by `train_population`. Optimizer, data and their order are the same
for all. `fit` is also timed beside a loop that reads nothing, over the same steps, and
an update of the stopper with and without ``average_last`` beside one mean in place.

Every contender takes a turn in every round and ratios are taken within a round;
compilation is outside of them and stated apart. Run `python -m
benchmarks.early_stopping`.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.early_stopping import EarlyStopping
from flax.training.train_state import TrainState
from jax.tree_util import Partial

import optax_guard as og
from benchmarks._digits import load_digits
from optax_guard.flax import fit
from optax_guard.loops import train_on_device, train_population

RESULTS = pathlib.Path(__file__).parent / "results"
HIDDEN, BATCH, TRAINING_IMAGES = 32, 32, 1280
EVAL_EVERY = TRAINING_IMAGES // BATCH  # One epoch.
NUM_STEPS = 200 * EVAL_EVERY
PATIENCE = 10

_rng = np.random.default_rng(0)
IMAGES, LABELS = load_digits()
_shuffled = _rng.permutation(len(LABELS))
IMAGES, LABELS = IMAGES[_shuffled], LABELS[_shuffled]
TRAINING = IMAGES[:TRAINING_IMAGES], LABELS[:TRAINING_IMAGES]
VALIDATION = IMAGES[TRAINING_IMAGES:], LABELS[TRAINING_IMAGES:]
# Row `step` holds the images of that step: each once in an epoch.
ORDER = np.concatenate(
    [
        _rng.permutation(TRAINING_IMAGES).reshape(-1, BATCH)
        for _ in range(NUM_STEPS // EVAL_EVERY)
    ]
)


def loss_of(params: Any, images: Any, labels: Any) -> jax.Array:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_of)(state.params, *batch)
    return state.apply_gradients(grads=grads), loss


def evaluate(data: Any, state: Any) -> jax.Array:
    return loss_of(state.params, *data)


# The rate lies in the optimizer's state, so that one program serves all members.
OPTIMIZER = optax.inject_hyperparams(optax.adam)(1e-2)


def make_state(seed: Any, rate: Any) -> TrainState:
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "w1": jax.random.normal(first, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "b2": jnp.zeros(10),
    }
    state: Any = TrainState.create(apply_fn=loss_of, params=params, tx=OPTIMIZER)
    state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
    return state.replace(step=jnp.zeros((), jnp.int32))


def host_batch(shift: int, step: int) -> Any:
    rows = ORDER[(step + shift) % len(ORDER)]
    return TRAINING[0][rows], TRAINING[1][rows]


def device_batch(data: Any, order: Any, shift: Any, step: Any) -> Any:
    rows = order[(step + shift) % len(order)]
    return data[0][rows], data[1][rows]


jitted_start = jax.jit(make_state)
jitted_step = jax.jit(train_step, donate_argnums=0)
ON_DEVICE = jax.tree.map(jnp.asarray, (TRAINING, ORDER, VALIDATION))
jitted_evaluate = Partial(jax.jit(evaluate), ON_DEVICE[2])
jitted_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def by_flax(seed: int, rate: float, shift: int) -> int:
    """Trains in a Python loop with Flax's class, and returns the evaluations."""
    state = jitted_start(seed, rate)
    stop = EarlyStopping(patience=PATIENCE - 1)
    best = state.params
    for step in range(NUM_STEPS):
        state, _ = jitted_step(state, host_batch(shift, step))
        if (step + 1) % EVAL_EVERY == 0:
            stop = stop.update(float(jitted_evaluate(state)))
            if stop.has_improved:
                best = jitted_copy(state.params)
            if stop.should_stop:
                break
    jax.block_until_ready((state, best))
    return int(state.step) // EVAL_EVERY


STOPPER = og.stop.from_flax(patience=PATIENCE - 1)


def by_fit(seed: int, rate: float, shift: int) -> int:
    result = fit(
        jitted_start(seed, rate),
        train_step,
        lambda step: host_batch(shift, step),
        num_steps=NUM_STEPS,
        eval_every=EVAL_EVERY,
        evaluate=jitted_evaluate,
        stopper=STOPPER,
    )
    jax.block_until_ready(result)
    return len(result.history)


def by_reading_nothing(seed: int, rate: float, shift: int, num_steps: int) -> int:
    """Trains over the steps that `fit` takes, with its evaluations; no stopper."""
    state = jitted_start(seed, rate)
    values = []
    for step in range(num_steps):
        state, _ = jitted_step(state, host_batch(shift, step))
        # What `fit` has trained when it reads that it should stop is not evaluated.
        if (step + 1) % EVAL_EVERY == 0 and step + 1 < num_steps:
            values.append(jitted_evaluate(state))
    jax.block_until_ready((state, values))
    return len(values)


def by_device(seed: int, rate: float, shift: int) -> int:
    result = train_on_device(
        jitted_start(seed, rate),
        train_step,
        Partial(device_batch, *ON_DEVICE[:2], shift),
        num_steps=NUM_STEPS,
        eval_every=EVAL_EVERY,
        evaluate=Partial(evaluate, ON_DEVICE[2]),
        stopper=STOPPER,
    )
    jax.block_until_ready(result)
    return len(result.history)


def build(data: Any, order: Any, validation: Any, member: Any) -> dict[str, Any]:
    return {
        "state": make_state(member["seed"], member["rate"]),
        "train_step": train_step,
        "batches": Partial(device_batch, data, order, member["shift"]),
        "evaluate": Partial(evaluate, validation),
        "stopper": STOPPER,
    }


BUILD = Partial(build, *ON_DEVICE)


def make_members(n: int) -> dict[str, np.ndarray]:
    return {
        "seed": np.arange(n, dtype=np.int32),
        "rate": np.geomspace(5e-3, 2e-2, n).astype(np.float32),
        "shift": (977 * np.arange(n, dtype=np.int32)) % len(ORDER),
    }


def members_by_flax(members: Any) -> list[int]:
    columns = members["seed"], members["rate"], members["shift"]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [by_flax(*row) for row in rows]


def members_by_population(members: Any) -> list[int]:
    result = train_population(
        BUILD, members, num_steps=NUM_STEPS, eval_every=EVAL_EVERY
    )
    jax.block_until_ready(result)
    return result.num_rows.tolist()


def steps_of_many(n: int, each: Any, num_steps: int = 1000) -> Callable[[], Any]:
    """Steps of n members, without evaluation or stopper.

    `each` turns the function of a member into that of all: side by side or in turn.
    """
    members = jax.tree.map(jnp.asarray, make_members(n))
    data, order, _ = ON_DEVICE

    def steps_of(state: Any, shift: Any) -> Any:
        def body(i: Any, state: Any) -> Any:
            return train_step(state, device_batch(data, order, shift, i))[0]

        return jax.lax.fori_loop(0, num_steps, body, state)

    states = jax.vmap(make_state)(members["seed"], members["rate"])
    run = jax.jit(each(steps_of))
    return lambda: jax.block_until_ready(run(states, members["shift"]))


def one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: jax.lax.map(lambda each: function(*each), inputs)


WAYS = {"side by side": jax.vmap, "one after another": one_after_another}


def in_turns(
    contenders: dict[str, Callable[[], Any]], rounds: int
) -> list[dict[str, Any]]:
    """A row for each, with its time over that of the first, taken within a round."""
    found, first_seconds = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, run in contenders.items():
        start = time.perf_counter()
        found[name] = run()
        first_seconds[name] = time.perf_counter() - start
    order = list(contenders)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in order:
        ratios = [a / b for a, b in zip(seconds[order[0]], seconds[name], strict=True)]
        rows.append(
            {
                "loop": name,
                "seconds": round(statistics.median(seconds[name]), 6),
                "times_faster": round(statistics.median(ratios), 2),
                "least_and_most": [round(min(ratios), 2), round(max(ratios), 2)],
                # What the first run took beyond a later one; nothing but noise where a
                # table before has compiled it.
                "compile_seconds": round(
                    max(0.0, first_seconds[name] - statistics.median(seconds[name])), 2
                ),
                "evaluations": found[name],
            }
        )
    return rows


def report(title: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    print(
        f"\n{title}\n{'':34}{'s':>9}{'times faster':>14}{'range':>15}{'compile s':>11}"
    )
    for row in rows:
        low, high = row["least_and_most"]
        print(
            f"{row['loop']:34}{row['seconds']:9.4f}{row['times_faster']:14.2f}"
            f"{f'{low} to {high}':>15}{row['compile_seconds']:11.1f}",
            flush=True,
        )
    # Two programs may round differently, and a later loss decide otherwise.
    evaluations = [np.atleast_1d(row.pop("evaluations")) for row in rows]
    same = [float(np.mean(each == evaluations[0])) for each in evaluations]
    for row, share, each in zip(rows, same, evaluations, strict=True):
        row["mean_evaluations"] = round(float(each.mean()), 1)
        row["share_with_the_same_stop"] = round(share, 3)
    print("share with the same stop:", *same)
    return {"question": title, "loops": rows}


def updates(size: int, rounds: int) -> list[dict[str, Any]]:
    """Evaluations of parameters that are no better, each donating the state before."""
    params = {f"w{i}": jnp.ones(size // 20) for i in range(20)}
    moved = jax.jit(
        lambda mean, params: optax.incremental_update(params, mean, 0.2),
        donate_argnums=0,
    )
    carry: dict[str, Any] = {"one mean in place": jax.tree.map(jnp.copy, params)}
    steps: dict[str, Any] = {"one mean in place": lambda mean: moved(mean, params)}
    for name, k in (("update", None), ("update, average_last=5", 5)):
        stopper = og.early_stopping(og.stop.patience(10**6), average_last=k)
        update = jax.jit(stopper.update, donate_argnums=1)
        first = stopper.update(1.0, stopper.init(params), params)
        carry[name] = jax.tree.map(jnp.copy, first)
        steps[name] = lambda state, update=update: update(2.0, state, params)

    def repeated(name: str) -> int:
        for _ in range(5):
            carry[name] = jax.block_until_ready(steps[name](carry[name]))
        return 5

    return in_turns({name: functools.partial(repeated, name) for name in steps}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--members", type=int, nargs="*", default=[16, 256])
    parser.add_argument(
        "--out", type=pathlib.Path, default=RESULTS / "early_stopping.json"
    )
    args = parser.parse_args()

    one = 0, 1e-2, 0
    tables = [
        report(
            "One run",
            in_turns(
                {
                    "Python loop, Flax's EarlyStopping": lambda: by_flax(*one),
                    "fit": lambda: by_fit(*one),
                    "train_on_device": lambda: by_device(*one),
                },
                args.rounds,
            ),
        )
    ]
    # `fit` has trained for one interval more when it knows.
    steps = (by_fit(*one) + 1) * EVAL_EVERY
    tables.append(
        report(
            "No stall: the same steps and evaluations",
            in_turns(
                {
                    "loop that reads nothing": lambda: by_reading_nothing(*one, steps),
                    "fit": lambda: by_fit(*one),
                },
                args.rounds,
            ),
        )
    )
    for size in (10_000, 5_000_000):
        title = f"Five updates of the stopper, {size:,} parameters"
        tables.append(report(title, updates(size, 2 * args.rounds)))
    for n in args.members:
        members = make_members(n)
        # A round of 256 takes minutes.
        rounds = max(1, min(args.rounds, 5 * 16 // n))
        tables.append(
            report(
                f"{n} members",
                in_turns(
                    {
                        "Python loop over members": lambda m=members: members_by_flax(
                            m
                        ),
                        "train_population": lambda m=members: members_by_population(m),
                    },
                    rounds,
                ),
            )
        )
    # What a population can gain at most: how much less a step costs in company.
    cases = [(n, way) for way in WAYS for n in (1, 4, 16)]
    runs = {f"{n}, {way}": steps_of_many(n, WAYS[way]) for n, way in cases}
    print("\nOne step of n members")
    alone = []
    for (n, way), row in zip(cases, in_turns(runs, args.rounds), strict=True):
        microseconds = 1e3 * row["seconds"]  # It was a thousand steps.
        alone.append({"members": n, "way": way, "microseconds": round(microseconds, 1)})
        print(f"{n:4} members, {way}: {microseconds:6.0f} microseconds")
    packages = "jax", "flax", "optax"
    found = {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tables": tables,
        "batched_steps": alone,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
