"""The finite law: what was finite before a step is finite after it, entry by entry.

Every optimizer of Optax takes steps with faults in gradients, loss and learning rate.
After each step the oracle is one step of the same optimizer without a guard, from the
parameters and the state before it: NumPy finds which of its entries must be kept.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib as contrib
import pytest

import optax_guard as og
from tests.strategies import same_bits

REASON = og.SkipReason
# Above it, float32 cannot hold the square of the norm.
LARGEST_NORM = math.sqrt(float(np.finfo(np.float32).max))
RATE = 0.01

# The optimizers ----------------------------------------------------------------

Schedule = Callable[[Any], Any]


def then_scaled(make: Callable[[], Any]) -> Callable[[Schedule], Any]:
    """For an optimizer that takes no schedule: one behind it."""
    return lambda rate: optax.chain(make(), optax.scale_by_schedule(rate))


def without_value(tx: Any) -> optax.GradientTransformation:
    """For an optimizer that takes no loss."""
    return optax.GradientTransformation(tx.init, tx.update)


# Each from its learning rate, a schedule.
OPTIMIZERS: dict[str, Callable[[Schedule], Any]] = {
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": lambda rate: optax.adafactor(rate, min_dim_size_to_factor=4),
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "amsgrad": optax.amsgrad,
    "fromage": then_scaled(lambda: optax.fromage(RATE)),
    "lamb": optax.lamb,
    "lars": lambda rate: optax.lars(rate, momentum=0.9),
    "lbfgs": lambda rate: optax.lbfgs(rate, linesearch=None),
    "lion": optax.lion,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=jax.random.key(0)),
    "novograd": optax.novograd,
    "optimistic_adam": then_scaled(lambda: optax.optimistic_adam(RATE)),
    "optimistic_adam_v2": optax.optimistic_adam_v2,
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "polyak_sgd": lambda rate: optax.polyak_sgd(scaling=rate),
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "rmsprop centered": lambda rate: optax.rmsprop(rate, centered=True, momentum=0.9),
    "rprop": then_scaled(lambda: optax.rprop(RATE)),
    "sgd": optax.sgd,
    "sgd momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "sign_sgd": optax.sign_sgd,
    "signum": optax.signum,
    "sm3": then_scaled(lambda: optax.sm3(RATE)),
    "yogi": optax.yogi,
    "acprop": contrib.acprop,
    "ademamix": contrib.ademamix,
    "adopt": contrib.adopt,
    "cocob": then_scaled(contrib.cocob),
    "dadapt_adamw": contrib.dadapt_adamw,
    "dog": then_scaled(lambda: contrib.dog(RATE)),
    "dowg": then_scaled(lambda: contrib.dowg()),
    "galore": lambda rate: contrib.galore(rate, rank=2),
    "madgrad": contrib.madgrad,
    "mechanize": lambda rate: contrib.mechanize(optax.sgd(rate)),
    "momo": contrib.momo,
    "momo_adam": contrib.momo_adam,
    "muon": contrib.muon,
    "prodigy": contrib.prodigy,
    "reduce_on_plateau": lambda rate: optax.chain(
        optax.adam(rate), contrib.reduce_on_plateau(patience=1)
    ),
    "sam": lambda rate: without_value(contrib.sam(optax.sgd(rate), optax.sgd(0.05))),
    "schedule_free": lambda rate: contrib.schedule_free(optax.sgd(rate), rate),
    "schedule_free_adamw": contrib.schedule_free_adamw,
    "schedule_free_sgd": contrib.schedule_free_sgd,
    "simplified_ademamix": contrib.simplified_ademamix,
    "split_real_and_imaginary": lambda rate: contrib.split_real_and_imaginary(
        optax.adam(rate)
    ),
}

# No step of `apply_gradients` can be taken with these, or they are no optimizers.
LEFT_OUT = {
    "lookahead": "its parameters are two trees, its gradients one",
    "dpsgd": "it takes the gradients of each example",
    "differentially_private_aggregate": "it takes the gradients of each example",
    "sophia": "it takes the loss as a function",
    **dict.fromkeys(
        ("apply_if_finite", "chain", "named_chain", "masked", "partition", "flatten")
        + ("multi_transform", "conditionally_mask", "conditionally_transform")
        + ("selective_transform", "inject_hyperparams", "inject_stateful_hyperparams")
        + ("with_extra_args_support", "stateless", "stateless_with_tree_map"),
        "it wraps or joins others",
    ),
    **dict.fromkeys(
        ("adaptive_grad_clip", "add_decayed_weights", "add_noise", "apply_every")
        + ("centralize", "clip", "clip_by_block_rms", "clip_by_global_norm", "ema")
        + ("freeze", "identity", "keep_params_nonnegative", "measure_with_ema")
        + ("normalize", "normalize_by_update_norm", "scale", "set_to_zero")
        + ("snapshot", "trace", "zero_nans"),
        "a part of an optimizer, as is each `scale_by_`",
    ),
}

# Of parameters and of gradients.
DTYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{
        name: (dict.fromkeys("bsw", dtype),) * 2
        for name, dtype in (
            ("f32", jnp.float32),
            ("bf16", jnp.bfloat16),
            ("f16", jnp.float16),
        )
    },
    "mixed": (
        {"b": jnp.float32, "s": jnp.float32, "w": jnp.float16},
        dict.fromkeys("bsw", jnp.float32),
    ),
}
SHAPES: dict[str, tuple[int, ...]] = {"b": (5,), "s": (), "w": (6, 4)}


def shapes_for(name: str) -> dict[str, tuple[int, ...]]:
    # SM3 takes no scalars.
    return SHAPES | {"s": (1,)} if name == "sm3" else SHAPES


# The faults --------------------------------------------------------------------


class Step(NamedTuple):
    """What the batch and the schedule bring to one step."""

    grads: Any
    loss: float = 1.0
    rate: float = RATE


def tree(seed: int, like: Any) -> Any:
    """Numbers of several magnitudes."""
    rng = np.random.default_rng(seed)

    def leaf(x: Any) -> Any:
        sizes = 10.0 ** rng.integers(-3, 2, x.shape)
        return jnp.asarray(rng.normal(size=x.shape) * sizes).astype(x.dtype)

    return jax.tree.map(leaf, like)


def filled(like: Any, number: float) -> Any:
    with np.errstate(over="ignore"):
        return jax.tree.map(
            lambda x: jnp.asarray(np.full(x.shape, number).astype(x.dtype)), like
        )


def with_large_entries(grads: Any) -> Any:
    """As large as the guard lets pass, in one entry of each leaf."""

    def leaf(x: Any) -> Any:
        large = min(0.5 * LARGEST_NORM, float(jnp.finfo(x.dtype).max) / 2)
        return x.reshape(-1).at[0].set(large).reshape(x.shape)

    return jax.tree.map(leaf, grads)


def runs(like: Any) -> dict[str, list[Step]]:
    """For each fault the steps before, with and after it; `like` is a gradient."""
    good = [Step(tree(1 + i, like)) for i in range(4)]
    middle = {
        "good": good[1],
        "zero": Step(filled(like, 0.0)),
        "nan": Step(filled(like, math.nan)),
        "inf": Step(filled(like, -math.inf)),
        "huge": Step(filled(like, 1e25)),
        "tiny": Step(filled(like, 1e-30)),
        "large": Step(with_large_entries(good[1].grads)),
        "nan schedule": good[1]._replace(rate=math.nan),
        "nan loss": good[1]._replace(loss=math.nan),
        "inf loss": good[1]._replace(loss=math.inf),
        "huge rate": good[1]._replace(rate=1e38),
    }
    middle["large, huge rate"] = middle["large"]._replace(rate=1e38)
    found = {k: [good[0], bad, bad, *good[2:]] for k, bad in middle.items()}
    for k in ("zero", "nan", "large", "nan schedule", "huge rate"):
        found[f"first {k}"] = [middle[k], *good[1:]]
    return found


# After these faults the run goes on as if the bad steps had not been.
SKIPPED = ("nan", "inf", "huge", "nan loss", "inf loss", "first nan")

# The oracle --------------------------------------------------------------------


def numbers(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths, floating-point numbers in float64."""
    found = {}
    for path, x in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        x = np.asarray(x)
        found[jax.tree_util.keystr(path)] = x.astype(np.float64) if is_float else x
    return found


