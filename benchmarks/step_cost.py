"""What does a guarded optimizer step cost beside the same step without a guard?

Run it as ``python -m benchmarks.step_cost``, on a CPU, or as it is where JAX finds a
GPU or TPU. Each way to protect a step takes turns with the same step without any,
jitted, donated and on the same gradients, so that a machine whose speed drifts slows
both. What is reported is the median over rounds of the ratio to the plain step of the
same round, with its quartiles.

The floor is the traffic of a plain step and one more read of the gradients, as a ratio
to the former. GB/s is the traffic of a plain step, which no step goes below, over the
time; the share of the peak is known for the devices whose vendors state one.
"""

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
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
from benchmarks.pictures import draw

# Bytes per second, from the data sheets of NVIDIA and the system architecture pages of
# Google Cloud's TPUs.
PEAK_BANDWIDTHS = {
    "TPU v4": 1228e9,
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v5p": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA H100 80GB HBM3": 3352e9,
    "NVIDIA H200": 4800e9,
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
}
# Colours that the colour-blind can tell apart (Okabe and Ito), and markers.
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
        return og.apply_gradients(tx, params, opt_state, grads=grads)

    return tx.init, step


def by_hand(tx: optax.GradientTransformation) -> tuple[Any, Step]:
    """The best that can be written without a library: no statistics, no rules."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
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
        "guard(max_update), apply_gradients": by_apply_gradients(
            og.guard(make(), clip=1.0, max_update=og.threshold.relative_to_params())
        ),
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
        """Compiles the step, timing that, and takes two steps to warm up."""
        self.grads = grads
        self.params = make_tree(case, 0.1)
        self.opt_state = init(self.params)
        self.function = step
        start, start_wall = time.process_time(), time.perf_counter()
        # A call of this finds the program compiled below, and is dispatched in C++. The
        # compiled object itself is called by Python, which a small step waits for.
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.program = self.step.lower(self.params, self.opt_state, grads).compile()
        self.compile_seconds = time.process_time() - start
        self.compile_wall_seconds = time.perf_counter() - start_wall
        memory = self.program.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else None
        self(2)

    def __call__(self, steps: int) -> float:
        """Takes a number of steps and returns the seconds of one."""
        jax.block_until_ready((self.params, self.opt_state))
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.opt_state = self.step(
                self.params, self.opt_state, self.grads
            )
        jax.block_until_ready((self.params, self.opt_state))
        return (time.perf_counter() - start) / steps

    def least_bytes(self) -> int:
        """What a step must move: all it keeps, in and out, and the gradients, in."""
        kept = num_bytes((self.params, self.opt_state))
        return 2 * kept + num_bytes(self.grads)


class TorchRun:
    """PyTorch's fused AdamW, with and without ``clip_grad_norm_``, same sizes."""

    compile_seconds = temp_bytes = None

    def __init__(self, case: Case, clip: bool) -> None:
        """Makes parameters and gradients, and takes two steps to warm up."""
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
        self(2)

    def __call__(self, steps: int) -> float:
        """Takes a number of steps and returns the seconds of one."""
        start = time.perf_counter()
        for _ in range(steps):
            if self.clip:
                # It scales in place; once under the threshold, it still multiplies.
                self.clip(self.params, 1.0)
            self.adamw.step()
        return (time.perf_counter() - start) / steps


def num_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def peak_bandwidth() -> float | None:
    """Bytes per second that the vendor states for this device's memory, if listed."""
    kind = jax.devices()[0].device_kind
    found = [name for name in PEAK_BANDWIDTHS if kind.startswith(name)]
    return PEAK_BANDWIDTHS[max(found, key=len)] if found else None


