"""What does a guarded step cost on TPU v5e and H100, as their compilers see it?

The compilers of both platforms come as Python wheels and compile on any machine, so the
optimized program can be read without the hardware: memory traffic, collectives,
conditionals, donation, temporaries and host transfers. Nothing here is executed and
nothing here is a time on a device.

Install `libtpu`, `jax-cuda13-plugin` and `jax-cuda13-pjrt` in the versions that the
installed jax names, then run `python -m benchmarks.accelerators`. The unit is a *pass*:
one read or one write of one parameter-sized array on each device. Plain AdamW makes 7:
it reads parameters, both moments and gradients, and writes parameters and moments.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

# Before jax is imported: compile only, and keep the TPU runtime from looking for a TPU.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
} | dict(os.environ)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_guard as og

Platform = Literal["v5e", "h100"]
Layout = Literal["fsdp", "data_parallel"]
Step = Callable[..., Any]

RESULTS = pathlib.Path(__file__).parent / "results"
COMPILERS: dict[Platform, str] = {"v5e": "libtpu", "h100": "jax_plugins.xla_cuda13"}
DEVICES = 8
VOCABULARY = 32768
# Of the transformer's batch: sequences, and tokens in each.
SEQUENCES, LENGTH = 64, 512

# An H100 SXM 80 GB, from its public figures, as a `GpuTargetConfigProto`.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


_OTHER_COLLECTIVES = (
    r" (?:all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
# Sends and receives to the host, buffers in its memory, calls back into Python.
_HOST = r'is_host_transfer=true|S\(5\)|custom_call_target="[^"]*callback'


class Cost(NamedTuple):
    """What the compiler of one platform made of one step, for each device.

    Attributes:
      passes: Bytes read and written, in units of one parameter-sized array.
      all_reduces: Number of all-reduces; a combined one counts once.
      other_collectives: Number of gathers, scatters, permutes and the like.
      conditionals: Number of conditionals. The byte count adds both branches of each.
      host_transfers: Number of sends, receives and buffers that involve the host.
      temp_bytes: Bytes of temporary buffers.
      alias_bytes: Bytes of outputs that reuse a donated argument.
      fusions: Number of fusions, on a GPU about the number of kernels.
      compile_seconds: Processor time of compiling, all threads together.
    """

    passes: float
    all_reduces: int
    other_collectives: int
    conditionals: int
    host_transfers: int
    temp_bytes: int
    alias_bytes: int
    fusions: int
    compile_seconds: float


def has_compiler(platform: Platform) -> bool:
    """Whether the compiler for `platform` is installed."""
    try:
        return importlib.util.find_spec(COMPILERS[platform]) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def mesh(
    platform: Platform,
    shape: tuple[int, ...] = (DEVICES,),
    axes: tuple[str, ...] = ("d",),
) -> Mesh:
    """Returns a mesh of 8 devices, or of 16 on v5e, that need not exist."""
    count = math.prod(shape)
    if platform == "v5e":
        name = {8: "v5e:2x4", 16: "v5e:4x4"}[count]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x1x{count}"
        )
    return Mesh(np.array(topology.devices).reshape(shape), axes)


def parameter_shapes(leaves: int = 20) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a transformer of about 96.5M parameters."""
    blocks, extra = divmod(leaves - 2, 6)
    width = 128 * round(8 * math.sqrt(3 / blocks))
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, width)}
    for i in range(blocks):
        shapes |= {
            f"block{i:02}/norm1": (width,),
            f"block{i:02}/qkv": (width, 3 * width),
            f"block{i:02}/out": (width, width),
            f"block{i:02}/norm2": (width,),
            f"block{i:02}/up": (width, 8 * width),
            f"block{i:02}/down": (8 * width, width),
        }
    shapes |= {f"extra{i}": (width,) for i in range(extra)}
    return shapes | {"norm": (width,)}