def kept_of(params: Any, inner: Any) -> dict[str, np.ndarray]:
    """Which entries must be kept, for each parameter, and which of the state alone."""
    kept = {path: ~np.isfinite(x) for path, x in numbers(params).items()}
    alone = {}
    for path, x in numbers(inner).items():
        if x.dtype != np.float64:
            continue
        owner = f"[{path.rpartition('[')[2]}"
        if owner in kept and kept[owner].shape == x.shape:
            kept[owner] = kept[owner] | ~np.isfinite(x)
        else:
            alone[path] = ~np.isfinite(x)
    for path, x in numbers(inner).items():
        owner = f"[{path.rpartition('[')[2]}"
        is_moment = x.dtype == np.float64 and path not in alone
        alone[path] = kept[owner] if is_moment else alone.get(path, np.False_)
    return {**{f"params{k}": v for k, v in kept.items()}, **alone}


def together(params: Any, inner: Any) -> dict[str, np.ndarray]:
    return {f"params{k}": v for k, v in numbers(params).items()} | numbers(inner)


def expected_reason(step: Step) -> int:
    """The verdict on gradients and loss."""
    flat = np.concatenate([x.ravel() for x in numbers(step.grads).values()])
    if not np.all(np.isfinite(flat)):
        return REASON.NONFINITE
    if not np.isfinite(step.loss):
        return REASON.NONFINITE_VALUE
    norm = np.sqrt(np.sum(flat**2))
    return REASON.OVERFLOW if norm > LARGEST_NORM else REASON.NONE


