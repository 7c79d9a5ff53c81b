"""Does a transformer of 100M parameters train through faults, and at what cost?

A Flax Linen decoder predicts bytes of Python's documentation. Parameters and AdamW's
moments are float32, activations bfloat16. Each contender has the same seed and the same
batches, and one program for both of its runs: one without faults and one with six. They
take segments of steps in turns, so that what slows the device slows all of them.

The loss that is recorded is that of the batch before the fault. The guard's share is
what its step takes longer than that of Optax's clip, of the same segment. Run `bash
benchmarks/on_accelerator.sh OUT transformer`.
"""

import argparse
import functools
import importlib
import math
import pathlib
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks.on_accelerator import _kit
from benchmarks.on_accelerator._trace import trace


class Size(NamedTuple):
    """Of the model, its batches and its runs."""

    layers: int = 14
    width: int = 768
    heads: int = 12
    length: int = 512
    sequences: int = 16
    steps: int = 300
    segment: int = 10
    traced: int = 5
    learning_rate: float = 6e-4


QUICK = Size(
    layers=2, width=64, heads=2, length=32, sequences=4, steps=24, segment=4, traced=1
)
BASE = "Optax clip"
# Name, factor of the loss, and what is added to one entry of the gradients.
FAULTS = (
    ("loss x 1e4", 1e4, 0.0),
    ("NaN in one gradient", 1.0, math.nan),
    ("Inf loss", math.inf, 0.0),
    ("loss x 1e30", 1e30, 0.0),
    ("Inf in one gradient", 1.0, math.inf),
    ("NaN loss", math.nan, 0.0),
)
COLORS = {
    "AdamW": "#000000",
    BASE: "#E69F00",
    "guard(clip=1.0)": "#0072B2",
    "guard(clip=1.0, skip=spike())": "#009E73",
    "auto": "#CC79A7",
}


class Decoder(nn.Module):
    """A decoder of bytes with learned positions and tied embeddings."""

    size: Size

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size, bf16 = self.size, jnp.bfloat16
        initial = nn.initializers.normal(0.02)
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=bf16, kernel_init=initial
        )
        norm = functools.partial(nn.RMSNorm, dtype=bf16)
        embed = nn.Embed(256, size.width, dtype=bf16, embedding_init=initial)
        place = self.param("positions", initial, (size.length, size.width))
        x = embed(tokens) + place.astype(bf16)
        for _ in range(size.layers):
            h = dense(3 * size.width)(norm()(x))
            q, k, v = jnp.split(h.reshape(*x.shape[:2], size.heads, -1), 3, axis=-1)
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + dense(size.width)(h.reshape(x.shape))
            x = x + dense(size.width)(nn.gelu(dense(4 * size.width)(norm()(x))))
        return embed.attend(norm(name="last_norm")(x)).astype(jnp.float32)


class Faults(NamedTuple):
    """What is wrong with each batch, float32 [steps]."""

    loss_factor: np.ndarray
    grad_added: np.ndarray


class Carry(NamedTuple):
    """The state of a run, and what it has recorded, [steps] each."""

    params: Any
    opt_state: Any
    step: Any
    losses: Any
    num_skipped: Any


