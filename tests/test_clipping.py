"""Clipping by norm and by value, and the statistics that they keep."""

import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

import optax_guard as og
from optax_guard._rows import replace_entries
from tests.hlo import computations
from tests.strategies import (
    FLOAT_DTYPES,
    any_float,
    f32,
    ordinary,
    same_bits,
    sampled,
    trees,
    true_norm,
    unlike_lowest_jax,
)

CASES = json.loads((Path(__file__).parent / "data/clip_norm.json").read_text())["cases"]


@contextlib.contextmanager
def x64_is(wanted):
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", wanted)
    yield
    jax.config.update("jax_enable_x64", before)


def case_named(fn: str) -> list[Any]:
    return [
        pytest.param(c, id=f"{c['id']}-{c['kind']}") for c in CASES if c["fn"] == fn
    ]


def leaves_of(case, data=None):
    dtype = jnp.dtype(case["dtype"])
    shapes = [leaf["shape"] for leaf in case["grads"]]
    data = [leaf["data"] for leaf in case["grads"]] if data is None else data
    flat = [np.array([float(x) for x in leaf]) for leaf in data]
    return [x.astype(dtype).reshape(s) for x, s in zip(flat, shapes, strict=True)]


def run_once(tx: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
    """One jitted update from the initial state."""
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads), **extra))(grads)


# Cases have up to five leaves of up to nine entries. With zeros, of which no norm
# takes notice, they are few programs.
NUM_LEAVES, SIZE = 5, 9


def padded(leaves: list[np.ndarray]) -> list[np.ndarray]:
    dtype = leaves[0].dtype
    flat = [np.zeros(SIZE, dtype) for _ in range(NUM_LEAVES)]
    for row, leaf in zip(flat, leaves, strict=False):
        row[: leaf.size] = leaf.ravel()
    return flat


def unpadded(flat: Any, leaves: list[np.ndarray]) -> list[Any]:
    shortened = [x[: leaf.size] for x, leaf in zip(flat, leaves, strict=False)]
    return [x.reshape(y.shape) for x, y in zip(shortened, leaves, strict=True)]


@functools.cache
def clip_padded(ord: float) -> Any:
    def run(max_norm: Any, grads: Any) -> Any:
        # Traced, so that zero and negative thresholds, errors otherwise, are run too.
        tx: Any = og.clip_by_global_norm(max_norm, ord=ord)
        return tx.update(grads, tx.init(grads))

    return jax.jit(run)


@jax.jit
def clip_values_padded(max_value: Any, grads: Any) -> Any:
    tx: Any = og.clip_by_value(max_value)
    return tx.update(grads, tx.init(grads))[0]


# Torch's answers, and the exact ones where torch is wrong ----------------------


@pytest.mark.parametrize("case", case_named("clip_grad_norm_"))
def test_clipped_by_norm_as_torch_and_exact_arithmetic_do(case):
    kind, grads = case["kind"], leaves_of(case)
    ord = float(case["norm_type"])
    max_norm = float(case["max_norm"])
    double = case["dtype"] == "float64"

    with x64_is(double):
        out, state = clip_padded(ord)(max_norm, padded(grads))
        out = unpadded(out, grads)
    if kind == "nonfinite_input":
        assert same_bits(out, grads)
        assert state.stats.num_nonfinite == 1
        return
    if kind == "norm_above_f32_max":
        # As good as infinite in float32: left for the guard to skip.
        assert same_bits(out, grads)
        assert state.stats.grad_norm == math.inf
        return
    if kind == "negative_max_norm":
        assert not any(np.any(x) for x in out)
        return
    exact = case["exact"]
    if exact["coef"] == 1:
        assert same_bits(out, grads)
        assert state.stats.num_clipped == 0
    if not double or 1e-25 < exact["total_norm"] < 1e38:
        assert float(state.stats.grad_norm) == pytest.approx(
            exact["total_norm"], rel=1e-6, abs=0
        )
    rtol, atol = {
        "float32": (2e-6, 0.0),
        "float64": (1e-14, 0.0),
        "float16": (2e-3, 1e-7),
        "bfloat16": (1.6e-2, 1e-7),
    }[case["dtype"]]
    expected = [exact["coef"] * x.astype(float) for x in grads]
    largest = max([np.abs(x).max() for x in expected if x.size], default=0.0)
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == case["dtype"]
        np.testing.assert_allclose(
            np.asarray(got, float), want, rtol=rtol, atol=atol + rtol * largest * 1e-3
        )
    if case["out"] is not None and not case.get("peer_wrong"):
        # Torch adds 1e-6 to the norm before it divides.
        slack = rtol + 1e-6 / max(exact["total_norm"], 1e-6)
        for got, want in zip(out, leaves_of(case, case["out"]), strict=True):
            np.testing.assert_allclose(
                np.asarray(got, float),
                want.astype(float),
                rtol=slack,
                atol=atol + slack * largest,
            )