TOLERANCE = {"f32": 1e-5, "bf16": 2e-2, "f16": 4e-3, "mixed": 4e-3}


def check_step(
    step: Step, old: Any, plain: Any, new: Any, at_start: Any, tolerance: float
) -> tuple[int, int]:
    """Compares one guarded step with the oracle; the number of kept entries, of all."""
    (params, state), before = new, together(old[0], old[1].wrapped_state)
    after = together(params, state.wrapped_state)
    for path, x in after.items():
        if x.dtype == np.float64:
            assert not np.any(~np.isfinite(x) & np.isfinite(at_start[path])), path
    reason = expected_reason(step)
    if reason != REASON.NONE:
        assert state.skip_reason == reason
        assert same_bits(before, after)
        return 0, 0
    kept, wanted = kept_of(*plain), together(*plain)
    for path, x in after.items():
        bad = np.broadcast_to(kept[path], x.shape)
        bad = bad & np.isfinite(before[path]) if path.startswith("[") else bad
        assert same_bits(x[bad], before[path][bad]), path
        assert np.allclose(
            x[~bad], wanted[path][~bad], rtol=tolerance, atol=0, equal_nan=True
        ), (path, x, wanted[path])
    of_params = [v for k, v in kept.items() if k.startswith("params")]
    num_kept, num_all = (sum(map(f, of_params)) for f in (np.sum, np.size))
    is_lost = num_kept == num_all
    assert state.skip_reason == (REASON.NONFINITE_UPDATE if is_lost else REASON.NONE)
    is_partial = 0 < num_kept < num_all
    assert state.num_partial == old[1].num_partial + is_partial
    return int(num_kept), int(num_all)


def check_optimizer(name: str, dtype: str) -> None:
    """Takes the steps of every fault with one compiled program."""
    make, shapes = OPTIMIZERS[name], shapes_for(name)
    params, like = (
        {k: jax.ShapeDtypeStruct(shapes[k], d) for k, d in dtypes.items()}
        for dtypes in DTYPES[dtype]
    )
    params = tree(0, params)

    @jax.jit
    def guarded(params, state, step):
        tx = og.guard(make(lambda count: step.rate))
        return og.apply_gradients(
            tx, params, state, grads=step.grads, value=step.loss
        )

    @jax.jit
    def plain(params, inner, step):
        tx = optax.with_extra_args_support(make(lambda count: step.rate))
        updates, inner = tx.update(step.grads, inner, params, value=step.loss)
        return optax.apply_updates(params, updates), inner

    state = og.guard(make(lambda count: jnp.float32(RATE))).init(params)
    at_start = together(params, state.wrapped_state)
    clean = None
    for fault, steps in runs(like).items():
        new = params, state
        counts = [(0, 0)]
        for step in steps:
            old, step = new, Step(step.grads, *map(jnp.float32, step[1:]))
            of_plain = plain(old[0], old[1].wrapped_state, step)
            new = guarded(*old, step)
            counts.append(
                check_step(step, old, of_plain, new, at_start, TOLERANCE[dtype])
            )
        if fault == "good":
            clean = counts[-1][0] == 0
        # Where good steps lose nothing, they lose nothing after a fault.
        if clean and "rate" not in fault:
            assert counts[-1][0] == 0, fault


SHORT = [
    ("adam", "f32"),
    ("adamw", "f16"),
    ("sgd", "mixed"),
    ("rmsprop", "bf16"),
    ("adafactor", "f32"),
]


@pytest.mark.parametrize(("optimizer", "dtype"), SHORT)
def test_what_was_finite_stays_finite(optimizer, dtype):
    check_optimizer(optimizer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_finite_stays_finite_with_every_optimizer(optimizer, dtype):
    if (optimizer, dtype) in SHORT:
        pytest.skip("is above")
    check_optimizer(optimizer, dtype)