class Case(NamedTuple):
    """Where and on what a step is compiled.

    Attributes:
      platform: The accelerator compiled for.
      layout: Whether parameters are sharded over the devices or replicated.
      dtype: The dtype of parameters, gradients and so of AdamW's moments.
      leaves: Number of parameter arrays.
    """

    platform: Platform
    layout: Layout = "fsdp"
    dtype: str = "float32"
    leaves: int = 20

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return parameter_shapes(self.leaves)

    @property
    def array_bytes(self) -> int:
        """Bytes on one device of one array the size of all parameters."""
        size = sum(math.prod(s) for s in self.shapes.values())
        shards = DEVICES if self.layout == "fsdp" else 1
        return size * jnp.dtype(self.dtype).itemsize // shards

    def place(self, tree: Any) -> Any:
        """Gives abstract arrays shaped like parameters their sharding, others none."""
        sharded = set(self.shapes.values()) if self.layout == "fsdp" else set()

        def place_leaf(x):
            spec = PartitionSpec("d") if x.shape in sharded else PartitionSpec()
            sharding = NamedSharding(mesh(self.platform), spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place_leaf, tree)

    def params(self) -> Any:
        """Returns the abstract parameters."""
        return self.place(
            {k: jax.ShapeDtypeStruct(s, self.dtype) for k, s in self.shapes.items()}
        )


class Placed(Protocol):
    """What `compile_step` must know of a case."""

    @property
    def platform(self) -> Platform: ...

    @property
    def array_bytes(self) -> float: ...

    def place(self, tree: Any) -> Any: ...


def compile_step(
    step: Step,
    case: Placed,
    *args: Any,
    donate: tuple[int, ...] = (0, 1),
    outputs: Any = None,
) -> tuple[Cost, str]:
    """Compiles a step and reads its cost.

    Args:
      step: A function of `args`. Donated arguments come first, in the order of the
        outputs that take their place, because donation pairs buffers in that order.
      case: Where it is compiled.
      *args: Abstract arrays with their shardings.
      donate: Which arguments are donated.
      outputs: Shardings of the outputs; if not given, in device memory and sharded like
        the parameters of the same shape.

    Returns:
      The cost, and the optimized program as text.
    """
    if outputs is None:
        outputs = jax.tree.map(
            lambda x: x.sharding, case.place(jax.eval_shape(step, *args))
        )
    jitted = jax.jit(step, donate_argnums=donate, out_shardings=outputs)
    lowered = jitted.lower(*args)
    # With its scratch memory in use, XLA's byte count for TPU is 2 to 5 times too high.
    options: dict[str, str | bool] = (
        {"xla_msa_enable": "false"} if case.platform == "v5e" else {}
    )
    start = time.process_time()
    compiled = lowered.compile(options)
    seconds = time.process_time() - start
    return _read(compiled, case, seconds), compiled.as_text() or ""


def _read(compiled: Any, case: Placed, seconds: float) -> Cost:
    text = compiled.as_text()
    memory = compiled.memory_analysis()

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Cost(
        passes=_bytes_accessed(compiled, case) / case.array_bytes,
        all_reduces=count(r" all-reduce(?:-start)?\("),
        other_collectives=count(_OTHER_COLLECTIVES),
        conditionals=count(r" conditional\("),
        host_transfers=count(_HOST),
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        fusions=count(r" fusion\("),
        compile_seconds=seconds,
    )


def _bytes_accessed(compiled: Any, case: Placed) -> float:
    if case.platform == "v5e":
        return compiled.cost_analysis()["bytes accessed"]
    # Private, but the only way to the cost of a program compiled for a GPU.
    jaxlib = importlib.import_module("jaxlib._jax")
    module = compiled.runtime_executable().hlo_modules()[0]
    client = jax.devices("cpu")[0].client
    return jaxlib.hlo_module_cost_analysis(client, module)["bytes accessed"]


# The steps -----------------------------------------------------------------------


def by_update(tx: optax.GradientTransformation) -> Step:
    """The two calls every Optax user writes."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def by_apply_gradients(tx: optax.GradientTransformation) -> Step:
    """This library's one call."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        return og.apply_gradients(tx, params, opt_state, grads=grads)

    return step