@pytest.mark.parametrize("case", case_named("clip_grad_value_"))
def test_clipped_by_value_as_torch_does(case):
    double = case["dtype"] == "float64"

    grads = leaves_of(case)
    with x64_is(double):
        limit = np.dtype(case["dtype"]).type(case["clip_value"])
        out = unpadded(clip_values_padded(limit, padded(grads)), grads)
    for got, want in zip(out, leaves_of(case, case["out"]), strict=True):
        np.testing.assert_array_equal(got, want)


# Optax's own clip, where that is right -----------------------------------------


@sampled
@given(tree=trees(ordinary(), FLOAT_DTYPES))
def test_equals_optax_at_a_constant_threshold(tree):
    # Optax sums in the dtype of the leaf; in float32 it is an oracle.
    wide = jax.tree.map(lambda x: x.astype(np.float32), tree)
    theirs, _ = OPTAX_CLIP(wide)
    ours, _ = CLIP(tree)
    for got, given_, want in zip(
        *map(jax.tree.leaves, (ours, tree, theirs)), strict=True
    ):
        assert got.dtype == given_.dtype
        eps = float(jnp.finfo(got.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(got, float), want, rtol=2e-6 + eps, atol=6e-8
        )


def _clipping(factory):
    tx = factory(1.0)
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads)))


CLIP = _clipping(og.clip_by_global_norm)
OPTAX_CLIP = _clipping(optax.clip_by_global_norm)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_equals_optax_on_one_leaf(dtype):
    grads = jnp.asarray([3.0, -4.0, 0.25], dtype)
    ours, theirs = CLIP(grads)[0], OPTAX_CLIP(grads)[0]
    assert ours.dtype == dtype
    np.testing.assert_allclose(
        f32(ours), f32(theirs), rtol=3 * float(jnp.finfo(dtype).eps)
    )


# At and under the threshold; just above ----------------------------------------


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, jnp.complex64])
def test_at_or_under_the_threshold_every_bit_is_kept(dtype):
    # Denormals, which some platforms flush when they multiply, and negative zero.
    odd = [5.0, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 1e-8, 2.0**-130]
    grads = {"a": np.array(odd).astype(dtype), "b": np.zeros(2).astype(dtype)}
    for max_norm in (5.0, 5.0000005, 1e30, math.inf):
        out, state = clip_by_traced(max_norm, grads)
        assert same_bits(out, grads)
        assert state.stats.num_clipped == 0
        assert same_bits(
            og.clip_by_global_norm(max_norm).update(grads, state)[0], grads
        )


def test_value_clip_keeps_every_bit_within_the_bounds():
    # Denormals are not here: XLA on CPU makes a minimum of the selection, and flushes.
    grads = np.array([1.0, -1.0, 0.0, -0.0, 1e-37, -1e-37], np.float32)
    out, state = run_once(og.clip_by_value(1.0), grads)
    assert same_bits(out, grads)
    assert state.stats.num_clipped == 0
    assert state.entries_clipped == 0
    assert state.update_cosine == 1


@sampled
@given(tree=trees(any_float(), FLOAT_DTYPES))
def test_norm_after_clipping_is_at_most_the_threshold(tree):
    tree = jax.tree.map(lambda x: np.where(np.isfinite(x), x, np.ones_like(x)), tree)
    out, state = CLIP(tree)
    if np.isfinite(state.stats.grad_norm):
        eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))
        assert true_norm(out) <= 1 + 2e-6 + eps
        assert state.stats.clipped_norm <= 1


# Unusual thresholds ------------------------------------------------------------


def clip_by(max_norm: Any, grads: Any) -> tuple[Any, Any]:
    tx: Any = og.clip_by_global_norm(max_norm)
    return tx.update(grads, tx.init(grads))


clip_by_traced = jax.jit(clip_by)


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [
        (0.0, [0.0, 0.0]),
        (-1.0, [0.0, 0.0]),
        (-math.inf, [0.0, 0.0]),
        (math.inf, [3.0, 4.0]),
        (math.nan, [3.0, 4.0]),
        (1e-30, [6e-31, 8e-31]),
        (5.0, [3.0, 4.0]),
    ],
)
def test_traced_threshold_of_any_value_neither_flips_nor_poisons(max_norm, expected):
    grads = f32([3.0, 4.0])
    out, state = clip_by_traced(max_norm, grads)
    np.testing.assert_allclose(out, f32(expected), rtol=1e-6)
    assert np.all(np.isfinite(out))
    assert 0 <= float(state.stats.clipped_norm) <= 5
    out, _ = clip_by_traced(max_norm, np.zeros(2, np.float32))
    assert not np.any(out)


