"""What does `fit` cost beside a loop that one writes by hand?

Steps of a few microseconds, where a loop is all dispatch. The loop by hand has the same
step, jitted and donated, and reads the loss every 100 steps; `fit` writes a row every
100 steps. Each takes a turn in every round, and ratios are taken within a round;
compilation is outside of them and stated apart. "One by one" is `fit` where it
dispatches each step alone, as it does on an accelerator. Run `python -m
benchmarks.loop_cost`, or with `--quick` to see that it runs.

With `--calls` instead: what does each call of `fit` cost beyond its steps, if the
functions are those of the call before, and if some are new? A run has two steps. Time
is that of the processor, over all threads, because compilation has several.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks._results import FOLDER, write
from optax_guard.flax import TrainState, fit
from optax_guard.loops import _host_run

EVERY = 100
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(1e-2),
    "adam": lambda: optax.adam(1e-3),
    "guard(adam, clip=1.0)": lambda: og.guard(optax.adam(1e-3), clip=1.0),
}


class Case(NamedTuple):
    """A perceptron of one hidden layer, or a linear model if it has no unit."""

    optimizer: str
    inputs: int
    hidden: int
    batch: int


CASES = [Case(name, 16, 0, 8) for name in OPTIMIZERS] + [
    Case("guard(adam, clip=1.0)", 64, 32, 32),
    Case("guard(adam, clip=1.0)", 64, 128, 32),
]


class Settings(NamedTuple):
    """How long and how often each contender runs."""

    rounds: int
    steps: int


def loss_of(params: Any, x: Any, y: Any) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    found = x @ params[-1]["kernel"] + params[-1]["bias"]
    return jnp.mean((found[:, 0] - y) ** 2)


def train_step(state: Any, batch: Any) -> tuple[Any, Any]:
    loss, grads = jax.value_and_grad(loss_of)(state.params, *batch)
    return state.apply_gradients(grads=grads, value=loss), {"loss": loss}


def contenders(case: Case, steps: int) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    sizes = [n for n in (case.inputs, case.hidden) if n] + [1]
    params = [
        {
            "kernel": np.float32(rng.normal(size=(n, m)) / np.sqrt(n)),
            "bias": np.zeros(m, np.float32),
        }
        for n, m in itertools.pairwise(sizes)
    ]
    xs = rng.normal(size=(EVERY, case.batch, case.inputs)).astype(np.float32)
    ys = rng.normal(size=(EVERY, case.batch)).astype(np.float32)
    on_device = [(jnp.asarray(x), jnp.asarray(y)) for x, y in zip(xs, ys, strict=True)]
    tx = OPTIMIZERS[case.optimizer]()
    jitted_step = jax.jit(train_step, donate_argnums=0)

    def host_batch(step: int) -> Any:
        return xs[step % EVERY], ys[step % EVERY]

    def device_batch(step: int) -> Any:
        return on_device[step % EVERY]

    def made() -> Any:
        start: Any = jax.tree.map(jnp.array, params)
        return TrainState.create(apply_fn=loss_of, params=start, tx=tx)

    def by_hand(batches: Callable[[int], Any]) -> Any:
        state = jax.tree.map(jnp.array, made())
        for step in range(steps):
            state, found = jitted_step(state, batches(step))
            if (step + 1) % EVERY == 0:
                float(found["loss"])
        return jax.block_until_ready(state)

    def by_fit(batches: Callable[[int], Any]) -> Any:
        result = fit(made(), train_step, batches, num_steps=steps, eval_every=EVERY)
        return jax.block_until_ready(result.state)

    def one_by_one() -> Any:
        with mock.patch.object(_host_run, "open_group", return_value=None):
            return by_fit(host_batch)

    return {
        "by hand": lambda: by_hand(host_batch),
        "fit": lambda: by_fit(host_batch),
        "fit, one by one": one_by_one,
        "by hand, batches on the device": lambda: by_hand(device_batch),
        "fit, batches on the device": lambda: by_fit(device_batch),
    }


def measure(case: Case, settings: Settings) -> list[dict[str, Any]]:
    runs = contenders(case, settings.steps)
    first, seconds = {}, {name: [] for name in runs}
    for name, run in runs.items():
        begin = time.perf_counter()
        run()
        first[name] = time.perf_counter() - begin
    order = list(runs)
    for i in range(settings.rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name in order:
        by_hand = order[3] if name.endswith("on the device") else order[0]
        pairs = zip(seconds[name], seconds[by_hand], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        middle = statistics.median(seconds[name])
        rows.append(
            {
                **case._asdict(),
                "loop": name,
                "microseconds": 1e6 * middle / settings.steps,
                "ratio": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                # What the first run took beyond a later one.
                "compile_seconds": max(0.0, first[name] - middle),
            }
        )
    return rows


def measure_calls(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of the processor for a call, and for a loop by hand."""
    params = {"kernel": np.zeros((case.inputs, 1), np.float32), "bias": np.zeros(1)}
    batch = (
        np.ones((case.batch, case.inputs), np.float32),
        np.ones(case.batch, np.float32),
    )
    tx = OPTIMIZERS[case.optimizer]()
    kept = og.early_stopping(og.stop.patience(3))

    def new_step() -> Callable[..., Any]:
        return lambda state, batch: train_step(state, batch)

    def made() -> Any:
        start: Any = [jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)]
        return TrainState.create(apply_fn=loss_of, params=start, tx=tx)

    def by_hand() -> Any:
        step, state = jax.jit(new_step(), donate_argnums=0), made()
        for _ in range(2):
            state, _ = step(state, batch)
        return state

    def by_fit(step: Any = train_step, stopper: Any = kept) -> Any:
        return fit(
            made(),
            step,
            lambda step: batch,
            num_steps=2,
            eval_every=1,
            evaluate=_value,
            stopper=stopper,
        ).state

    runs: dict[str, Callable[[], Any]] = {
        "by hand, a new step": by_hand,
        "fit, the same functions": by_fit,
        "fit, a new step": lambda: by_fit(new_step()),
        "fit, a new stopper": lambda: by_fit(
            stopper=og.early_stopping(og.stop.patience(3))
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            jax.block_until_ready(run())
            found[name].append(1e3 * (time.process_time() - begin))
    return [
        {
            "optimizer": case.optimizer,
            "call": name,
            "milliseconds": statistics.median(found[name]),
        }
        for name in runs
    ]


@jax.jit
def _value(state: Any) -> jax.Array:
    return jnp.sum(state.params[0]["bias"])


def report_calls(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['optimizer']:24}{row['call']:28}{row['milliseconds']:8.0f} ms")


def report(case: Case, rows: list[dict[str, Any]]) -> None:
    print(f"\n{case.optimizer}, {case.inputs} inputs, {case.hidden} hidden")
    print(f"{'':32}{'us a step':>10}{'ratio':>8}{'quartiles':>14}{'compile s':>11}")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['loop']:32}{row['microseconds']:10.1f}{row['ratio']:8.2f}"
            f"{f'{low:.2f} to {high:.2f}':>14}{row['compile_seconds']:11.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = Settings(3, 200) if args.quick else Settings(args.rounds, args.steps)
    started, found = time.monotonic(), []
    if args.calls:
        settings = Settings(rounds=1 if args.quick else 5, steps=2)
        for case in CASES[:1] if args.quick else CASES[:3]:
            found += measure_calls(case, settings.rounds)
        report_calls(found)
        if not args.quick:
            out = args.out or FOLDER / "loop_calls.json"
            write(out, settings, started, {"rows": found})
        return
    for case in CASES[:1] if args.quick else CASES:
        rows = measure(case, settings)
        report(case, rows)
        found += rows
    if not args.quick:
        write(args.out or FOLDER / "loop_cost.json", settings, started, {"rows": found})


if __name__ == "__main__":
    main()
