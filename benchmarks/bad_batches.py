"""What do a few corrupt batches cost, and how long until they are forgotten?

A character LSTM learns Python's documentation with AdamW. In the middle of the run some
batches are corrupt; each fault is tried on each contender, which otherwise see the same
initial parameters and batches. Peers are the published rules of `_peers.py` with their
published settings, ours the defaults. No contender, fault or setting was left out after
its result was seen.

A run with a fault is compared with the same contender's run without: how far the
held-out loss rises above it (nats per character), how many steps after the first corrupt
batch it is for good within 5 % of it, how many healthy steps are withheld, and whether
parameters and moments are finite in the end. Run `python -m benchmarks.bad_batches`.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks import _peers
from optax_guard._demo_text import load_text

RESULTS = pathlib.Path(__file__).parent / "results"


class Settings(NamedTuple):
    """All numbers of the study; a fault begins with the first step of the second half."""

    seeds: int = 3
    half: int = 300
    eval_every: int = 4
    learning_rate: float = 3e-3
    batch_size: int = 8
    window: int = 32
    width: int = 48
    embedding: int = 24
    held_out: int = 32


QUICK = Settings(seeds=1, half=80)
FULL = Settings(seeds=5, half=600)


class Batches(NamedTuple):
    """What is wrong with each batch: float32, float32 and bool, each [steps]."""

    loss_factor: np.ndarray
    input_factor: np.ndarray
    is_shuffled: np.ndarray


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


def healthy(steps: int) -> Batches:
    ones = np.ones(steps, np.float32)
    return Batches(ones, ones.copy(), np.zeros(steps, bool))


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
    """Every way to protect the same AdamW. Rules that skip are used with a clip of 1,
    as their own projects' configurations have it."""
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


# The run -----------------------------------------------------------------------------


def init_params(key: jax.Array, vocabulary: int, settings: Settings) -> Any:
    width, embedding = settings.width, settings.embedding
    shapes = {
        "embed": (vocabulary, embedding),
        "cell": (embedding + width, 4 * width),
        "head": (embedding + width, vocabulary),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(key, shape) / math.sqrt(shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["embed"] *= math.sqrt(vocabulary)
    # A forget gate that is open at first, as is usual.
    params["cell_bias"] = jnp.zeros(4 * width).at[:width].set(1.0)
    params["head_bias"] = jnp.zeros(vocabulary)
    return params


def loss_of(params: Any, text: jax.Array, input_factor: Any, is_shuffled: Any) -> Any:
    """Cross entropy of the next character in windows of text, [window, time + 1].

    The embedding goes around the recurrent layer, too, whose gates would otherwise hide
    from everything behind them how large the inputs are.
    """
    embedded = params["embed"][text[:, :-1]] * input_factor
    targets = text[:, 1:]
    # As if the labels were those of other windows, and in reverse.
    wrong = jnp.roll(targets[:, ::-1], 1, axis=0)
    targets = jnp.where(is_shuffled, wrong, targets)
    width = params["cell_bias"].shape[0] // 4

    def step(carry: Any, x: jax.Array) -> Any:
        hidden, cell = carry
        gates = jnp.concatenate([x, hidden], -1) @ params["cell"] + params["cell_bias"]
        forget, enter, leave, new = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
        hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros((len(text), width))
    _, hidden = jax.lax.scan(step, (zeros, zeros), embedded.swapaxes(0, 1))
    features = jnp.concatenate([hidden.swapaxes(0, 1), embedded], -1)
    logits = features @ params["head"] + params["head_bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class Run(NamedTuple):
    """One half of a run: losses [evaluations], whether steps were taken [steps]."""

    params: Any
    opt_state: Any
    losses: Any
    is_taken: Any


def make_half(tx: Any, settings: Settings) -> Callable[..., Run]:
    """Half a run as one jitted function of the state, first step, seed and batches."""
    text = load_text()
    train = jnp.asarray(text.train)
    starts = np.linspace(
        0, len(text.validation) - settings.window - 1, settings.held_out
    ).astype(int)
    held_out = text.validation[starts[:, None] + np.arange(settings.window + 1)]
    tx = optax.with_extra_args_support(tx)

    def train_step(carry: Any, inputs: Any) -> Any:
        params, opt_state, key = carry
        step, bad = inputs
        starts = jax.random.randint(
            jax.random.fold_in(key, step),
            (settings.batch_size, 1),
            0,
            len(train) - settings.window,
        )
        batch = train[starts + jnp.arange(settings.window + 1)]

        def loss_fn(params: Any) -> jax.Array:
            loss = loss_of(params, batch, bad.input_factor, bad.is_shuffled)
            return loss * bad.loss_factor

        loss, grads = jax.value_and_grad(loss_fn)(params)
        new, opt_state = og.apply_gradients(tx, params, opt_state, grads, value=loss)
        # Weight decay alone moves something: only a withheld step changes nothing.
        same = jax.tree.map(lambda a, b: jnp.all(a == b), new, params)
        is_taken = ~jnp.all(jnp.stack(jax.tree.leaves(same)))
        return (new, opt_state, key), is_taken

    def train_and_evaluate(carry: Any, inputs: Any) -> Any:
        carry, is_taken = jax.lax.scan(train_step, carry, inputs)
        return carry, (loss_of(carry[0], held_out, 1.0, False), is_taken)

    @jax.jit
    def half(params: Any, opt_state: Any, first: Any, key: Any, bad: Batches) -> Run:
        steps = first + jnp.arange(settings.half)
        inputs = jax.tree.map(
            lambda x: x.reshape(-1, settings.eval_every), (steps, bad)
        )
        carry = (params, opt_state, key)
        carry, (losses, is_taken) = jax.lax.scan(train_and_evaluate, carry, inputs)
        return Run(*carry[:2], losses, is_taken.ravel())

    return half


def run_contender(tx: Any, settings: Settings) -> dict[str, list[Run]]:
    """The second half with every fault, and without: a run for each seed."""
    half = make_half(tx, settings)
    vocabulary = len(load_text().characters)
    runs: dict[str, list[Run]] = {fault: [] for fault in FAULTS}
    for seed in range(settings.seeds):
        first, key = jax.random.split(jax.random.key(seed))
        params = init_params(first, vocabulary, settings)
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
            f"\n{fault}\n{'':24}{'excursion':>10}{'steps to recover':>20}{'skipped':>9}"
            f"{'taken':>7}{'final':>8}{'moment x':>10}  not finite"
        )
        for name, table in results.items():
            seen = table[fault]
            steps = sorted(seen["steps_to_recover"])
            span = f"{steps[len(steps) // 2]:g} ({steps[0]:g} to {steps[-1]:g})"
            bad = [
                what
                for what in ("params", "moments")
                if not all(seen[f"finite_{what}"])
            ]
            print(
                f"{name:24}{statistics.median(seen['peak_excursion']):10.3f}"
                f"{span.replace('inf', 'never'):>20}"
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
