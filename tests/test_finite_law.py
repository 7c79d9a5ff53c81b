"""The finite law: what was finite before a step is finite after it, entry by entry.

Every optimizer of Optax takes steps with faults in gradients, loss and learning rate.
After each step the oracle is one step of the same optimizer without a guard, from the
parameters and the state before it: NumPy finds which of its entries must be kept.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib as contrib
import pytest
from jax.sharding import PartitionSpec as P

import optax_guard as og
from optax_guard._guarding import entry_step as step_module
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
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
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

# No step of `apply_gradients` can be taken with these.
LEFT_OUT = {
    "lookahead": "its parameters are two trees, its gradients one",
    "dpsgd": "it takes the gradients of each example",
    "differentially_private_aggregate": "it takes the gradients of each example",
    "sophia": "it takes the loss as a function",
}
# Each `scale_by_` is one, too.
PARTS = {
    *("adaptive_grad_clip", "add_decayed_weights", "add_noise", "apply_every"),
    *("apply_if_finite", "centralize", "chain", "clip", "clip_by_block_rms"),
    *("clip_by_global_norm", "conditionally_mask", "conditionally_transform", "ema"),
    *("flatten", "freeze", "identity", "inject_hyperparams", "masked", "named_chain"),
    *("inject_stateful_hyperparams", "keep_params_nonnegative", "measure_with_ema"),
    *("multi_transform", "normalize", "normalize_by_update_norm", "partition"),
    *("scale", "selective_transform", "set_to_zero", "snapshot", "stateless"),
    *("stateless_with_tree_map", "trace", "with_extra_args_support", "zero_nans"),
}


def test_every_optimizer_of_optax_is_in_the_table():
    names = [
        name
        for module in (optax, contrib)
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith(("_", "scale_by_"))
        and "GradientTransformation" in str(inspect.signature(value).return_annotation)
    ]
    listed = {name.split()[0] for name in OPTIMIZERS} | LEFT_OUT.keys() | PARTS
    if version("optax") > "0.2.8":
        pytest.skip("newer than the table")
    assert {*names} - listed == set()


# Of parameters and of gradients.
DTYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "f32": (dict.fromkeys("bsw", jnp.float32), dict.fromkeys("bsw", jnp.float32)),
    "bf16": (dict.fromkeys("bsw", jnp.bfloat16), dict.fromkeys("bsw", jnp.bfloat16)),
    "f16": (dict.fromkeys("bsw", jnp.float16), dict.fromkeys("bsw", jnp.float16)),
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


# The compiler may keep more digits in one program than in the other.
TOLERANCE = {"f32": 3e-4, "bf16": 3e-2, "f16": 2e-2, "mixed": 2e-2}


def assert_close(path: str, x: Any, wanted: Any, before: Any, tolerance: float) -> None:
    """Equal up to rounding, which is relative to the larger of old and new."""
    if x.dtype != np.float64:
        np.testing.assert_array_equal(x, wanted, path)
        return
    usual = np.median(np.abs(wanted)) if wanted.size else 0.0
    size = np.maximum(np.maximum(np.abs(wanted), np.abs(before)), usual)
    is_same = (x == wanted) | (np.abs(x - wanted) <= tolerance * size)
    assert np.all(is_same), (path, x[~is_same], wanted[~is_same], before[~is_same])


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
        assert_close(path, x[~bad], wanted[path][~bad], before[path][~bad], tolerance)
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
        tx: Any = og.guard(make(lambda count: step.rate))
        return og.apply_gradients(tx, params, state, grads=step.grads, value=step.loss)

    @jax.jit
    def plain(params, inner, step):
        tx = optax.with_extra_args_support(make(lambda count: step.rate))
        updates, inner = tx.update(step.grads, inner, params, value=step.loss)
        return optax.apply_updates(params, updates), inner

    state: Any = og.guard(make(lambda count: jnp.float32(RATE))).init(params)
    at_start = together(params, state.wrapped_state)
    clean = None
    # Momo's rate is a difference, which float16 rounds coarsely.
    tolerance = 0.3 if (name, dtype) == ("momo", "f16") else TOLERANCE[dtype]
    for fault, steps in runs(like).items():
        new: Any = params, state
        counts = [(0, 0)]
        for step in steps:
            old, step = new, Step(step.grads, *map(jnp.float32, step[1:]))
            of_plain = plain(old[0], old[1].wrapped_state, step)
            new = guarded(*old, step)
            counts.append(check_step(step, old, of_plain, new, at_start, tolerance))
        if fault == "good":
            clean = counts[-1][0] == 0
        # Where good steps lose nothing, they lose nothing after a fault. The second
        # step of ACProp divides by a moment of the first.
        is_spoilt = name == "acprop" and fault.startswith("first")
        if clean and not is_spoilt and "rate" not in fault and "large" not in fault:
            assert counts[-1][0] == 0, fault
        # Moments become float32 in a first step, be it skipped: the second step is then
        # another program.
        is_other = dtype == "mixed" and fault == "first nan"
        if fault in SKIPPED and not is_other:
            again: Any = params, state
            for step in steps:
                if expected_reason(step) == REASON.NONE:
                    again = guarded(
                        *again, Step(step.grads, *map(jnp.float32, step[1:]))
                    )
            end, wanted = (together(x[0], x[1].wrapped_state) for x in (new, again))
            assert same_bits(end, wanted), fault


# Optax alone raises a `TypeError` if gradients have another dtype than parameters.
ONE_DTYPE = {"galore", "lbfgs", "mechanize", "novograd"}
# In every dtype, whatever comes of the turns below.
ALL = {"adamw", "lion", "muon", "sgd momentum"}
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


def rest() -> Iterator[Any]:
    """All others: one of each optimizer is of the full tier, in turns of the dtypes."""
    for i, optimizer in enumerate(OPTIMIZERS):
        dtypes = [d for d in DTYPES if d != "mixed" or optimizer not in ONE_DTYPE]
        for dtype in dtypes:
            if (optimizer, dtype) not in SHORT:
                is_one = optimizer in ALL or dtype == dtypes[i % len(dtypes)]
                marks = pytest.mark.full if is_one else pytest.mark.soak
                yield pytest.param(optimizer, dtype, marks=marks)


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is:DeprecationWarning")
@pytest.mark.parametrize(("optimizer", "dtype"), list(rest()))
def test_what_was_finite_stays_finite_with_every_optimizer(optimizer, dtype):
    check_optimizer(optimizer, dtype)


# By hand ----------------------------------------------------------------------


def adam_in_float64(p, m, v, g, count, rate=0.1, b1=0.9, b2=0.999, eps=1e-3):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    step = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)
    return p - rate * step, m, v


def test_entry_whose_moment_overflows_keeps_parameter_and_both_moments():
    tx: Any = og.guard(optax.adam(0.1, eps=1e-3))
    params: Any = {"w": jnp.array([0.5, 1.0, -2.0], jnp.float16)}
    state = tx.init(params)
    p, m, v = np.array([0.5, 1.0, -2.0]), np.zeros(3), np.zeros(3)
    run = jax.jit(lambda p, s, g: og.apply_gradients(tx, p, s, grads=g))
    # The square of the second one is 400 times what float16 holds.
    rows = [[0.5, 1.0, -1.5], [0.25, 2e4, -1.0], [0.5, -1.0, 2.0]]
    for count, row in enumerate(rows, 1):
        old = params["w"], state.wrapped_state[0]
        grads = {"w": jnp.array(row, jnp.float16)}
        params, state = run(params, state, grads)
        after = adam_in_float64(p, m, v, np.array(row), count)
        kept = np.abs(after[2]) > float(jnp.finfo(jnp.float16).max)
        kept |= np.square(np.array(row)) > float(jnp.finfo(jnp.float16).max)
        assert kept.tolist() == [False, count == 2, False]
        p, m, v = (np.where(kept, *x) for x in zip((p, m, v), after, strict=True))
        moments = state.wrapped_state[0]
        found = params["w"], moments.mu["w"], moments.nu["w"]
        for x, wanted in zip(found, (p, m, v), strict=True):
            np.testing.assert_allclose(np.float64(x), wanted, rtol=2e-2, atol=1e-3)
        before = old[0], old[1].mu["w"], old[1].nu["w"]
        for x, same in zip(found, before, strict=True):
            assert same_bits(np.asarray(x)[kept], np.asarray(same)[kept])
        assert moments.count == count
    assert state.num_partial == 1
    assert state.num_skipped == 0


def test_rows_of_an_embedding_without_gradient_keep_their_values():
    # In float16 Adam's epsilon is zero, and 0 / 0 is NaN.
    params = {"embedding": jnp.ones((64, 4), jnp.float16)}
    inner: Any = optax.adam(0.01)
    tx: Any = og.guard(inner)
    used = jnp.array([3, 5, 60])
    grads = {"embedding": jnp.zeros((64, 4), jnp.float16).at[used].set(0.5)}
    step = jax.jit(lambda p, s: og.apply_gradients(tx, p, s, grads=grads))
    after, state = step(params, tx.init(params))
    plain = jax.jit(inner.update)(grads, inner.init(params), params)[0]["embedding"]
    is_used = np.isin(np.arange(64), used)
    assert np.isnan(plain[~is_used]).all()
    found = np.asarray(after["embedding"])
    assert (found[~is_used] == 1).all()
    np.testing.assert_allclose(found[is_used], (1 + plain)[is_used], rtol=2e-3)
    assert (state.num_partial, state.num_skipped) == (1, 0)
    assert state.skip_reason == REASON.NONE


@pytest.mark.parametrize("injected", [False, True])
def test_schedule_goes_on_after_a_step_that_it_spoilt(injected):
    def rate(count):
        return jnp.where(count == 1, jnp.nan, jnp.where(count > 1, 0.5, 0.25))

    inner = optax.inject_hyperparams(optax.sgd)(rate) if injected else optax.sgd(rate)
    tx: Any = og.guard(inner)
    found, reasons = [], []
    params: Any = jnp.zeros(2)
    state: Any = tx.init(params)
    for _ in range(4):
        new: Any = og.apply_gradients(tx, params, state, grads=jnp.ones(2))
        params, state = new
        found.append(float(params[0]))
        reasons.append(int(state.skip_reason))
        for path, x in numbers(state.wrapped_state).items():
            assert np.all(np.isfinite(x)), path
    assert found == [-0.25, -0.25, -0.75, -1.25]
    assert reasons == [0, REASON.NONFINITE_UPDATE, 0, 0]
    assert state.num_skipped == 1
    assert state.num_partial == 0
    assert state.skip_log.skipped_reason[0] == REASON.NONFINITE_UPDATE


def test_norm_whose_square_overflows_is_skipped_unless_it_is_clipped():
    params = jnp.ones(2)
    guards = {clip: og.guard(optax.adam(0.1), clip=clip) for clip in (None, 1.0)}
    for size, clip, loss, reason in (
        (1e19, None, 1.0, REASON.NONE),
        (1.5e19, None, 1.0, REASON.OVERFLOW),
        (1.5e19, 1.0, 1.0, REASON.NONE),
        (1e38, None, 1.0, REASON.OVERFLOW),
        (1e38, 1.0, 1.0, REASON.NONE),
        (1e38, None, math.nan, REASON.NONFINITE_VALUE),
    ):
        tx, grads = guards[clip], jnp.full(2, size)
        state = tx.init(params)
        new: Any = og.apply_gradients(tx, params, state, grads=grads, value=loss)
        after, state = new
        assert state.skip_reason == reason
        assert np.all(np.isfinite(after))
        assert np.all((after == params) == (reason != REASON.NONE))


@pytest.mark.parametrize("size", [3, (1 << 17) + 1])
def test_update_looks_at_the_sum_only_if_it_has_parameters(size):
    tx: Any = og.guard(optax.sgd(1e20))
    params, state = jnp.full(size, 3e38), tx.init(jnp.zeros(size))
    # The first update alone is infinite, the second with its parameter.
    grads = jnp.zeros(size).at[:3].set(jnp.array([1e19, -1e18, 1.0]))
    run = jax.jit(tx.update)
    with_params, of_with = run(grads, state, params)
    without, of_without = run(grads, state)
    np.testing.assert_allclose(with_params[:3], [0, 0, -1e20])
    np.testing.assert_allclose(without[:3], [0, 1e38, -1e20])
    assert of_with.num_partial == of_without.num_partial == 1


# Many gradients ----------------------------------------------------------------


@pytest.mark.parametrize("call", ["apply", "update"])
@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(optax.adam(0.1), jnp.float16), (optax.rmsprop(0.1, eps=0.0), jnp.float32)],
)
def test_many_gradients_are_kept_as_few_are(inner, dtype, call, monkeypatch):
    size = step_module._SMALL + 64
    params = {"a": jnp.ones((3,), dtype), "w": jnp.ones((size,), dtype)}
    tx: Any = og.guard(inner)

    def run():
        @jax.jit
        def step(params, state, grads):
            if call == "apply":
                return og.apply_gradients(tx, params, state, grads=grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        new, found = (params, tx.init(params)), []
        ones = jax.tree.map(jnp.ones_like, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        hole = ones | {"w": ones["w"].at[5:-2].set(0)}
        bad = filled(ones, math.nan)
        for grads in (hole, ones, zeros, bad, ones | {"a": zeros["a"]}):
            new = step(*new, grads)
            found.append(new)
        return found

    many = run()
    monkeypatch.setattr(step_module, "_SMALL", 2 * size)
    tx = og.guard(inner)
    few = run()
    for one, other in zip(many, few, strict=True):
        for x, y in zip(*(jax.tree.leaves(t) for t in (one, other)), strict=True):
            np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=2e-3)
    # What the first step lost is in the leaf that is not looked at.
    assert many[0][1].skip_reason == REASON.NONE
    assert np.all(np.asarray(many[0][0]["w"])[5:-2] == 1)
    assert np.all(np.asarray(many[0][0]["w"])[:5] < 1)
    assert np.all(np.asarray(many[1][0]["w"]) < 1)


@pytest.mark.parametrize(
    ("size", "is_by_hand", "times"),
    [
        # By a mask. More than the documented number, on CPU: to look, in the branch of
        # some entries and in that of all; on others by a mask. By hand: in one branch.
        (131072, False, 1),
        (131073, False, 3 + 1),
        (131073, True, 1 + 1),
    ],
)
def test_step_is_computed_as_often_as_stated(size, is_by_hand, times, mesh):
    inner = optax.stateless(lambda grads, params: jax.tree.map(jnp.tanh, grads))
    tx: Any = og.guard(inner)

    def step(grads):
        return tx.update(grads, tx.init(grads))[0]

    if is_by_hand:
        step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    program = str(jax.make_jaxpr(step)(jax.ShapeDtypeStruct((size,), jnp.float32)))
    assert program.count("= tanh ") == times


# Many devices ------------------------------------------------------------------


def test_members_keep_their_own_entries():
    tx: Any = og.guard(optax.rmsprop(0.5, eps=0.0))
    params = jnp.ones((3, 4))
    grads = jnp.ones((3, 4)).at[1].set(0).at[2, 1].set(0)
    states = jax.vmap(tx.init)(params)

    @jax.jit
    @jax.vmap
    def step(params, state, grads):
        return og.apply_gradients(tx, params, state, grads=grads)

    after, states = step(params, states, grads)
    np.testing.assert_array_equal(after == 1, grads == 0)
    reasons = [REASON.NONE, REASON.NONFINITE_UPDATE, REASON.NONE]
    np.testing.assert_array_equal(states.skip_reason, reasons)
    np.testing.assert_array_equal(states.num_partial, [0, 0, 1])


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("size", [16, 8 * (1 << 17) + 8])
def test_device_that_makes_a_nan_keeps_its_entries_and_all_count_it(
    size, check_vma, mesh
):
    clip = og.clip_by_global_norm(1e9, axis_name="data")
    tx: Any = og.guard(optax.rmsprop(0.5, eps=0.0), clip=clip)
    params = {"b": jnp.ones(16), "w": jnp.ones(size)}
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P(), state)._replace(
        wrapped_state=jax.tree.map(
            lambda x: P("data") if x.ndim else P(), state.wrapped_state
        )
    )
    run = jax.jit(
        jax.shard_map(
            lambda params, state, grads: og.apply_gradients(
                tx, params, state, grads=grads
            ),
            mesh=mesh,
            in_specs=(P("data"), specs, P("data")),
            out_specs=(P("data"), specs),
            check_vma=check_vma,
        )
    )
    here = {k: np.arange(x.size) // (x.size // 8) == 3 for k, x in params.items()}
    grads = {k: jnp.where(x, 0.0, 1.0) for k, x in here.items()}
    after, state = run(params, state, grads)
    for k, x in here.items():
        np.testing.assert_array_equal(np.asarray(after[k]) == 1, x)
    counts = [np.asarray(x.data)[5] for x in state.skip_counts.addressable_shards]
    assert counts == [1] * 8
    assert state.skip_reason == REASON.NONE
    _, state = run(params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    reasons = [np.asarray(x.data)[2] for x in state.skip_counts.addressable_shards]
    assert reasons == [REASON.NONFINITE_UPDATE] * 8


def test_devices_count_the_same_without_parameters_too(mesh):
    clip = og.clip_by_global_norm(1e9, axis_name="data")
    tx: Any = og.guard(optax.sgd(0.1), clip=clip)
    count = jax.shard_map(
        lambda state, grads: tx.update(grads, state)[1].num_partial,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    # Refused if by its type it varied.
    found = jax.eval_shape(lambda grads: count(tx.init(grads), grads), jnp.ones(16))
    assert found.shape == ()


# Derivatives -------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, (1 << 17) + 4])
def test_derivatives_of_good_steps_are_those_without_a_guard(size):
    def end(rate, is_guarded):
        inner = optax.adam(rate)
        tx: Any = og.guard(inner) if is_guarded else inner
        params = {"w": jnp.ones(size)}
        new: Any = params, tx.init(params)
        for scale in (1.0, 2.0):
            grads = jax.tree.map(lambda x, s=scale: s * x, new[0])
            new = og.apply_gradients(tx, *new, grads=grads)
        return jnp.mean(new[0]["w"] ** 2)

    guarded, plain = (jax.jit(jax.grad(lambda r, g=g: end(r, g)))(0.1) for g in (1, 0))
    assert np.isfinite(guarded)
    assert guarded != 0
    np.testing.assert_allclose(guarded, plain, rtol=1e-4)


@pytest.mark.parametrize(("clip", "most"), [(None, 2), (1.0, 0)])
def test_derivatives_of_bad_steps_by_mask_are_zero(clip, most, monkeypatch):
    """Few gradients are hidden if they are bad, and many if there is a clip."""

    def by_mask(*operands, default, **platforms):
        return default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", by_mask)
    monkeypatch.setattr(step_module, "_SMALL", most)

    def end(rate):
        tx: Any = og.guard(optax.sgd(rate), clip=clip)
        params, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
        new: Any = og.apply_gradients(tx, params, tx.init(params), grads=bad)
        return jnp.sum(new[0])

    assert jax.jit(jax.grad(end))(0.1) == 0


def test_complex_entries_are_kept_for_either_part():
    # A rate that is infinite in one part of one entry, and finite elsewhere.
    rates = jnp.array([1.0, complex(1.0, math.inf), complex(math.inf, 1.0)])
    inner = optax.stateless(lambda g, p: jax.tree.map(lambda x: -rates * x, g))
    params: Any = {"z": jnp.full(3, 1 + 2j), "one": jnp.ones(1)}
    grads = {"z": jnp.full(3, 0.5 + 0j), "one": jnp.zeros(1)}
    tx: Any = og.guard(optax.masked(inner, {"z": True, "one": False}))
    after: Any = og.apply_gradients(tx, params, tx.init(params), grads=grads)
    new, state = after
    np.testing.assert_array_equal(new["z"], [0.5 + 2j, 1 + 2j, 1 + 2j])
    assert (state.num_partial, state.num_skipped) == (1, 0)


def test_number_that_was_infinite_before_is_that_of_the_optimizer():
    # As a line search starts: from infinity it may go to any other number.
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del state, params
        return updates, jnp.full(2, -math.inf)

    inner = optax.GradientTransformation(
        lambda params: jnp.array([math.inf, 0.0]), update
    )
    tx: Any = og.guard(inner)
    params = jnp.ones(3)
    after: Any = og.apply_gradients(tx, params, tx.init(params), grads=jnp.ones(3))
    state = after[1]
    np.testing.assert_array_equal(state.wrapped_state, [-math.inf, 0.0])