@pytest.mark.parametrize("size", [1e30, 1e36, 1e38])
@pytest.mark.parametrize("max_norm", [1e-30, 1e-20, 1e-8, 1.0, 1e25])
def test_coefficient_that_underflows_gives_the_right_update(size, max_norm):
    grads = f32([0.6, -0.8, 0.0]) * f32(size)
    out, _ = clip_by_traced(max_norm, grads)
    np.testing.assert_allclose(out, f32([0.6, -0.8, 0.0]) * f32(max_norm), rtol=3e-6)


@pytest.mark.parametrize(("size", "max_norm"), [(0.01, 1e-35), (1.0, 2e-38)])
def test_coefficient_of_a_norm_of_at_most_one_may_underflow(size, max_norm):
    # One factor would do neither: the norm itself has no room to be made smaller.
    grads = f32([0.6, -0.8, 0.0]) * f32(size)
    out, _ = clip_by_traced(max_norm, grads)
    np.testing.assert_allclose(out, f32([0.6, -0.8, 0.0]) * f32(max_norm), rtol=3e-6)


@pytest.mark.parametrize("max_norm", [10**12, np.int64(10**12), 1e300, 2])
def test_threshold_may_be_any_positive_number(max_norm):
    grads = f32([30.0, 40.0])
    out, state = run_once(og.clip_by_global_norm(max_norm), grads)
    if max_norm == 2:
        np.testing.assert_allclose(out, [1.2, 1.6], rtol=1e-6)
    else:
        assert same_bits(out, grads)
        assert state.stats.num_clipped == 0


MIXED = {"a": jnp.bfloat16, "b": jnp.float16, "c": jnp.float32}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, "mixed"])
@pytest.mark.parametrize(
    "schedule",
    [lambda step: 2.0 / (step + 1), optax.linear_schedule(2.0, 1.0, 1)],
    ids=["python", "optax"],
)
def test_scheduled_threshold_works_on_any_dtype(dtype, schedule):
    kinds: dict[str, Any] = MIXED if dtype == "mixed" else dict.fromkeys("abc", dtype)
    grads = {k: jnp.full(4, 2.0, kind) for k, kind in kinds.items()}
    plain = og.clip_by_global_norm(schedule)
    injected = optax.inject_hyperparams(
        og.clip_by_global_norm, hyperparam_dtype=jnp.float32
    )(max_norm=schedule)
    for tx in (plain, injected):
        update = jax.jit(tx.update)
        state = tx.init(grads)
        for max_norm in (2.0, 1.0):
            out, state = update(grads, state)
            assert {k: x.dtype for k, x in out.items()} == kinds
            assert true_norm(jax.tree.map(np.float32, out)) == pytest.approx(
                max_norm, rel=1e-2, abs=0
            )
            stats = og.find_state(state, og.ClipByNormState).stats
            assert float(stats.clip_threshold) == max_norm


def test_schedule_counts_finite_updates_only():
    tx: Any = og.clip_by_global_norm(lambda step: 1.0 + step)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    thresholds = []
    for g in (9.0, math.nan, math.inf, 9.0, 9.0):
        _, state = update(jnp.array([g]), state)
        thresholds.append(float(state.stats.clip_threshold))
    assert thresholds == [1.0, 2.0, 2.0, 2.0, 3.0]