def steps_with_faults(size: Size) -> list[int]:
    """Spread over the run, with time to recover after the last."""
    return [size.steps * (i + 2) // (len(FAULTS) + 3) for i in range(len(FAULTS))]


def make_faults(size: Size, is_faulty: bool) -> Faults:
    factor, added = np.ones(size.steps, np.float32), np.zeros(size.steps, np.float32)
    if is_faulty:
        for step, (_, *row) in zip(steps_with_faults(size), FAULTS, strict=True):
            factor[step], added[step] = row
    return Faults(factor, added)


def load_text() -> np.ndarray:
    """The bytes of Python's documentation, about 465 thousand."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(text.encode(), np.uint8)


def optimizers(size: Size) -> dict[str, Any]:
    """The contenders; each has AdamW with the same schedule inside of it."""
    warmup = max(1, size.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, size.learning_rate, warmup, size.steps, size.learning_rate / 10
    )
    adamw = functools.partial(optax.adamw, rate, b2=0.95, weight_decay=0.1)
    return {
        "AdamW": adamw(),
        BASE: optax.chain(optax.clip_by_global_norm(1.0), adamw()),
        "guard(clip=1.0)": og.guard(adamw(), clip=1.0),
        "guard(clip=1.0, skip=spike())": og.guard(
            adamw(), clip=1.0, skip=og.skip.spike()
        ),
        "auto": og.auto(adamw()),
    }


def loss_of(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    logits = model.apply({"params": params}, tokens[:, :-1])
    assert isinstance(logits, jax.Array)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


init_params = jax.jit(
    lambda model: model.init(
        jax.random.key(0), jnp.zeros((1, model.size.length), jnp.int32)
    )["params"],
    static_argnums=0,
)
jitted_loss = jax.jit(loss_of, static_argnums=0)


def make_step(tx: Any, model: Decoder) -> Callable[..., Carry]:
    """A train step, jitted and donated, that reads and writes on the device alone."""
    size = model.size
    is_guarded = isinstance(tx.init({"x": jnp.zeros(1)}), og.GuardState)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Carry, text: jax.Array, faults: Any) -> Carry:
        params, opt_state, count, losses, num_skipped = carry
        key = jax.random.fold_in(jax.random.key(1), count)
        last = len(text) - size.length - 1
        starts = jax.random.randint(key, (size.sequences, 1), 0, last)
        tokens = text[starts + np.arange(size.length + 1)].astype(jnp.int32)

        def faulty_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            loss = loss_of(model, params, tokens)
            return loss * faults.loss_factor[count], loss

        (value, loss), grads = jax.value_and_grad(faulty_loss, has_aux=True)(params)
        scale = grads["last_norm"]["scale"]
        grads["last_norm"]["scale"] = scale.at[0].add(faults.grad_added[count])
        if is_guarded:
            params, opt_state = og.apply_gradients(
                tx, params, opt_state, grads=grads, value=value
            )
            skipped = og.metrics(opt_state)["num_skipped"]
            num_skipped = num_skipped.at[count].set(skipped)
        else:
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return Carry(
            params, opt_state, count + 1, losses.at[count].set(loss), num_skipped
        )

    return step


class Contender:
    """An optimizer with its program, and the run that it is in."""

    def __init__(self, tx: Any, model: Decoder, text: jax.Array) -> None:
        """Compiles the step, timing that."""
        self.tx, self.model, self.text = tx, model, text
        self.step = make_step(tx, model)
        self.begin(is_faulty=False)
        start = time.perf_counter()
        # A call finds the program that is compiled here.
        self.step.lower(self.carry, text, self.faults).compile()  # pyright: ignore[reportFunctionMemberAccess]
        self.compile_seconds = time.perf_counter() - start

    def begin(self, is_faulty: bool) -> None:
        """Starts a run: the same initial parameters for all."""
        size = self.model.size
        self.carry: Any = None  # What it held makes room.
        params = init_params(self.model)
        self.carry = Carry(
            params,
            self.tx.init(params),
            jnp.zeros((), jnp.int32),
            jnp.zeros(size.steps),
            jnp.zeros(size.steps, jnp.int32),
        )
        self.faults = jax.tree.map(jnp.asarray, make_faults(size, is_faulty))

    def __call__(self, steps: int) -> float:
        """Takes a number of steps and returns the seconds of one."""
        jax.block_until_ready(self.carry)
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(self.carry, self.text, self.faults)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / steps


def held_out_loss(contender: Contender, text: np.ndarray) -> float:
    """The loss over windows spread over the text that was not trained on."""
    size = contender.model.size
    starts = np.linspace(0, len(text) - size.length - 1, size.sequences).astype(int)
    tokens = text[starts[:, None] + np.arange(size.length + 1)].astype(np.int32)
    return float(jitted_loss(contender.model, contender.carry.params, tokens))


def play(
    contenders: dict[str, Contender], is_faulty: bool, held_out: np.ndarray
) -> list[dict[str, Any]]:
    """Runs all of them in turns, and returns a row of each."""
    size = next(iter(contenders.values())).model.size
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for contender in contenders.values():
        contender.begin(is_faulty)
    for i in range(size.steps // size.segment):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(contenders[name](size.segment))
    rows = []
    for name, contender in contenders.items():
        # The first segment loads the program.
        timed, beside = seconds[name][1:], seconds[BASE][1:]
        ratios = [a / b for a, b in zip(timed, beside, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        losses = np.asarray(contender.carry.losses)
        total = np.asarray(contender.carry.num_skipped)
        skipped = np.flatnonzero(np.diff(total, prepend=0))
        rows.append(
            {
                "contender": name,
                "faults": is_faulty,
                "step_ms": 1e3 * statistics.median(timed),
                "ratio": ratio,
                "quartiles": [low, high],
                "compile_seconds": contender.compile_seconds,
                "last_loss": float(np.mean(losses[-size.segment :])),
                "held_out_loss": held_out_loss(contender, held_out),
                "is_finite": all(
                    bool(jnp.all(jnp.isfinite(x)))
                    for x in jax.tree.leaves(contender.carry.params)
                ),
                "skips": int(total[-1]),
                "skipped_steps": skipped.tolist(),
                "losses": losses.tolist(),
            }
        )
    return rows


def add_device_times(contenders: dict[str, Contender], rows: list[Any]) -> None:
    """Adds to the rows what the device does in a step, where a trace shows it."""
    for name, contender in contenders.items():
        steps = contender.model.size.traced
        contender.begin(is_faulty=False)
        contender(1)
        seen = trace(lambda c=contender, n=steps: c(n))
        for row in rows:
            if row["contender"] == name:
                row["device_ms"] = seen and 1e3 * seen.busy / steps
                row["kernels"] = seen and seen.kernels / steps


def print_rows(rows: list[dict[str, Any]]) -> None:
    for is_faulty in (False, True):
        device = {
            row["contender"]: row.get("device_ms")
            for row in rows
            if row["faults"] == is_faulty
        }
        _kit.print_table(
            "With six faults" if is_faulty else "Without faults",
            [
                *("contender", "step ms", "ratio to Optax's clip", "quartiles"),
                *("device ms", "ratio", "kernels", "skips", "last losses"),
                *("held-out loss", "compile s"),
            ],
            [
                [
                    f"`{row['contender']}`",
                    _kit.number(row["step_ms"]),
                    _kit.number(row["ratio"], 3),
                    "{:.3f} to {:.3f}".format(*row["quartiles"]),
                    _kit.number(row.get("device_ms")),
                    _kit.number(row.get("device_ms") and _ratio(device, row), 3),
                    _kit.number(row.get("kernels"), 0),
                    str(row["skips"]),
                    _kit.number(row["last_loss"], 3),
                    _kit.number(row["held_out_loss"], 3),
                    _kit.number(row["compile_seconds"], 1),
                ]
                for row in rows
                if row["faults"] == is_faulty
            ],
        )


def _ratio(device: dict[str, Any], row: dict[str, Any]) -> float:
    return row["device_ms"] / device[BASE]


def draw(rows: list[dict[str, Any]], size: Size, path: pathlib.Path) -> None:
    """The losses without faults and with them; where a line ends, all is NaN."""
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for ax, is_faulty in zip(axes, (False, True), strict=True):
        for row in rows:
            if row["faults"] == is_faulty:
                name = row["contender"]
                # The later, the thinner: where they are the same, all are seen.
                width = 4 - list(COLORS).index(name)
                ax.plot(row["losses"], color=COLORS[name], label=name, linewidth=width)
        if is_faulty:
            for step, (name, *_) in zip(steps_with_faults(size), FAULTS, strict=True):
                ax.axvline(step, color="grey", linewidth=0.7, linestyle=":")
                ax.annotate(name, (step, 1.0), xycoords=("data", "axes fraction"))
                ax.texts[-1].set(rotation=90, va="top", ha="right", fontsize=7)
        ax.set(title="six faults" if is_faulty else "no faults", xlabel="step")
    axes[0].set_ylabel("loss of the batch [nats per byte]")
    axes[0].legend(frameon=False)
    figure.suptitle(jax.devices()[0].device_kind)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    size = QUICK if args.quick else Size()
    model = Decoder(size)
    text = load_text()
    train, held_out = np.split(text, [len(text) * 9 // 10])
    shapes = jax.eval_shape(functools.partial(init_params, model))
    report = _kit.Report(
        args.out / "transformer.json",
        settings=size._asdict(),
        dtypes="parameters and moments float32, activations bfloat16",
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        num_leaves=len(jax.tree.leaves(shapes)),
        faults=[
            {"step": step, "fault": name}
            for step, (name, *_) in zip(steps_with_faults(size), FAULTS, strict=True)
        ],
    )
    on_device = jnp.asarray(train)
    contenders = {}
    for name, tx in optimizers(size).items():
        contenders[name] = Contender(tx, model, on_device)
        print(f"{name}: compiled in {contenders[name].compile_seconds:.1f} s")
    for is_faulty in (False, True):
        for row in play(contenders, is_faulty, held_out):
            report.add(row)
        print(f"Faults {is_faulty}: ended after {report.seconds():.0f} s.")
        draw(report.rows, size, args.out / "transformer.png")
    add_device_times(contenders, report.rows)
    report.write()
    print_rows(report.rows)
    print(f"Took {report.seconds():.0f} s.")


if __name__ == "__main__":
    run(_kit.read_arguments(__doc__))
