"""What does the guard cost a Flax transformer sharded over data and model axes?

Parameters are sharded over both axes of a mesh: over `data` as in FSDP, and over
`model` as in tensor parallelism. Three questions:

* Compiled for 16 TPU v5e and 8 H100, with 110M parameters, how many collectives, bytes
  and temporaries has a whole train step, with the guard and without? Nothing of this is
  executed; see `benchmarks.accelerators`, whose compilers it uses.
* Run here, small, on 8 virtual devices: are the losses of a clean run the same?
* Run here from 1 to 8 virtual devices, with the batch of each device kept: does the
  guard's share of the step grow?

`python -m benchmarks.scale_out`; without a question: `--platforms` and no name,
`--steps 0` or `--rounds 0`.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

# Before jax is imported. Eight devices that share the cores of this machine.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from benchmarks.accelerators import (
    COMPILERS,
    GUARDED,
    IN_TRAIN_STEP,
    RESULTS,
    VARIANTS,
    Cost,
    Platform,
    compile_step,
    has_compiler,
    mesh,
)

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_guard as og
from optax_guard.flax import TrainState

AXES = ("data", "model")
# Clipped steps differ from plain ones, and rightly: a clean run is one without.
UNCLIPPED = 1e6


class Size(NamedTuple):
    """Of a transformer and of its batch.

    Attributes:
      width: Entries of a residual stream.
      layers: Number of blocks.
      vocabulary: Number of tokens.
      sequences: Sequences of a batch for each device.
      length: Tokens of a sequence.
      dtype: Of activations, and of parameters where they are used.
    """

    width: int
    layers: int
    vocabulary: int
    sequences: int
    length: int
    dtype: str


LARGE = Size(
    width=1024, layers=6, vocabulary=32768, sequences=4, length=512, dtype="bfloat16"
)
SMALL = Size(
    width=256, layers=2, vocabulary=1024, sequences=2, length=64, dtype="float32"
)


def split(*axes: str) -> Callable[..., Any]:
    """How a matrix is initialized, and over which axes it is sharded."""
    return nn.with_partitioning(nn.initializers.normal(0.02), axes)


class Transformer(nn.Module):
    """A decoder with parameters in float32 and tied embeddings."""

    size: Size
    mesh: Mesh

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width, dtype = self.size.width, self.size.dtype
        # Columns of one matrix, then rows of the next: one sum over `model` for both.
        into = functools.partial(
            nn.Dense, use_bias=False, dtype=dtype, kernel_init=split(*AXES)
        )
        out_of = functools.partial(
            nn.Dense, use_bias=False, dtype=dtype, kernel_init=split(*AXES[::-1])
        )
        norm = functools.partial(nn.RMSNorm, dtype=dtype)
        embed = nn.Embed(
            self.size.vocabulary,
            width,
            dtype=dtype,
            embedding_init=split(*AXES[::-1]),
        )
        stream = NamedSharding(self.mesh, PartitionSpec("data"))
        x = jax.lax.with_sharding_constraint(embed(tokens), stream)
        for _ in range(self.size.layers):
            q, k, v = (
                into(width)(h).reshape(*x.shape[:2], -1, min(width // 2, 128))
                for h in [norm()(x)] * 3
            )
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + out_of(width)(h.reshape(x.shape))
            x = x + out_of(width)(nn.gelu(into(4 * width)(norm()(x))))
            x = jax.lax.with_sharding_constraint(x, stream)
        return embed.attend(norm()(x)).astype(jnp.float32)


class Case(NamedTuple):
    """A model on a mesh.

    Attributes:
      platform: The accelerator compiled for.
      mesh: Devices along `data` and `model`.
      size: Of the model and its batch.
    """

    platform: Platform
    mesh: Mesh
    size: Size

    @property
    def num_params(self) -> int:
        return num_params(self)

    @property
    def array_bytes(self) -> float:
        """Bytes on one device of one array the size of all parameters, float32."""
        return 4 * self.num_params / self.mesh.size

    def shardings(self, tree: Any) -> Any:
        """As the initializers say; what they say nothing of is replicated."""
        return nn.get_sharding(tree, self.mesh)

    def place(self, tree: Any) -> Any:
        """Abstract arrays with their shardings."""

        def place_box(sharding: NamedSharding, box: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), box
            )

        return jax.tree.map(place_box, self.shardings(tree), tree)

    def tokens(self) -> jax.ShapeDtypeStruct:
        """A batch that grows with the devices."""
        shape = self.size.sequences * self.mesh.size, self.size.length + 1
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


LARGE_CASES: dict[Platform, Callable[[], Case]] = {
    "v5e": lambda: Case("v5e", mesh("v5e", (4, 4), AXES), LARGE),
    "h100": lambda: Case("h100", mesh("h100", (4, 2), AXES), LARGE),
}


@functools.cache
def model_of(size: Size, mesh: Mesh) -> Transformer:
    """The same for the same: states are of one type only if their model is one."""
    return Transformer(size, mesh)


def make_state(case: Case, tx: optax.GradientTransformation) -> TrainState:
    model = model_of(case.size, case.mesh)
    rows = case.mesh.shape["data"]
    variables = model.init(jax.random.key(0), jnp.zeros((rows, 8), jnp.int32))
    return TrainState.create(apply_fn=model.apply, tx=tx, **variables)


def abstract_state(case: Case, tx: optax.GradientTransformation) -> TrainState:
    return jax.eval_shape(lambda: make_state(case, tx))


@functools.cache
def num_params(case: Case) -> int:
    params = abstract_state(case, optax.identity()).params
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
    """The step of a user: nothing in it knows of the mesh."""

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss


# Compiled for accelerators --------------------------------------------------------


def cost_of(name: str, case: Case) -> Cost:
    """Returns the cost of a whole train step, its state donated."""
    state = case.place(abstract_state(case, VARIANTS[name].tx()))
    outputs = jax.tree.map(lambda x: x.sharding, state), None
    return compile_step(
        train_step, case, state, case.tokens(), donate=(0,), outputs=outputs
    )[0]


def collectives(cost: Cost) -> int:
    return cost.all_reduces + cost.other_collectives


def guard_share(guarded: Cost, plain: Cost) -> float:
    """The part of a guarded step's memory traffic that is the guard's."""
    return (guarded.passes - plain.passes) / guarded.passes


def compiled_rows(platform: Platform, names: list[str]) -> list[dict[str, Any]]:
    case = LARGE_CASES[platform]()
    rows = []
    print(
        f"\nCompiled for {case.mesh.size} {platform}, "
        f"{' x '.join(f'{k} {n}' for k, n in case.mesh.shape.items())}, "
        f"{case.num_params / 1e6:.0f}M parameters; nothing was executed.\n\n"
        "| train step | all-reduces | other collectives | GB read and written "
        "| passes | temporaries MB | conditionals |\n|---" + "|---:" * 6 + "|"
    )
    for name in names:
        cost = cost_of(name, case)
        row = {"platform": platform, "mesh": dict(case.mesh.shape), "step": name}
        row |= {"num_params": case.num_params, "array_bytes": case.array_bytes}
        rows.append(row | cost._asdict())
        print(
            f"| {name} | {cost.all_reduces} | {cost.other_collectives} "
            f"| {cost.passes * case.array_bytes / 1e9:.3f} | {cost.passes:.2f} "
            f"| {cost.temp_bytes / 1e6:.0f} | {cost.conditionals} |",
            flush=True,
        )
    return rows


# Run here ------------------------------------------------------------------------


def virtual_case(devices: int) -> Case:
    """A small model on virtual devices, both axes in use where there are four."""
    model = 2 if devices >= 4 else 1
    chosen = np.array(jax.devices()[:devices]).reshape(-1, model)
    # The platform is that of a compiler, which is not asked for anything here.
    return Case("h100", Mesh(chosen, AXES), SMALL)


class Run:
    """A compiled train step, and the state that it steps."""

    def __init__(self, case: Case, tx: optax.GradientTransformation):
        """Makes the state, sharded, and compiles the step."""
        self.case = case
        shardings = case.shardings(abstract_state(case, tx))
        make = jax.jit(lambda: make_state(case, tx), out_shardings=shardings)
        self.state = make()
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
        self.step = step.lower(self.state, case.tokens()).compile()

    def __call__(self, index: int) -> jax.Array:
        """Takes a step on the batch of this index, and returns its loss."""
        like = self.case.tokens()
        rng = np.random.default_rng(index)
        tokens = rng.integers(self.case.size.vocabulary, size=like.shape)
        # Something to learn: every token comes twice.
        tokens[:, 1::2] = tokens[:, : tokens.shape[1] - 1 : 2]
        batch = jax.device_put(tokens.astype(np.int32), like.sharding)
        self.state, loss = self.step(self.state, batch)
        return loss


def loss_rows(steps: int) -> dict[str, Any]:
    """Losses of a clean run with the guard and without, on eight virtual devices."""
    case = virtual_case(8)
    adamw = VARIANTS["adamw"].tx
    runs = {
        "adamw": Run(case, adamw()),
        f"guard(adamw, clip={UNCLIPPED:g})": Run(case, og.guard(adamw(), UNCLIPPED)),
    }
    losses = {name: [float(run(i)) for i in range(steps)] for name, run in runs.items()}
    pairs = list(zip(*losses.values(), strict=True))
    largest = max(abs(plain - guarded) / plain for plain, guarded in pairs)
    is_same = [plain == guarded for plain, guarded in pairs]
    num_same = is_same.index(False) if False in is_same else steps
    print(
        f"\nLosses of {steps} clean steps on 8 virtual devices, data 4 x model 2, "
        f"{case.size.dtype}: from {pairs[0][0]:.4f} to {pairs[-1][0]:.4f}. With and "
        f"without the guard the first {num_same} are the same to the last bit, and all "
        f"to {largest:.1e} of their size."
    )
    return {"losses": losses, "num_same": num_same, "largest_difference": largest}


def weak_scaling_rows(rounds: int) -> list[dict[str, Any]]:
    """Time of a guarded step over a plain one, in turns, from 1 to 8 devices."""
    print(
        "\n| virtual devices | mesh | ms of a plain step | ratio, guarded to plain "
        "| quartiles |\n|---:|---" + "|---:" * 3 + "|"
    )
    rows = []
    for devices in (1, 2, 4, 8):
        case = virtual_case(devices)
        plain, guarded = (Run(case, VARIANTS[n].tx()) for n in ("adamw", GUARDED))
        for run in (plain, guarded):
            jax.block_until_ready(run(0))
        seconds: dict[Run, list[float]] = {plain: [], guarded: []}
        for i in range(rounds):
            # What runs second finds the caches as the first leaves them.
            for run in (plain, guarded)[:: 1 - 2 * (i % 2)]:
                start = time.perf_counter()
                jax.block_until_ready((run(i), run.state))
                seconds[run].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "devices": devices,
                "mesh": dict(case.mesh.shape),
                "milliseconds": round(1e3 * statistics.median(seconds[plain]), 1),
                "ratio": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        )
        shape = " x ".join(f"{k} {n}" for k, n in case.mesh.shape.items())
        print(
            f"| {devices} | {shape} | {rows[-1]['milliseconds']} | {median:.3f} "
            f"| {low:.3f} to {high:.3f} |",
            flush=True,
        )
    return rows


def main() -> None:
    """Prints the tables and writes them as JSON, over the parts that were made anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    platforms = get_args(Platform)
    parser.add_argument("--platforms", nargs="*", choices=platforms, default=platforms)
    parser.add_argument("--steps", type=int, default=20, help="of the clean run")
    parser.add_argument("--rounds", type=int, default=31, help="for weak scaling")
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS / "scale_out.json"
    )
    args = parser.parse_args()
    result: dict[str, Any] = {"compiled": []}
    if args.output.exists():
        result = json.loads(args.output.read_text())
    names = ("jax", "jaxlib", "flax", "optax")
    result["versions"] = {name: importlib.metadata.version(name) for name in names}
    if args.steps:
        result["clean_run"] = loss_rows(args.steps)
    if args.rounds:
        result["weak_scaling"] = weak_scaling_rows(args.rounds)
    for platform in args.platforms:
        if not has_compiler(platform):
            print(f"\n{COMPILERS[platform]} is not installed: no {platform}.")
            continue
        # For v5e `apply_if_finite` takes minutes, and is known to be worse.
        chosen = [n for n in IN_TRAIN_STEP if platform == "h100" or "finite" not in n]
        rows = compiled_rows(platform, chosen)
        by_name = {row["step"]: Cost(*(row[f] for f in Cost._fields)) for row in rows}
        share = guard_share(by_name[GUARDED], by_name["adamw"])
        print(f"\nThe guard is {100 * share:.2f} % of the guarded step's traffic.")
        others = [row for row in result["compiled"] if row["platform"] != platform]
        result["compiled"] = others + rows
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