def test_injected_threshold_can_be_changed_without_tracing_again():
    tx: Any = optax.inject_hyperparams(og.clip_by_global_norm)(max_norm=1.0)
    traces = []

    @jax.jit
    def step(grads, state):
        traces.append(None)
        return tx.update(grads, state)

    grads = jnp.array([3.0, 4.0])
    state = tx.init(grads)
    for max_norm in (1.0, 2.0, 0.5, 100.0):
        state.hyperparams["max_norm"] = jnp.asarray(max_norm)
        out, state = step(grads, state)
        np.testing.assert_allclose(jnp.linalg.norm(out), min(max_norm, 5.0), rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("ord", [None, 1, 2, 2.0, np.int32(2), math.inf, 3])
def test_threshold_bounds_the_norm_of_the_order_asked_for(ord):
    grads = f32([3.0, -4.0, 12.0])
    out, state = run_once(og.clip_by_global_norm(0.5, ord=ord), grads)
    order = 2.0 if ord is None else float(ord)
    assert true_norm([out], order) == pytest.approx(0.5, rel=2e-6, abs=0)
    assert float(state.stats.grad_norm) == pytest.approx(true_norm([grads], order))


def test_order_can_be_given_under_inject_hyperparams():
    build = optax.inject_hyperparams(og.clip_by_global_norm, static_args=("ord",))
    tx: Any = build(1.0, ord=1)
    out, _ = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
    np.testing.assert_allclose(out, 0.25)


# Leaves that are not floating --------------------------------------------------


@pytest.mark.parametrize(
    "tx", [og.clip_by_global_norm(1.0), og.clip_by_value(0.5), og.record_norm()]
)
def test_leaves_that_are_not_floating_are_left_alone(tx):
    grads = {
        "w": f32([3.0, 4.0]),
        "int": np.array([7, 2**30], np.int32),
        "bool": np.array([True]),
        "float0": np.zeros(3, jax.dtypes.float0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    out, state = tx.update(grads, tx.init(grads))
    assert state.stats.grad_norm == 5
    for name in ("int", "bool", "float0"):
        assert out[name].dtype == grads[name].dtype
        assert np.asarray(out[name]).tobytes() == grads[name].tobytes()
    assert out["none"] is None
    assert out["masked"] == optax.MaskedNode()


@pytest.mark.parametrize(
    "tree", [{}, {"int": np.array([3], np.int32)}, {"e": np.zeros(0, "f4")}]
)
@pytest.mark.parametrize(
    "tx",
    [og.clip_by_global_norm(1.0, ord=3), og.clip_by_value(0.5), og.record_norm()],
)
def test_tree_without_floating_entries_has_norm_zero(tx, tree):
    out, state = run_once(tx, tree)
    assert same_bits(jax.tree.map(np.asarray, out), tree)
    assert state.stats.grad_norm == state.stats.clipped_norm == 0
    assert state.stats.num_nonfinite == state.stats.num_clipped == 0


def test_complex_updates_keep_their_phase():
    grads = np.array([3 + 4j, 0, -12j], np.complex64)
    out, state = run_once(og.clip_by_global_norm(1.3), grads)
    np.testing.assert_allclose(out, grads / 10, rtol=1e-6)
    assert state.stats.grad_norm == 13


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bit_floats_are_clipped(dtype):
    grads = jnp.array([3.0, -4.0]).astype(dtype)
    out, state = run_once(og.clip_by_global_norm(2.5), grads)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.astype(jnp.float32), [1.5, -2.0])
    assert state.stats.grad_norm == 5
    out, state = run_once(og.clip_by_value(2.0), grads)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.astype(jnp.float32), [2.0, -2.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize(
    "tx",
    [
        og.clip_by_global_norm(1.0),
        og.clip_by_global_norm(1.0, ord=3, nonfinite="zero"),
        og.clip_by_value(0.5),
        og.record_norm(),
        og.guard(optax.identity(), clip=1.0, skip=og.skip.norm_above(3.0)),
    ],
    ids=["norm", "order", "value", "record", "guard"],
)
def test_no_implicit_promotion(tx, dtype):
    grads = {"a": jnp.ones(3, dtype), "b": jnp.ones(2, jnp.float32)}
    state = tx.init(grads)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            lambda g, s: tx.update(g, s, g, value=g["a"][0].real), grads, state
        )


# Non-finite updates ------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_updates_pass_unscaled_and_are_counted(bad):
    grads = {"a": f32([3e5, bad]), "b": f32([-7e9])}
    tx: Any = og.clip_by_global_norm(1.0)
    out, state = run_once(tx, grads)
    assert same_bits(out, grads)
    assert state.stats.num_nonfinite == 1
    assert state.stats.num_clipped == 0
    assert not np.isfinite(state.stats.grad_norm)
    assert state.stats.norm_mean == state.stats.norm_var == state.stats.norm_max == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_updates_become_zero_on_request(bad):
    tx: Any = og.clip_by_global_norm(1.0, nonfinite="zero")
    grads = {"a": f32([3e5, bad]), "b": f32([-7e9]), "i": np.array([3], np.int32)}
    out, _ = run_once(tx, grads)
    assert not np.any(out["a"])
    assert not np.any(out["b"])
    assert out["i"] == 3
    out, _ = run_once(tx, {"a": f32([3, 4])})
    np.testing.assert_allclose(out["a"], [0.6, 0.8], rtol=1e-6)


# Statistics --------------------------------------------------------------------


def stats_after(norms):
    """The statistics of a sequence of norms, one scan for all lengths used here."""
    tx: Any = og.record_norm()

    def step(state, norm):
        _, state = tx.update(norm[None], state)
        return state, (state.stats.norm_mean, state.stats.norm_var)

    norms = jnp.asarray(norms, jnp.float32)
    return jax.jit(lambda n: jax.lax.scan(step, tx.init(n), n))(norms)


def oracle(norms, decay=0.99):
    """Weighted mean and variance in float64, weights normalised, finite norms only."""
    norms = np.asarray(norms, float)
    norms = norms[np.isfinite(norms)]
    weights = decay ** np.arange(len(norms))[::-1]
    mean = np.average(norms, weights=weights)
    return mean, np.average((norms - mean) ** 2, weights=weights)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_mean_and_variance_are_the_debiased_exponential_ones(scale):
    rng = np.random.default_rng(0)
    norms = f32(rng.lognormal(size=10_000) * scale)
    norms[rng.random(10_000) < 0.01] = np.nan
    norms[0] = 2 * scale
    norms[1] = np.inf
    state, (means, variances) = stats_after(norms)
    for count in (1, 2, 3, 10, 150, 10_000):
        mean, variance = oracle(norms[:count])
        assert float(means[count - 1]) == pytest.approx(mean, rel=1e-5, abs=0)
        assert float(variances[count - 1]) == pytest.approx(variance, rel=1e-4, abs=0)
    assert state.stats.num_updates == 10_000
    assert state.stats.num_nonfinite == np.sum(~np.isfinite(norms))
    assert float(state.stats.norm_max) == np.max(norms[np.isfinite(norms)])


def test_variance_of_hardly_varying_norms_is_right():
    rng = np.random.default_rng(1)
    norms = f32(1000 + rng.normal(size=1000))
    _, (means, variances) = stats_after(norms)
    mean, variance = oracle(norms)
    assert float(means[-1]) == pytest.approx(mean, rel=1e-6, abs=0)
    assert float(variances[-1]) == pytest.approx(variance, rel=1e-2, abs=0)


@pytest.mark.parametrize("norm", [0.0, 1e-25, 0.1, 3.3, 1e19, 1e30, 3e38])
def test_variance_of_a_constant_is_zero(norm):
    state, (means, variances) = stats_after(np.full(1000, norm))
    assert np.all(np.asarray(variances) == 0)
    np.testing.assert_array_equal(means, f32(norm))
    assert state.stats.norm_max == f32(norm)


def test_statistics_of_huge_norms_stay_finite_and_recover():
    norms = np.concatenate([np.ones(10), np.full(3, 3e38), [1e30], np.ones(9000)])
    _, (means, variances) = stats_after(norms)
    assert np.all(np.isfinite(means))
    assert np.all(np.isfinite(variances))
    assert np.all(np.asarray(variances) >= 0)
    assert float(means[-1]) == pytest.approx(1.0, rel=1e-2, abs=0)


def test_last_norms_threshold_and_counts_are_recorded():
    tx: Any = og.clip_by_global_norm(2.0)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1))
    seen = []
    for g in (1.0, -4.0, math.nan, 2.0, 8.0):
        _, state = update(jnp.array([g]), state)
        s = state.stats
        seen.append(
            [float(s.grad_norm), float(s.clipped_norm), float(s.clip_threshold)]
        )
    np.testing.assert_array_equal(
        seen, [[1, 1, 2], [4, 2, 2], [math.nan, math.nan, 2], [2, 2, 2], [8, 2, 2]]
    )
    assert (s.num_updates, s.num_clipped, s.num_nonfinite) == (5, 2, 1)
    assert s.norm_max == 8


