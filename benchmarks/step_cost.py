"""What does a guarded optimizer step cost beside the same step without a guard?

Every variant runs the same jitted, donated optimizer step on the same gradients, one
after the other in turns, so that a machine whose speed drifts slows all of them. What
is reported is the median over rounds of the ratio to the plain step of the same round,
with its quartiles. Run it as ``python -m benchmarks.step_cost``.
"""

import argparse
import importlib
import itertools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_guard as og

RESULTS = pathlib.Path(__file__).parent / "results"
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
}
Step = Callable[..., tuple[Any, Any]]


class Case(NamedTuple):
    """One size of problem: what all variants of a round share."""

    optimizer: str
    params: int
    leaves: int
    dtype: str


def by_update(tx: optax.GradientTransformation) -> tuple[Any, Step]:
    """The two calls every Optax user writes."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx.init, step


def by_apply_gradients(tx: optax.GradientTransformation) -> tuple[Any, Step]:
    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        return og.apply_gradients(tx, params, opt_state, grads)

    return tx.init, step


def by_hand(tx: optax.GradientTransformation) -> tuple[Any, Step]:
    """The best that can be written without a library: no statistics, no rules."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        norm = optax.global_norm(grads)
        factor = jnp.minimum(1.0, 1.0 / norm)

        def take(params: Any, opt_state: Any) -> tuple[Any, Any]:
            scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
            updates, opt_state = tx.update(scaled, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def keep(params: Any, opt_state: Any) -> tuple[Any, Any]:
            return params, opt_state

        is_finite = jnp.isfinite(norm).astype(jnp.int32)
        return jax.lax.switch(is_finite, [keep, take], params, opt_state)

    return tx.init, step


def variants(make: Callable[[], Any]) -> dict[str, tuple[Any, Step]]:
    """Each way to protect one optimizer; the first is the unprotected one."""
    clip = optax.clip_by_global_norm(1.0)
    return {
        "plain": by_update(make()),
        "optax clip": by_update(optax.chain(clip, make())),
        "optax apply_if_finite(clip)": by_update(
            optax.apply_if_finite(optax.chain(clip, make()), 10)
        ),
        "written by hand": by_hand(make()),
        "clip_by_global_norm": by_update(
            optax.chain(og.clip_by_global_norm(1.0), make())
        ),
        "guard, update": by_update(og.guard(make(), clip=1.0)),
        "guard, apply_gradients": by_apply_gradients(og.guard(make(), clip=1.0)),
        "guard(clip_by_value), apply_gradients": by_apply_gradients(
            og.guard(make(), clip=og.clip_by_value(1e-3))
        ),
    }


def make_tree(case: Case, scale: float) -> list[jax.Array]:
    size = case.params // case.leaves
    keys = jax.random.split(jax.random.key(0), case.leaves)
    return [(scale * jax.random.normal(k, (size,))).astype(case.dtype) for k in keys]


class Run:
    """One compiled variant and the state that it steps."""

    def __init__(self, case: Case, init: Any, step: Step, grads: Any) -> None:
        """Compiles the step, timing that, and takes one step to warm up."""
        self.grads = grads
        self.params = make_tree(case, 0.1)
        self.opt_state = init(self.params)
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(self.params, self.opt_state, grads).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.step.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else None
        self()

    def __call__(self) -> float:
        """Takes one step and returns its seconds."""
        start = time.perf_counter()
        self.params, self.opt_state = self.step(self.params, self.opt_state, self.grads)
        jax.block_until_ready((self.params, self.opt_state))
        return time.perf_counter() - start


class TorchRun:
    """PyTorch's fused AdamW, with and without ``clip_grad_norm_``, same sizes."""

    def __init__(self, case: Case, clip: bool) -> None:
        """Makes parameters and gradients, and takes one step to warm up."""
        # In no dependency group: what `pip install torch` brings may be several GB.
        torch = importlib.import_module("torch")
        torch.manual_seed(0)
        size = case.params // case.leaves
        dtype = getattr(torch, case.dtype)
        self.params = [
            torch.nn.Parameter(0.1 * torch.randn(size, dtype=dtype))
            for _ in range(case.leaves)
        ]
        for p in self.params:
            p.grad = 1e-2 * torch.randn(size, dtype=dtype)
        self.adamw = torch.optim.AdamW(self.params, lr=1e-3, fused=True)
        self.clip = torch.nn.utils.clip_grad_norm_ if clip else None
        self.compile_seconds = self.temp_bytes = None
        self()

    def __call__(self) -> float:
        """Takes one step and returns its seconds."""
        start = time.perf_counter()
        if self.clip:
            # It scales in place; at once under the threshold, it still multiplies.
            self.clip(self.params, 1.0)
        self.adamw.step()
        return time.perf_counter() - start


def measure(case: Case, rounds: int, torch: bool, only: str) -> list[dict[str, Any]]:
    """A row for each variant, from ``rounds`` rounds in which each takes one step."""
    grads = make_tree(case, 1e-2)
    chosen = {
        name: variant
        for name, variant in variants(OPTIMIZERS[case.optimizer]).items()
        if name == "plain" or only in name
    }
    runs: dict[str, Any] = {}
    for name, (init, step) in chosen.items():
        runs[name] = Run(case, init, step, grads)
    if torch and case.optimizer == "adamw":
        runs["torch AdamW"] = TorchRun(case, clip=False)
        runs["torch clip_grad_norm_ + AdamW"] = TorchRun(case, clip=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for i in range(rounds):
        # A different one first each time: what runs after the plain step finds caches
        # as that one leaves them.
        for name in order[i % len(order) :] + order[: i % len(order)]:
            seconds[name].append(runs[name]())
    rows = []
    for name, run in runs.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                **case._asdict(),
                "variant": name,
                "milliseconds": round(1e3 * statistics.median(seconds[name]), 3),
                "ratio": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "compile_seconds": run.compile_seconds
                and round(run.compile_seconds, 2),
                "temp_bytes": run.temp_bytes,
            }
        )
    return rows


def print_rows(case: Case, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{case.optimizer}, {case.params / 1e6:g}M parameters in {case.leaves} "
        f"leaves, {case.dtype}\n{'':40}{'ms':>9}{'ratio':>8}{'quartiles':>15}"
        f"{'compile s':>11}{'temp MB':>9}"
    )
    for row in rows:
        low, high = row["quartiles"]
        compiled = row["compile_seconds"]
        temp = row["temp_bytes"]
        print(
            f"{row['variant']:40}{row['milliseconds']:9.2f}{row['ratio']:8.2f}"
            f"{f'{low:.2f} to {high:.2f}':>15}"
            f"{'' if compiled is None else f'{compiled:.2f}':>11}"
            f"{'' if temp is None else f'{temp / 1e6:.1f}':>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--params", nargs="+", type=float, default=[25e6])
    parser.add_argument("--leaves", nargs="+", type=int, default=[20])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--torch", action="store_true", help="also time PyTorch")
    parser.add_argument(
        "--only", default="", help="only variants with this in the name"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where to write JSON")
    args = parser.parse_args()
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, {jax.default_backend()}, "
        f"{platform.processor() or platform.machine()}, {args.rounds} rounds in turns"
    )
    table = []
    for optimizer, params, leaves, dtype in itertools.product(
        args.optimizers, args.params, args.leaves, args.dtypes
    ):
        case = Case(optimizer, int(params), leaves, dtype)
        rows = measure(case, args.rounds, args.torch, args.only)
        print_rows(case, rows)
        table += rows
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
