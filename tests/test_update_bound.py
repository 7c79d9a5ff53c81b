"""The bound on updates, and thresholds relative to the parameters.

The oracle is plain NumPy in float64: an optimizer's step without a guard, made shorter
where its norm is above the ratio times the norm of the parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax.sharding import PartitionSpec as P

import optax_guard as og
from tests.test_finite_law import DTYPES, SHAPES, expected_reason, runs, tree

RATIO, START, MIN_RMS = 0.02, 0.3, 1e-3
REASON = og.SkipReason


def params() -> dict[str, jax.Array]:
    """A matrix, a bias that is zero, and a table of small entries."""
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "bias": jnp.zeros(3),
        "table": jnp.asarray(1e-3 * rng.normal(size=(7,)), jnp.float32),
    }


def grads(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for k, x in params().items()
    }


def norm(tree: Any, minus: Any = None) -> float:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    others = [np.asarray(x, np.float64) for x in jax.tree.leaves(minus)]
    others = others or [np.zeros(())] * len(leaves)
    squares = [np.sum((x - y) ** 2) for x, y in zip(leaves, others, strict=True)]
    return math.sqrt(sum(squares))


def f32(x: float) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def bounded(updates: Any, old: Any, t: int, by_leaf: bool) -> Any:
    """The updates in float64, within a ratio to the norm of the parameters."""
    ratio = max(RATIO, START / math.sqrt(t))
    total = norm(old)
    rms = max(total / math.sqrt(sum(x.size for x in jax.tree.leaves(old))), MIN_RMS)
    updates = jax.tree.map(lambda x: np.asarray(x, np.float64), updates)
    if not by_leaf:
        size = max(total, rms * math.sqrt(sum(x.size for x in jax.tree.leaves(old))))
        factor = min(1.0, ratio * size / norm(updates))
        return jax.tree.map(lambda u: u * factor, updates)
    return jax.tree.map(
        lambda u, p: (
            u * min(1.0, ratio * max(norm(p), rms * math.sqrt(p.size)) / norm(u))
        ),
        updates,
        old,
    )


def by_tree() -> Any:
    return og.threshold.relative_to_params(RATIO, start=START, min_rms=MIN_RMS)


def by_leaf() -> Any:
    return og.clip_by_leaf_norm(by_tree())


def apply(tx: Any) -> Callable[..., Any]:
    return jax.jit(lambda p, s, g: og.apply_gradients(tx, p, s, grads=g))


def update(tx: Any) -> Callable[..., Any]:
    def step(p: Any, s: Any, g: Any) -> Any:
        updates, s = tx.update(g, s, p)
        return optax.apply_updates(p, updates), s

    return jax.jit(step)


@pytest.mark.parametrize("way", [apply, update])
@pytest.mark.parametrize("bound", [by_tree, by_leaf])
def test_steps_are_those_of_the_optimizer_made_shorter(bound, way):
    inner = optax.adam(1.0)
    tx = og.guard(inner, max_update=bound())
    step = way(tx)
    new, state = params(), tx.init(params())
    alone = inner.init(new)
    largest = 0.0
    for t in range(1, 7):
        old = new
        new, state = step(old, state, grads(t))
        raw, alone = inner.update(grads(t), alone, old)
        expected = bounded(raw, old, t, by_leaf=bound is by_leaf)
        for k, x in old.items():
            moved = np.asarray(new[k], np.float64) - np.asarray(x, np.float64)
            np.testing.assert_allclose(moved, expected[k], rtol=2e-4, atol=3e-7)
        m = og.metrics(state)
        np.testing.assert_allclose(m["update_norm"], norm(raw), rtol=1e-5)
        np.testing.assert_allclose(m["params_norm"], norm(old), rtol=1e-5)
        ratio = norm(expected) / norm(old)
        np.testing.assert_allclose(m["update_ratio"], ratio, rtol=1e-5)
        largest = max(largest, norm(raw) / norm(expected))
        assert m["bound_rate"] == 1.0
    assert largest > 3.0


def test_a_step_within_the_bound_is_that_of_the_optimizer():
    inner = optax.adam(1e-4)
    tx = og.guard(inner, clip=1e3, max_update=by_leaf())
    new, state = apply(tx)(params(), tx.init(params()), grads(1))
    alone, _ = apply(og.guard(inner, clip=1e3))(
        params(), og.guard(inner, clip=1e3).init(params()), grads(1)
    )
    # Another program, which may round a sum once or twice.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-7), new, alone)
    assert og.metrics(state)["bound_rate"] == 0


def test_a_number_bounds_the_norm_and_gives_what_optax_gives():
    tx = og.guard(optax.sgd(1.0), max_update=0.5)
    inner = optax.chain(optax.sgd(1.0), optax.clip_by_global_norm(0.5))
    new, _ = apply(tx)(params(), tx.init(params()), grads(1))
    updates, _ = inner.update(grads(1), inner.init(params()))
    expected = optax.apply_updates(params(), updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), new, expected
    )


def test_after_an_optimizer_in_a_chain():
    tx = optax.chain(optax.sgd(1.0), by_leaf())
    new, _ = update(tx)(params(), tx.init(params()), grads(1))
    raw = jax.tree.map(lambda g: -g, grads(1))
    expected = bounded(raw, params(), 1, by_leaf=True)
    for k, x in params().items():
        moved = np.asarray(new[k], np.float64) - np.asarray(x, np.float64)
        np.testing.assert_allclose(moved, expected[k], rtol=1e-5, atol=3e-7)


def test_labelled_groups_may_mix_it_with_numbers():
    tx = og.clip_by_group_norm(
        {"rest": by_tree(), "table": 0.5}, lambda k: "table" if k == "table" else "rest"
    )
    out: Any = tx.update(grads(1), tx.init(params()), params())[0]
    assert norm(out["table"]) == pytest.approx(0.5)
    rest = {k: params()[k] for k in ("kernel", "bias")}
    rms = norm(params()) / math.sqrt(25)
    expected = START * max(norm(rest), rms * math.sqrt(18))
    assert norm({k: out[k] for k in rest}) == pytest.approx(expected, rel=1e-6)


def test_parameters_that_do_not_count_are_not_in_any_norm():
    # As for LoRA: the frozen base is large, and would make the bound loose.
    old = {"base": jnp.full((50,), 100.0), "lora": jnp.array([3.0, 4.0])}
    tx = og.guard(
        optax.sgd(1.0), mask={"base": False, "lora": True}, max_update=by_tree()
    )
    g = {"base": jnp.zeros(50), "lora": jnp.array([30.0, 40.0])}
    new, state = apply(tx)(old, tx.init(old), g)
    assert norm(new["lora"] - old["lora"]) == pytest.approx(START * 5.0, rel=1e-5)
    assert og.metrics(state)["params_norm"] == pytest.approx(5.0)


def test_all_zero_parameters_can_move():
    old = {"w": jnp.zeros(100)}
    tx = og.guard(optax.sgd(1.0), max_update=by_tree())
    new, state = apply(tx)(old, tx.init(old), {"w": jnp.ones(100)})
    assert norm(new) == pytest.approx(START * MIN_RMS * 10, rel=1e-5)
    assert og.metrics(state)["update_ratio"] == 0


# Bad steps ---------------------------------------------------------------------


@pytest.mark.parametrize("way", [apply, update])
def test_a_skipped_step_leaves_the_bound_as_it_was(way):
    tx = og.guard(optax.adam(0.1), max_update=by_leaf())
    step = way(tx)
    old, state = step(params(), tx.init(params()), grads(1))
    bad = grads(2) | {"bias": jnp.array([0.0, jnp.nan, 0.0])}
    new, after = step(old, state, bad)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    jax.tree.map(np.testing.assert_array_equal, after.bound_state, state.bound_state)
    assert after.skip_reason == REASON.NONFINITE


@pytest.mark.parametrize("way", [apply, update])
@pytest.mark.parametrize("size", [4, 1 << 18])
def test_updates_that_are_not_finite_do_not_count_in_the_norm(way, size):
    # With no eps, Adam makes 0 / 0 of a gradient of zero.
    old = {"few": jnp.full(4, 2.0), "many": jnp.full(size, 2.0)}
    g = jax.tree.map(jnp.ones_like, old)
    g["few"] = g["few"].at[1].set(0.0)
    tx = og.guard(optax.adam(1.0, eps=0.0), max_update=by_tree())
    new, state = way(tx)(old, tx.init(old), g)
    assert new["few"][1] == 2.0
    assert norm(new, old) == pytest.approx(START * norm(old), rel=1e-4)
    assert (state.num_partial, state.num_skipped) == (1, 0)


def test_a_rate_that_overflows_ends_within_the_bound():
    # Without the bound, both entries would be kept: 1e30 is no bfloat16 after 1e38.
    old = {"w": jnp.full(2, 1.0, jnp.float16)}
    tx = og.guard(optax.sgd(1e3), max_update=by_tree())
    g = {"w": jnp.full(2, 100.0, jnp.float32)}  # An update of 1e5 is beyond float16.
    new, state = apply(tx)(old, tx.init(old), g)
    np.testing.assert_allclose(np.asarray(new["w"], np.float64), 1 - START, atol=1e-3)
    assert (state.num_partial, state.num_skipped) == (0, 0)


def test_parameters_at_the_end_of_their_dtype_stay_finite():
    old = {"w": jnp.array([65504.0, 1.0], jnp.float16)}
    tx = og.guard(optax.sgd(1.0), max_update=1e3)
    for way in (apply, update):
        new, _ = way(tx)(old, tx.init(old), {"w": jnp.array([-500.0, -1.0])})
        np.testing.assert_array_equal(new["w"], [65504.0, 2.0])


@pytest.mark.parametrize(
    ("inner", "dtype"), [(optax.adamw, "f16"), (optax.sgd, "mixed")]
)
def test_the_finite_law_holds_and_every_step_is_within_the_bound(inner, dtype):
    start, like = (
        {k: jax.ShapeDtypeStruct(SHAPES[k], d) for k, d in dtypes.items()}
        for dtypes in DTYPES[dtype]
    )
    start = tree(0, start)

    @jax.jit
    def step(p: Any, s: Any, bad: Any) -> Any:
        g, loss, rate = bad
        tx = og.guard(inner(lambda count: rate), max_update=by_tree())
        return og.apply_gradients(tx, p, s, grads=g, value=loss)

    state: Any = og.guard(inner(lambda count: 1e-2), max_update=by_tree()).init(start)
    for fault, steps in runs(like).items():
        new, after, t, moved = start, state, 0, 0.0
        for bad in steps:
            old, before = new, after
            new, after = step(old, before, (bad.grads, f32(bad.loss), f32(bad.rate)))
            held = new, after.wrapped_state
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(held)), fault
            moved = norm(new, old)
            if expected_reason(bad) == REASON.NONE:
                t += after.skip_reason == REASON.NONE
                ratio = max(RATIO, START / math.sqrt(max(t, 1)))
                # An update is rounded when it is added.
                assert moved <= ratio * norm(old) * 1.01, fault
            else:
                assert moved == 0, fault
                jax.tree.map(
                    np.testing.assert_array_equal,
                    after.bound_state,
                    before.bound_state,
                )
        assert moved > 0, fault


def test_an_update_whose_norm_overflows_is_not_applied():
    old = {"w": jnp.ones(16)}
    tx = og.guard(optax.sgd(1e38), max_update=by_tree())
    new, state = apply(tx)(old, tx.init(old), {"w": jnp.full(16, 3.0)})
    np.testing.assert_array_equal(new["w"], old["w"])
    assert og.metrics(state)["update_norm"] == math.inf
    assert og.metrics(state)["update_ratio"] == 0


# Where it is used --------------------------------------------------------------


def test_the_count_goes_on_with_that_of_the_run():
    inner = optax.adam(1.0)
    old, state = params(), inner.init(params())
    for t in range(100):
        _, state = inner.update(grads(t), state, old)
    tx = og.guard(inner, max_update=by_tree())
    new, _ = apply(tx)(old, og.wrap_state(tx, old, state), grads(200))
    moved = norm(new, old)
    expected = max(RATIO, START / math.sqrt(101)) * norm(old)
    assert moved == pytest.approx(expected, rel=1e-4)


def test_a_population_has_a_bound_for_each_member():
    tx = og.guard(optax.sgd(1.0), max_update=by_tree())
    many = jax.tree.map(lambda x: jnp.stack([x, 10 * x]), params())
    states = jax.vmap(tx.init)(many)
    both = jax.tree.map(lambda x: jnp.stack([1e3 * x, 1e3 * x]), grads(1))
    new, states = jax.vmap(apply(tx))(many, states, both)
    moved = jax.tree.map(jnp.subtract, new, many)
    for i, scale in enumerate((1.0, 10.0)):
        one = jax.tree.map(lambda x, i=i: x[i], moved)
        assert norm(one) == pytest.approx(START * scale * norm(params()), rel=1e-4)


def test_devices_by_hand_bound_as_one_device_does():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("d",), axis_types=auto)
    old = {"w": jnp.arange(1.0, 17.0), "b": jnp.zeros(3)}
    g = {"w": 100.0 * jnp.arange(16.0, 0.0, -1.0), "b": jnp.ones(3)}
    specs = {"w": P("d"), "b": P()}
    for clip in (og.clip_by_global_norm, og.clip_by_leaf_norm):
        tx = og.guard(
            optax.sgd(1.0),
            clip=og.record_norm(axis_name=specs),
            max_update=clip(by_tree(), axis_name=specs),
        )
        state = tx.init(old)
        inside = jax.shard_map(
            lambda p, s, g, tx=tx: og.apply_gradients(tx, p, s, grads=g),
            mesh=mesh,
            in_specs=(specs, P(), specs),
            out_specs=(specs, P()),
        )
        new, after = jax.jit(inside)(old, state, g)
        one = og.guard(optax.sgd(1.0), max_update=clip(by_tree()))
        expected, alone = apply(one)(old, one.init(old), g)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, expected
        )
        for name in ("update_norm", "update_ratio", "params_norm"):
            a, b = og.metrics(after)[name], og.metrics(alone)[name]
            assert a == pytest.approx(float(b), rel=1e-5), name


def test_a_rate_ten_thousand_times_too_high_still_learns():
    # A real loop: least squares by a Flax `TrainState`, whose rate is far too high.
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = x @ jnp.asarray(rng.normal(size=(8,)), jnp.float32)
    w0 = jnp.asarray(0.5 * rng.normal(size=(8,)), jnp.float32)

    def final_loss(tx: Any) -> float:
        def loss(p: Any) -> jax.Array:
            return jnp.mean((x @ p["w"] - y) ** 2)

        @jax.jit
        def step(state: Any) -> Any:
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        state = train_state.TrainState.create(apply_fn=None, params={"w": w0}, tx=tx)
        for _ in range(300):
            state = step(state)
        return float(loss(state.params))

    start = float(jnp.mean((x @ w0 - y) ** 2))
    assert final_loss(og.guard(optax.sgd(1e3), clip=1.0)) > 100 * start
    assert final_loss(og.auto(optax.sgd(1e3))) < start / 50


def test_the_preset_judges_losses_where_they_are_given():
    tx = og.auto(optax.sgd(0.1))
    step = jax.jit(
        lambda p, s, g, loss: og.apply_gradients(tx, p, s, grads=g, value=loss)
    )
    for losses in (True, False):
        new, state = params(), tx.init(params())
        reasons = []
        for t in range(24):
            loss = 50.0 if t == 20 else 1.0 + 0.1 * (t % 3)
            if losses:
                new, state = step(new, state, grads(t), f32(loss))
            else:
                new, state = apply(tx)(new, state, grads(t))
            reasons.append(int(state.skip_reason))
        expected = [0] * 24
        expected[20] = REASON.SPIKE if losses else REASON.NONE
        assert reasons == expected


# Errors ------------------------------------------------------------------------


def test_what_it_needs_is_named():
    tx = og.guard(optax.sgd(1.0), max_update=by_tree())
    with pytest.raises(ValueError, match="`params` of `guard` with `max_update`"):
        tx.update(grads(1), tx.init(params()))
    clip = by_leaf()
    with pytest.raises(ValueError, match="`params` of `clip_by_leaf_norm` must be"):
        clip.update(grads(1), clip.init(params()))
    alone = og.clip_by_global_norm(by_tree())
    with pytest.raises(ValueError, match="`params` of `clip_by_global_norm` must be"):
        alone.update(grads(1), alone.init(params()))


@pytest.mark.parametrize("of", [og.clip_by_unit_norm, og.skip.norm_above])
def test_it_is_refused_where_there_are_no_parameters_to_compare_with(of):
    with pytest.raises(TypeError, match="must not be relative to the norm"):
        of(by_tree())


@pytest.mark.parametrize("name", ["ratio", "start", "min_rms"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ValueError, match=name):
        og.threshold.relative_to_params(**{name: value})


def test_other_norms_and_transformations_are_refused():
    with pytest.raises(ValueError, match="`ord` must be 2"):
        og.clip_by_global_norm(by_tree(), ord=1)
    other: Any = optax.clip_by_global_norm(1.0)
    with pytest.raises(TypeError, match="`max_update` must be a number"):
        og.guard(optax.sgd(1.0), max_update=other)