def test_counters_stay_at_the_largest_number():
    tx: Any = og.clip_by_global_norm(1.0)
    state = tx.init(jnp.zeros(1))
    largest = jnp.array(2**31 - 1, jnp.int32)
    full = replace_entries(state.stats, num_updates=largest, num_clipped=largest)
    _, state = tx.update(jnp.array([5.0]), state._replace(stats=full))
    assert state.stats.num_updates == state.stats.num_clipped == 2**31 - 1
    assert np.isfinite(state.stats.norm_mean)


@pytest.mark.usefixtures("x64")
def test_double_norm_beyond_float32_is_finite_everywhere():
    # One step cannot be finite to the clip and non-finite to its statistics.
    grads = jnp.array([3e300, 4e300], jnp.float64)
    out, state = run_once(og.clip_by_global_norm(1.0), grads)
    np.testing.assert_allclose(out, [0.6, 0.8], rtol=1e-14)
    assert state.stats.num_clipped == 1
    assert state.stats.num_nonfinite == 0
    assert np.isfinite(state.stats.norm_mean)
    assert np.isfinite(state.stats.norm_max)


def test_record_norm_changes_nothing():
    grads = {"a": f32([3.0, -0.0, math.nan]), "i": np.array([3], np.int32)}
    out, state = run_once(og.record_norm(), grads)
    assert same_bits(out, grads)
    assert state.stats.clip_threshold == math.inf
    out, state = run_once(og.record_norm(), {"a": f32([3.0, 4.0])})
    assert state.stats.grad_norm == state.stats.clipped_norm == 5


# By value --------------------------------------------------------------------


