"""How many steps a second do the loops take on an accelerator?

A perceptron of 64, 32 and 10 units learns made-up digits with batches of 32 and Adam,
and is evaluated every 50 steps; no run stops early. A Python loop, written by hand,
reads the loss of each evaluation. `fit` and `train_on_device` take turns with it. Of a
population the steps of all members count: the Python loop would train one after
another, at the speed that it has alone.

Run `bash benchmarks/on_accelerator.sh OUT loops`.
"""

import argparse
import importlib
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.tree_util import Partial

import optax_guard as og
from benchmarks.on_accelerator import _kit
from optax_guard.flax import fit
from optax_guard.loops import train_on_device, train_population

HIDDEN, BATCH, IMAGES = 32, 32, 1600
EVAL_EVERY = IMAGES // BATCH
BY_HAND = "Python loop"
OPTIMIZER = og.guard(optax.adam(1e-3), clip=1.0)
# More evaluations than there are: a run never stops.
STOPPER = og.early_stopping(og.stop.patience(1_000_000))


def make_data(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of ten classes, each of which has a mean of its own."""
    random = np.random.default_rng(seed)
    means = np.random.default_rng(0).normal(size=(10, 64))
    labels = random.integers(0, 10, size)
    images = means[labels] + random.normal(size=(size, 64))
    return images.astype(np.float32), labels.astype(np.int32)


TRAINING, VALIDATION = make_data(1, IMAGES), make_data(2, 512)


def loss_of(params: Any, images: Any, labels: Any) -> jax.Array:
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_of)(state.params, *batch)
    return state.apply_gradients(grads=grads), loss


def evaluate(data: Any, state: Any) -> jax.Array:
    return loss_of(state.params, *data)


def make_state(seed: Any) -> TrainState:
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "w1": jax.random.normal(first, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, 10)) / HIDDEN**0.5,
        "b2": jnp.zeros(10),
    }
    state: Any = TrainState.create(apply_fn=loss_of, params=params, tx=OPTIMIZER)
    return state.replace(step=jnp.zeros((), jnp.int32))


def host_batch(step: int) -> Any:
    rows = slice(step % EVAL_EVERY * BATCH, (step % EVAL_EVERY + 1) * BATCH)
    return TRAINING[0][rows], TRAINING[1][rows]


def device_batch(data: Any, step: Any) -> Any:
    first = step % EVAL_EVERY * BATCH
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, BATCH), tuple(data)
    )


def build(training: Any, validation: Any, member: Any) -> dict[str, Any]:
    return {
        "state": make_state(member["seed"]),
        "train_step": train_step,
        "batches": Partial(device_batch, training),
        "evaluate": Partial(evaluate, validation),
        "stopper": STOPPER,
    }


def make_loops(num_steps: int) -> dict[str, Callable[[], Any]]:
    """Each loop over that many steps, and it waits for the last one."""
    training, validation = jax.tree.map(jnp.asarray, (TRAINING, VALIDATION))
    start = jax.jit(make_state)
    step = jax.jit(train_step, donate_argnums=0)
    jitted_evaluate = Partial(jax.jit(evaluate), validation)
    on_device = Partial(evaluate, validation)

    def by_hand() -> None:
        state, losses = start(0), []
        for i in range(num_steps):
            state, _ = step(state, host_batch(i))
            if (i + 1) % EVAL_EVERY == 0:
                losses.append(float(jitted_evaluate(state)))
        jax.block_until_ready(state)

    settings: Any = {
        "num_steps": num_steps,
        "eval_every": EVAL_EVERY,
        "stopper": STOPPER,
    }

    def by_fit() -> None:
        jax.block_until_ready(
            fit(start(0), train_step, host_batch, evaluate=jitted_evaluate, **settings)
        )

    def by_device() -> None:
        batches = Partial(device_batch, training)
        jax.block_until_ready(
            train_on_device(
                start(0), train_step, batches, evaluate=on_device, **settings
            )
        )

    return {BY_HAND: by_hand, "`fit`": by_fit, "`train_on_device`": by_device}


def make_population(members: int, num_steps: int) -> Callable[[], Any]:
    data = jax.tree.map(jnp.asarray, (TRAINING, VALIDATION))
    builder = Partial(build, *data)
    seeds = {"seed": np.arange(members, dtype=np.int32)}

    def by_population() -> None:
        jax.block_until_ready(
            train_population(builder, seeds, num_steps=num_steps, eval_every=EVAL_EVERY)
        )

    return by_population


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    name: str,
    run: Callable[[], Any],
    base: Callable[[], Any],
    steps: dict[str, int],
    rounds: int,
) -> dict[str, Any]:
    """A row for one loop, in turns with the Python loop: steps a second, and more."""
    first = seconds_of(run)
    timed, beside = [], []
    for i in range(rounds):
        for each, into in ((base, beside), (run, timed))[:: 1 - 2 * (i % 2)]:
            into.append(seconds_of(each))
    total = steps["num_steps"] * steps["members"]
    ratios = [
        total * b / steps["num_steps_by_hand"] / a
        for a, b in zip(timed, beside, strict=True)
    ]
    return {
        "loop": name,
        **steps,
        "seconds": statistics.median(timed),
        "steps_per_second": total / statistics.median(timed),
        "times_faster": statistics.median(ratios),
        "least_and_most": [min(ratios), max(ratios)],
        # What the first run took beyond a later one.
        "compile_seconds": max(0.0, first - statistics.median(timed)),
    }


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    plt = importlib.import_module("matplotlib.pyplot")
    figure, ax = plt.subplots(figsize=(7, 0.6 * len(rows) + 1.4))
    names = [row["loop"].replace("`", "") for row in rows][::-1]
    bars = ax.barh(names, [row["steps_per_second"] for row in rows][::-1])
    ax.bar_label(bars, fmt="{:,.0f}", padding=3)
    ax.set(xscale="log", xlabel="steps per second, all members together")
    ax.margins(x=0.15)
    ax.set_title(jax.devices()[0].device_kind)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    num_steps, sizes, rounds = (100, (2, 4), 2) if args.quick else (2000, (), 7)
    report = _kit.Report(args.out / "loops.json", batch=BATCH, optimizer="guarded Adam")
    loops = make_loops(num_steps)
    base = loops[BY_HAND]
    seconds_of(base)  # It compiles.
    plan = {name: (loop, num_steps, 1, rounds) for name, loop in loops.items()}
    for members in sizes or (16, 256, 4096):
        plan[f"`train_population`, {members}"] = (
            make_population(members, num_steps),
            num_steps,
            members,
            min(rounds, 3),
        )
    for name, (loop, steps, members, turns) in plan.items():
        if report.seconds() > args.seconds:
            report.add({"loop": name, "skipped": "no time was left"})
            continue
        counted = {
            "num_steps": steps,
            "members": members,
            "num_steps_by_hand": num_steps,
        }
        report.add(measure(name, loop, base, counted, turns))
        print(f"{name}: after {report.seconds():.0f} s")
    done = [row for row in report.rows if "skipped" not in row]
    _kit.print_table(
        f"{num_steps} steps, an evaluation every {EVAL_EVERY}",
        ["loop", "s", "steps per second", "times faster", "range", "compile s"],
        [
            [
                row["loop"],
                _kit.number(row["seconds"], 3),
                f"{row['steps_per_second']:,.0f}",
                _kit.number(row["times_faster"]),
                "{:.2f} to {:.2f}".format(*row["least_and_most"]),
                _kit.number(row["compile_seconds"], 1),
            ]
            for row in done
        ],
    )
    draw(done, args.out / "loops.png")
    print(f"Took {report.seconds():.0f} s.")


if __name__ == "__main__":
    run(_kit.read_arguments(__doc__))
