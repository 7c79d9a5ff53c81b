"""What does a guard add to a whole train step, forward and backward pass included?

A transformer of 25 million parameters in 26 leaves. AdamW, Optax's clip before it, and
the guard take turns in one process, each in place on its own state. Run `python -m
benchmarks.whole_step`, or with `--quick` to see that it runs.
"""

import argparse
import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks._results import FOLDER, write


class Settings(NamedTuple):
    """How much is run: the model, the batch, and rounds in which each has its turn."""

    width: int = 512
    vocabulary: int = 12_000
    depth: int = 6
    sequences: int = 8
    length: int = 128
    rounds: int = 12


QUICK = Settings(width=64, vocabulary=64, depth=1, sequences=2, length=8, rounds=2)
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(1e-3),
    "optax clip": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
    ),
    "guard": lambda: og.guard(optax.adamw(1e-3), clip=1.0),
}


def first_params(settings: Settings) -> Any:
    size = settings.width
    shapes: dict[str, tuple[int, ...]] = {"embedding": (settings.vocabulary, size)}
    for i in range(settings.depth):
        shapes |= {
            f"qkv{i}": (size, 3 * size),
            f"out{i}": (size, size),
            f"up{i}": (size, 4 * size),
            f"down{i}": (4 * size, size),
        }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: 0.02 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"scales": jnp.ones((2 * settings.depth + 1, size))}


def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
    """The next-token loss."""
    x, depth = params["embedding"][tokens[:, :-1]], len(params["scales"]) // 2

    def normalized(x: jax.Array, i: int) -> jax.Array:
        size = jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return x * size * params["scales"][i]

    for i in range(depth):
        qkv = normalized(x, 2 * i) @ params[f"qkv{i}"]
        heads = qkv.reshape(*x.shape[:2], -1, 64)
        mixed = jax.nn.dot_product_attention(
            *jnp.split(heads, 3, axis=2), is_causal=True
        )
        x = x + mixed.reshape(x.shape) @ params[f"out{i}"]
        hidden = normalized(x, 2 * i + 1) @ params[f"up{i}"]
        x = x + jax.nn.gelu(hidden) @ params[f"down{i}"]
    logits = normalized(x, -1) @ params["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


class Run:
    """An optimizer with its state and two compiled steps: whole, and its update."""

    def __init__(self, tx: Any, params: Any):
        tx = optax.with_extra_args_support(tx)

        def update(params: Any, state: Any, grads: Any, value: Any) -> tuple[Any, Any]:
            return og.apply_gradients(tx, params, state, grads=grads, value=value)

        def whole(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any]:
            value, grads = jax.value_and_grad(loss_of)(params, tokens)
            return update(params, state, grads, value)

        self._whole = jax.jit(whole, donate_argnums=(0, 1))
        self._update = jax.jit(update, donate_argnums=(0, 1))
        # A copy, because every run gives its own away.
        params = jax.tree.map(jnp.copy, params)
        self._carry = params, jax.jit(tx.init)(params)

    def whole(self, tokens: jax.Array) -> float:
        return self._timed(self._whole, tokens)

    def update(self, grads: Any) -> float:
        return self._timed(self._update, grads, jnp.float32(1.0))

    def _timed(self, step: Any, *inputs: Any) -> float:
        start = time.perf_counter()
        self._carry = jax.block_until_ready(step(*self._carry, *inputs))
        return time.perf_counter() - start


def measure(settings: Settings) -> list[dict[str, Any]]:
    params = first_params(settings)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    tokens = jax.random.randint(
        jax.random.key(1),
        (settings.sequences, settings.length + 1),
        *(0, settings.vocabulary),
    )
    runs = {name: Run(make(), params) for name, make in OPTIMIZERS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(settings.rounds + 1):
        for name in list(runs)[:: 1 - 2 * (i % 2)]:
            taken = runs[name].whole(tokens), runs[name].update(grads)
            if i > 0:  # The first round compiles.
                seconds[name].append(taken)
    rows = []
    for name in seconds:
        row: dict[str, Any] = {"optimizer": name}
        for j, part in enumerate(("step", "update")):
            here, base = ([x[j] for x in seconds[k]] for k in (name, "adamw"))
            ratios = [x / y for x, y in zip(here, base, strict=True)]
            row[f"{part}_ms"] = 1e3 * statistics.median(here)
            row[f"{part}_ratio"] = statistics.median(ratios)
            row[f"{part}_ratio_of_least"] = min(here) / min(base)
        rows.append(row)
    return rows


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    settings = QUICK if parser.parse_args().quick else Settings()
    started = time.monotonic()
    rows = measure(settings)
    print(f"{'':12}  step ms   ratio  of least  update ms   ratio  of least")
    for row in rows:
        print(
            f"{row['optimizer']:12} {row['step_ms']:8.1f} {row['step_ratio']:7.2f} "
            f"{row['step_ratio_of_least']:9.2f} {row['update_ms']:10.1f} "
            f"{row['update_ratio']:7.2f} {row['update_ratio_of_least']:9.2f}"
        )
    if settings != QUICK:
        content = {"load": os.getloadavg()[0], "rows": rows}
        write(FOLDER / "whole_step.json", settings, started, content)


if __name__ == "__main__":
    main()