def value_oracle(tree, low, high):
    """NumPy's clip, and in float64 the norm after it, the share changed, the cosine."""
    clipped = [
        np.clip(x, *np.array([low, high], x.dtype)).astype(x.dtype) for x in tree
    ]
    before = np.concatenate([np.ravel(x).astype(float) for x in tree])
    after = np.concatenate([np.ravel(x).astype(float) for x in clipped])
    share = np.mean(before != after)
    unit_before, unit_after = (x / np.abs(x).max() for x in (before, after))
    lengths = np.linalg.norm(unit_before) * np.linalg.norm(unit_after)
    return clipped, true_norm([after]), share, unit_before @ unit_after / lengths


BOUNDS = {
    "symmetric": (-1.0, 1.0),
    "one-sided": (-1.0, math.inf),
    "other side": (-math.inf, 1.0),
    "open": (-math.inf, math.inf),
    "lopsided": (-1e-10, 1e10),
    "lopsided the other way": (-1e10, 1e-10),
    "above zero": (0.5, 2.0),
    "wide": (-1e38, 1e38),
    "narrow": (-1e-25, 1e-25),
}


@jax.jit
def clip_values(low: Any, high: Any, grads: Any) -> tuple[Any, Any]:
    tx: Any = og.clip_by_value(high, min_value=low)
    return tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20, 2e38])
def test_value_clip_and_its_measures_are_right(bounds, size):
    entries = f32([0.3, -0.9, 0.05, -0.01]) * f32(size)
    for tree in ([entries[:3], entries[3:]], [-np.abs(entries)], [np.abs(entries)]):
        clipped, norm, share, cosine = value_oracle(tree, *bounds)
        out, state = clip_values(*bounds, tree)
        for got, want in zip(out, clipped, strict=True):
            np.testing.assert_array_equal(got, want)
        assert float(state.entries_clipped) == pytest.approx(share)
        assert float(state.stats.clipped_norm) == pytest.approx(norm, rel=1e-5, abs=0)
        assert float(state.update_cosine) == pytest.approx(cosine, rel=1e-5, abs=1e-6)
        assert int(state.stats.num_clipped) == (share > 0)


def values_clipped(bound: Any, grads: Any) -> tuple[Any, Any]:
    tx: Any = og.clip_by_value(bound)
    return jax.jit(tx.update)(grads, tx.init(grads))


@pytest.mark.parametrize("bound", [1e-25, 1e-10, 0.5, 1.0, 1e10, 1e38, 3e38])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20, 3.3e38])
def test_value_clip_about_zero_and_its_measures_are_right(bound, size):
    entries = f32([0.3, -0.9, 0.05, -0.01]) * f32(size)
    tree = [entries[:3], entries[3:]]
    clipped, norm, share, cosine = value_oracle(tree, -bound, bound)
    out, state = values_clipped(f32(bound), tree)
    for got, want in zip(out, clipped, strict=True):
        np.testing.assert_array_equal(got, want)
    assert float(state.entries_clipped) == pytest.approx(share)
    assert float(state.stats.clipped_norm) == pytest.approx(norm, rel=1e-6, abs=0)
    assert float(state.update_cosine) == pytest.approx(cosine, rel=1e-6, abs=0)


# Leaves of less than a block of sums, of whole blocks, and with a rest; seven alike.
SIZES_OF_LEAVES = {
    "a block": [1024],
    "a rest": [1, 1021],
    "both": [5000, 5003],
    "many": [5000, 77] * 7,
    "a million": [1_000_003],
}


@functools.partial(jax.jit, static_argnames="low")
def measured(bound, tree, low):
    """The state of a value clip, of one program for all bounds."""
    tx: Any = og.clip_by_value(bound, min_value=low)
    return tx.update(tree, tx.init(tree))[1]