class Variant(NamedTuple):
    """One row of the table: an optimizer, and how a step calls it.

    Attributes:
      tx: Makes the optimizer.
      call: Makes the step from the optimizer.
    """

    tx: Callable[[], optax.GradientTransformation]
    call: Callable[[optax.GradientTransformation], Step] = by_update


def adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


def optax_clip() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), adamw())


def two_groups() -> optax.GradientTransformationExtraArgs:
    return og.clip_by_group_norm(
        {"embedding": 0.1, "blocks": og.threshold.zscore()},
        lambda path: "embedding" if path == "embedding" else "blocks",
    )


OPTAX = {
    "adamw": Variant(adamw),
    "chain(optax.clip_by_global_norm, adamw)": Variant(optax_clip),
    "apply_if_finite(chain(optax.clip_by_global_norm, adamw))": Variant(
        lambda: optax.apply_if_finite(optax_clip(), 5)
    ),
}
OURS = {
    "chain(clip_by_global_norm, adamw)": Variant(
        lambda: optax.chain(og.clip_by_global_norm(1.0), adamw())
    ),
    "guard(adamw, clip=1.0), update": Variant(lambda: og.guard(adamw(), 1.0)),
    "guard(adamw, clip=1.0), apply_gradients": Variant(
        lambda: og.guard(adamw(), 1.0), by_apply_gradients
    ),
    "guard(adamw, clip=zscore, skip=spike)": Variant(
        lambda: og.guard(
            adamw(), og.threshold.zscore(), skip=og.skip.spike(watch="grad_norm")
        )
    ),
    "guard(adamw, clip=quantile)": Variant(
        lambda: og.guard(adamw(), og.threshold.quantile(0.9))
    ),
    "guard(adamw, clip=relative_to_mean)": Variant(
        lambda: og.guard(adamw(), og.threshold.relative_to_mean())
    ),
    "guard(adamw, clip=clip_by_leaf_norm(zscore))": Variant(
        lambda: og.guard(adamw(), og.clip_by_leaf_norm(og.threshold.zscore()))
    ),
    "guard(adamw, clip=clip_by_group_norm)": Variant(
        lambda: og.guard(adamw(), two_groups())
    ),
    "guard(adamw, clip=clip_by_unit_norm)": Variant(
        lambda: og.guard(adamw(), og.clip_by_unit_norm(0.01))
    ),
    "guard(adamw, clip=clip_by_value)": Variant(
        lambda: og.guard(adamw(), og.clip_by_value(0.1))
    ),
    "guard(adamw, clip=1.0, max_update=relative_to_params)": Variant(
        lambda: og.guard(adamw(), 1.0, max_update=og.threshold.relative_to_params()),
        by_apply_gradients,
    ),
    "guard(chain(optax.clip_by_global_norm, adamw))": Variant(
        lambda: og.guard(optax_clip())
    ),
}
VARIANTS = OPTAX | OURS


def cost_of(variant: Variant, case: Case) -> Cost:
    """Returns the cost of one optimizer step, parameters and state donated."""
    tx = variant.tx()
    params = case.params()
    opt_state = case.place(jax.eval_shape(tx.init, params))
    return compile_step(variant.call(tx), case, params, opt_state, params)[0]