def in_turns(
    one: Callable[[int], float],
    other: Callable[[int], float],
    rounds: int,
    steps: int,
) -> tuple[list[float], list[float]]:
    """Seconds of a step of each, in rounds in which each of the two has its turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        # What runs second finds the caches as the first leaves them.
        for timed, into in ((one, seconds[0]), (other, seconds[1]))[:: 1 - 2 * (i % 2)]:
            into.append(timed(steps))
    return seconds


def measure(
    case: Case, rounds: int, steps: int, torch: bool, only: str
) -> list[dict[str, Any]]:
    """A row for each variant, from ``rounds`` pairs with the plain step, in turns.

    One variant is alive beside the plain step, so that 200M parameters fit in 24 GiB.
    """
    grads = make_tree(case, 1e-2)
    every = variants(OPTIMIZERS[case.optimizer])
    plain = Run(case, *every.pop("plain"), grads)
    contenders: dict[str, Callable[[], Any]] = {
        name: functools.partial(Run, case, init, step, grads)
        for name, (init, step) in every.items()
        if only in name
    }
    if torch and case.optimizer == "adamw":
        contenders["torch AdamW"] = lambda: TorchRun(case, clip=False)
        contenders["torch clip_grad_norm_, AdamW"] = lambda: TorchRun(case, clip=True)

    def row(name: str, run: Any, seconds: list[float], ratios: list[float]) -> dict:
        low, median, high = statistics.quantiles(ratios, n=4)
        compiled = run.compile_seconds
        return {
            **case._asdict(),
            "variant": name,
            "milliseconds": round(1e3 * statistics.median(seconds), 3),
            "ratio": round(median, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "gigabytes_per_second": round(
                plain.least_bytes() / statistics.median(seconds) / 1e9, 2
            ),
            "compile_cpu_seconds": None if compiled is None else round(compiled, 2),
            "temp_bytes": run.temp_bytes,
        }

    rows, plain_seconds = [], []
    for name, make in contenders.items():
        run = make()
        beside, seconds = in_turns(plain, run, rounds, steps)
        ratios = [a / b for a, b in zip(seconds, beside, strict=True)]
        rows.append(row(name, run, seconds, ratios))
        plain_seconds += beside
        del run
    floor = 1 + num_bytes(grads) / plain.least_bytes()
    rows.insert(0, row("plain", plain, plain_seconds, [1.0, 1.0]))
    return [{**row, "floor": round(floor, 3)} for row in rows]


def print_rows(rows: list[dict[str, Any]], peak: float | None) -> None:
    case = Case(*(rows[0][field] for field in Case._fields))
    print(
        f"\n{case.optimizer}, {case.params / 1e6:g}M parameters in {case.leaves} "
        f"leaves, {case.dtype}; the floor is {rows[0]['floor']:.2f}\n\n"
        "| step | ms | ratio to plain | quartiles | GB/s | of peak | compile CPU s "
        "| temporaries MB |\n|---" + "|---:" * 7 + "|"
    )
    for row in rows:
        low, high = row["quartiles"]
        speed = row["gigabytes_per_second"]
        compiled, temp = row["compile_cpu_seconds"], row["temp_bytes"]
        print(
            f"| {row['variant']} | {row['milliseconds']:.2f} | {row['ratio']:.2f} "
            f"| {low:.2f} to {high:.2f} | {speed:.1f} "
            f"| {f'{1e11 * speed / peak:.0f} %' if peak else ''} "
            f"| {'' if compiled is None else f'{compiled:.1f}'} "
            f"| {'' if temp is None else f'{temp / 1e6:.1f}'} |",
            flush=True,
        )


def cases_of(args: argparse.Namespace) -> list[Case]:
    if not args.all:
        sizes = itertools.product(
            args.optimizers, args.params, args.leaves, args.dtypes
        )
        return [Case(name, int(n), leaves, dtype) for name, n, leaves, dtype in sizes]
    middle = [
        Case(name, 25_000_000, 20, dtype)
        for name, dtype in itertools.product(OPTIMIZERS, ("float32", "bfloat16"))
    ]
    sizes = itertools.product((1_000_000, 25_000_000, 200_000_000), (20, 200, 2000))
    grown = [Case("adamw", n, leaves, "float32") for n, leaves in sizes]
    return middle + [case for case in grown if case not in middle]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every case of the README")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--params", nargs="+", type=float, default=[25e6])
    parser.add_argument("--leaves", nargs="+", type=int, default=[20])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--steps", type=int, help="steps per measurement: 10, on CPU 1 if not given"
    )
    parser.add_argument("--torch", action="store_true", help="also time PyTorch on CPU")
    parser.add_argument(
        "--only", default="", help="only variants with this in the name"
    )
    parser.add_argument("--out", type=pathlib.Path, help="where to write JSON")
    args = parser.parse_args()
    backend, device = jax.default_backend(), jax.devices()[0].device_kind
    if backend == "cpu":
        print("No accelerator was found: these are times of this machine's CPU.")
    elif args.torch:
        parser.error("--torch compares on CPU: run with JAX_PLATFORMS=cpu")
    steps = args.steps or (1 if backend == "cpu" else 10)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "optax")}
    if args.torch:
        versions["torch"] = importlib.metadata.version("torch")
    about = {
        "backend": backend,
        "device": device,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "rounds": args.rounds,
        "steps": steps,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for case in cases_of(args):
        rows += (new := measure(case, args.rounds, steps, args.torch, args.only))
        print_rows(new, peak_bandwidth())
        if args.out:  # After each case, since all of them take long.
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if args.out:
        draw("step_cost", args.out)


if __name__ == "__main__":
    main()