@pytest.mark.parametrize("low", [None, -10.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES_OF_LEAVES.values(), ids=SIZES_OF_LEAVES)
def test_measures_of_a_value_clip_are_right_where_most_entries_are_clipped(
    sizes, dtype, low
):
    rng = np.random.default_rng(0)
    for bound, share in ((0.05, 1.0), (0.077, 1.0), (0.0503, 0.9)):
        tree = [np.where(rng.random(n) < share, 0.1, 0.01).astype(dtype) for n in sizes]
        _, norm, share, cosine = value_oracle(tree, low or -bound, bound)
        state = measured(f32(bound), tree, low)
        assert float(state.entries_clipped) == pytest.approx(share, rel=1e-6, abs=0)
        assert float(state.stats.clipped_norm) == pytest.approx(norm, rel=1e-6, abs=0)
        assert float(state.update_cosine) == pytest.approx(cosine, rel=1e-6, abs=0)


def test_bound_of_each_dtype_counts_in_the_measures_of_a_value_clip():
    # Float16 has no 1e6 and no 1e-9: it has infinity, and zero.
    for bound, entry in ((1e6, 3e6), (1e-9, 3e-9)):
        tree = [f32([entry, -entry / 8]), np.array([2.0, -6e4], np.float16)]
        with np.errstate(over="ignore"):
            _, norm, share, cosine = value_oracle(tree, -bound, bound)
        _, state = values_clipped(bound, tree)
        assert state.entries_clipped == share
        assert float(state.stats.clipped_norm) == pytest.approx(norm, rel=1e-6, abs=0)
        assert float(state.update_cosine) == pytest.approx(cosine, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_value_clip_in_half_precision(dtype):
    grads = np.array([3.0, -0.5, -60000.0, 0.25]).astype(dtype)
    clipped, norm, share, cosine = value_oracle([grads], -1.0, 1.0)
    out, state = run_once(og.clip_by_value(1.0), [grads])
    assert same_bits(jax.tree.map(np.asarray, out), clipped)
    assert float(state.stats.clipped_norm) == pytest.approx(norm, rel=1e-5, abs=0)
    assert float(state.entries_clipped) == share
    assert float(state.update_cosine) == pytest.approx(cosine, rel=1e-5, abs=0)


def test_bound_beyond_the_dtype_clips_nothing():
    grads = np.array([6e4, -6e4], np.float16)
    out, state = run_once(og.clip_by_value(1e6), grads)
    assert same_bits(out, grads)
    assert state.stats.num_clipped == 0


def test_value_clip_of_complex_entries_is_by_part():
    grads = np.array([3 - 0.5j, 0.25 - 8j], np.complex64)
    out, state = run_once(og.clip_by_value(1.0), grads)
    np.testing.assert_array_equal(out, np.array([1 - 0.5j, 0.25 - 1j], np.complex64))
    assert float(state.stats.clipped_norm) == pytest.approx(
        true_norm([out]), rel=1e-6, abs=0
    )


def test_value_clip_keeps_nan_and_bounds_infinity_and_counts_both():
    grads = f32([math.nan, math.inf, -math.inf, 0.5])
    out, state = run_once(og.clip_by_value(1.0), grads)
    np.testing.assert_array_equal(out, [math.nan, 1.0, -1.0, 0.5])
    assert state.stats.num_nonfinite == 1
    assert state.entries_clipped == 0.5
    assert state.stats.norm_mean == 0


def test_entry_that_is_nan_does_not_count_as_clipped():
    _, state = run_once(og.clip_by_value(1.0), f32([math.nan, 0.5]))
    assert state.entries_clipped == 0
    assert state.stats.num_clipped == 0
    assert state.stats.num_nonfinite == 1


def test_value_bound_of_zero_gives_zeros_and_finite_measures():
    out, state = clip_values(-0.0, 0.0, [f32([3.0, -4.0])])
    assert not np.any(out[0])
    assert state.stats.clipped_norm == 0
    assert np.isfinite(state.update_cosine)


@pytest.mark.parametrize("max_value", [np.uint8(1), np.int64(2**40), 2**40, 1e300])
def test_value_bound_may_be_any_positive_number(max_value):
    grads = f32([3.0, -0.5])
    out, _ = run_once(og.clip_by_value(max_value), grads)
    np.testing.assert_array_equal(out, [1.0 if max_value == 1 else 3.0, -0.5])


@pytest.mark.parametrize("tx", [og.clip_by_value(0.5), og.clip_by_global_norm(0.5)])
def test_shares_of_leaves_beyond_2_to_the_24_are_right(tx):
    # A float32 count stands still at 2**24.
    grads = jnp.ones(2**24 + 2**23, jnp.bfloat16)
    out, state = run_once(tx, grads)
    if isinstance(state, og.ClipByValueState):
        assert state.entries_clipped == 1
    assert float(state.stats.grad_norm) == pytest.approx(
        grads.size**0.5, rel=1e-6, abs=0
    )
    del out


# Derivatives -------------------------------------------------------------------


@jax.jit
def slope_of_clip(size, max_norm):
    def total(size, max_norm):
        out, _ = clip_by(max_norm, size * jnp.array([0.6, -0.8, 0.0]))
        return jnp.sum(out)

    return jax.grad(total, argnums=(0, 1))(size, max_norm)


@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1.0, 1e10, math.inf])
@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-19, 1.0, 1e10, 1e30])
def test_derivative_through_a_clip_is_finite(max_norm, size):
    assert np.all(np.isfinite(slope_of_clip(size, max_norm)))