def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns the next-token loss of the transformer of `parameter_shapes`."""

    def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        scaled = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + 1e-6)
        return (scaled * scale).astype(jnp.bfloat16)

    weights = {k: w.astype(jnp.bfloat16) for k, w in params.items()}
    x = weights["embedding"][tokens[:, :-1]]
    for i in range(sum(name.endswith("/qkv") for name in params)):
        block = {k.split("/")[1]: w for k, w in weights.items() if f"block{i:02}/" in k}
        h = normalized(x, block["norm1"]) @ block["qkv"]
        q, k, v = jnp.split(h.reshape(*x.shape[:2], -1, 128), 3, axis=2)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + h.reshape(x.shape) @ block["out"]
        h = normalized(x, block["norm2"]) @ block["up"]
        x = x + jax.nn.gelu(h) @ block["down"]
    logits = normalized(x, weights["norm"]) @ weights["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    ).mean()


def train_step_cost_of(
    variant: Variant, case: Case, batch: tuple[int, int] = (SEQUENCES, LENGTH)
) -> Cost:
    """Returns the cost of a whole train step of the transformer."""
    tx = variant.tx()

    def step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
        value, grads = jax.value_and_grad(loss)(params, tokens)
        params, opt_state = variant.call(tx)(params, opt_state, grads)
        return params, opt_state, value

    params = case.params()
    opt_state = case.place(jax.eval_shape(tx.init, params))
    sequences, length = batch
    tokens = jax.ShapeDtypeStruct(
        (sequences, length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh(case.platform), PartitionSpec("d")),
    )
    return compile_step(step, case, params, opt_state, tokens)[0]


# The table -----------------------------------------------------------------------

GUARDED = "guard(adamw, clip=1.0), apply_gradients"
IN_TRAIN_STEP = [*OPTAX, GUARDED]
AT_MANY_LEAVES = [*OPTAX, GUARDED, "guard(adamw, clip=clip_by_leaf_norm(zscore))"]
CASES = [
    Case(platform, layout, dtype)
    for platform in COMPILERS
    for layout in ("fsdp", "data_parallel")
    for dtype in ("float32", "bfloat16")
]


def share_of_train_step(costs: dict[str, Cost], whole: Cost) -> str:
    """Says how much of a whole guarded train step is the guard, and the optimizer."""
    step = costs[GUARDED].passes
    guard = step - costs["adamw"].passes
    return (
        f"A whole guarded train step makes {whole.passes:.0f} passes. The optimizer's "
        f"step is {step:.2f} of them, {100 * step / whole.passes:.1f} %; the guard is "
        f"{guard:.2f}, {100 * guard / whole.passes:.2f} %."
    )


def main() -> None:
    """Prints the table, Optax's rows before ours, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--leaves", type=int, nargs="+", default=[20, 400])
    parser.add_argument("--output", default=RESULTS / "accelerators.json")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    rows = []

    def report(case: Case, name: str, cost: Cost) -> None:
        rows.append(case._asdict() | {"step": name} | cost._asdict())
        print(
            f"| {name} | {cost.passes:.2f} | {cost.all_reduces} | {cost.conditionals} "
            f"| {cost.host_transfers} | {cost.temp_bytes / 1e6:.1f} "
            f"| {cost.alias_bytes / case.array_bytes:.2f} | {cost.fusions} "
            f"| {cost.compile_seconds:.1f} |",
            flush=True,
        )

    for case in CASES:
        if not has_compiler(case.platform):
            print(f"\n{COMPILERS[case.platform]} is not installed: no {case.platform}.")
            continue
        for leaves in args.leaves:
            if leaves != 20 and case[1:3] != ("fsdp", "float32"):
                continue
            sized = case._replace(leaves=leaves)
            print(
                f"\nCompiled for {case.platform}, {case.layout}, {case.dtype}, ", end=""
            )
            print(f"{leaves} leaves; nothing was executed.\n")
            print(
                "| step | passes | all-reduces | conditionals | host | temp MB ", end=""
            )
            print("| donated | fusions | compile s |\n|---" + "|---:" * 8 + "|")
            names = VARIANTS if leaves == 20 else AT_MANY_LEAVES
            costs = {name: cost_of(VARIANTS[name], sized) for name in names}
            for name, cost in costs.items():
                report(sized, name, cost)
            if sized == Case(case.platform):
                whole = {
                    n: train_step_cost_of(VARIANTS[n], case) for n in IN_TRAIN_STEP
                }
                for name, cost in whole.items():
                    report(case, f"train step: {name}", cost)
                print(f"\n{share_of_train_step(costs, whole[GUARDED])}")

    versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "optax")}
    result = {"versions": versions, "executed": False, "rows": rows}
    pathlib.Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