@pytest.mark.parametrize("size", [1e-10, 2.0, 1e10, 1e25])
def test_derivative_through_a_clip_is_the_projection(size):
    # Along the update nothing changes; across it the change is scaled by c / norm.
    grads = jnp.array([0.6, -0.8]) * size
    max_norm = size / 2
    along, across = jnp.array([0.6, -0.8]), jnp.array([0.8, 0.6])
    run = jax.jit(
        lambda g, v: jax.jvp(lambda g: clip_by(max_norm, g)[0], (g,), (v,))[1]
    )
    np.testing.assert_allclose(run(grads, along), [0, 0], atol=1e-6)
    np.testing.assert_allclose(run(grads, across), across / 2, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e30])
def test_derivative_through_a_value_clip_is_finite(size):
    def total(scale):
        tx: Any = og.clip_by_value(0.5)
        g = scale * jnp.array([0.6, -0.8, 0.0])
        out, state = tx.update(g, tx.init(g))
        return jnp.sum(out) + state.stats.grad_norm

    assert np.isfinite(jax.jit(jax.grad(total))(f32(size)))


def test_kernels_of_a_value_clip_do_not_grow_with_its_sums():
    """XLA on CPU takes a time that grows with the square of a kernel's additions."""
    tx = og.clip_by_value(1.0)
    grads = [jnp.ones(2500) for _ in range(64)]
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
    kernels = computations(str(compiled.as_text())).values()
    # The norm adds its leaves; sums for the cosine would be two more of these.
    assert max(text.count(" add(") for text in kernels) < len(grads)
    # One loop to three sums for four leaves, and one more reduction for each sum.
    of_norm = jax.jit(og.record_norm().update).lower(grads, og.record_norm().init(0.0))
    more = str(compiled.as_text()).count(" reduce(")
    more -= str(of_norm.compile().as_text()).count(" reduce(")
    assert more <= len(grads) / 4 + 3


@unlike_lowest_jax("XLA widens all leaves once")
def test_value_clip_keeps_no_half_precision_in_float32():
    tx = og.clip_by_value(1.0)
    grads = [jnp.ones(50_000, jnp.bfloat16) for _ in range(16)]
    step = jax.jit(tx.update)
    memory = step.lower(grads, tx.init(grads)).compile().memory_analysis()
    assert memory is not None
    # First sums take 3 / 16 of float32, and as much again when put together.
    assert memory.temp_size_in_bytes < sum(2 * x.nbytes for x in grads) / 2


@unlike_lowest_jax("XLA widens all leaves once")
def test_half_precision_is_not_kept_in_float32():
    """XLA on CPU would widen all leaves once, for the norm and for what follows."""
    tx = optax.chain(og.clip_by_global_norm(1.0), optax.sgd(0.1))
    params = [jnp.ones(10_000, jnp.bfloat16) for _ in range(8)]
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(params, state).compile()
    analysis: Any = compiled.memory_analysis()
    one_leaf = 4 * 10_000
    assert analysis.temp_size_in_bytes < one_leaf + 10_000


def hessian_of_cubes(x: np.ndarray, max_norm: float) -> np.ndarray:
    """Second derivatives of the sum of the cubes of the clipped entries."""
    norm = np.linalg.norm(x)
    if norm <= max_norm:
        return np.diag(6 * x)
    cubes, slope = np.sum(x**3), 3 * x**2
    along = -3 * x / norm**5
    curvature = 15 * np.outer(x, x) / norm**7 - 3 * np.eye(x.size) / norm**5
    mixed = np.outer(slope, along) + np.outer(along, slope)
    return max_norm**3 * (np.diag(6 * x) / norm**3 + mixed + cubes * curvature)


@pytest.mark.parametrize(
    "factory",
    [
        og.clip_by_global_norm,
        og.clip_by_leaf_norm,
        lambda max_norm: og.guard(optax.identity(), clip=max_norm),
    ],
    ids=["global norm", "leaf norm", "guard"],
)
def test_second_derivatives_are_right_at_any_norm(factory):
    """Squares of a divisor that is scaled down vanish in the plain derivative."""
    direction = np.array([0.6, 0.5, -0.7])

    @jax.jit
    def hessian(x: jax.Array, scale: jax.Array, max_norm: jax.Array) -> jax.Array:
        tx = factory(max_norm)
        state = tx.init(x)
        return jax.hessian(lambda x: jnp.sum((tx.update(x, state)[0] / scale) ** 3))(x)

    for scale in (1e-9, 1e-3, 1.2, 1.9, 2.5, 7.0, 1e3, 1e9):
        for share in (0.25, 100.0):
            found = hessian(f32(direction * scale), f32(scale), f32(share * scale))
            expected = hessian_of_cubes(direction, share)
            np.testing.assert_allclose(found * scale**2, expected, rtol=0, atol=1e-5)
