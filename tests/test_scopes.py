"""Norms of leaves, layers, groups and units, against float64 and against Optax."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from tests.strategies import f32, same_bits, true_norm

RNG = np.random.default_rng(0)
SHAPES = {"conv": (3, 3, 4, 8), "dense": (8, 5), "bias": (5,), "layers": (4, 2, 6)}
PARAMS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
GRADS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
CLIPS: dict[str, Any] = {
    "leaf": og.clip_by_leaf_norm(2.0),
    "layer": og.clip_by_leaf_norm(
        2.0, layer_axis=lambda path: 0 if path == "layers" else None
    ),
    "group": og.clip_by_group_norm(
        {"dense": 1.0, "rest": math.inf},
        {"conv": "rest", "dense": "dense", "bias": "dense", "layers": "rest"},
        record_quantiles=True,
    ),
    "unit": og.clip_by_unit_norm(0.1, exclude=lambda path: path == "bias"),
}


@functools.cache
def step_of(name: str) -> Any:
    tx = CLIPS[name]
    return jax.jit(lambda grads: tx.update(grads, tx.init(PARAMS), PARAMS))


def clipped(x: Any, limit: float) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x * min(1.0, limit / true_norm(x))


def test_each_leaf_is_clipped_by_its_own_norm():
    updates, state = step_of("leaf")(GRADS)
    for name, x in GRADS.items():
        np.testing.assert_allclose(updates[name], clipped(x, 2.0), rtol=1e-6)
        assert og.leaf_norms(state)[name] == pytest.approx(true_norm(x), rel=1e-6)
    assert state.stats.grad_norm == pytest.approx(true_norm(GRADS), rel=1e-6)
    assert state.stats.clipped_norm == pytest.approx(true_norm(updates), rel=1e-6)


def test_each_layer_of_a_stacked_leaf_is_clipped_by_its_own_norm():
    updates, state = step_of("layer")(GRADS)
    for i, x in enumerate(GRADS["layers"]):
        np.testing.assert_allclose(updates["layers"][i], clipped(x, 2.0), rtol=1e-6)
        norm = og.leaf_norms(state)[f"layers/{i}"]
        assert norm == pytest.approx(true_norm(x), rel=1e-6)


def test_each_group_is_clipped_by_its_own_norm():
    updates, state = step_of("group")(GRADS)
    both = {k: GRADS[k] for k in ("dense", "bias")}
    norm = true_norm(both)
    for name, x in both.items():
        expected = np.asarray(x, np.float64) / norm
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)
    assert same_bits(updates["conv"], GRADS["conv"])
    assert og.leaf_norms(state)["dense"] == pytest.approx(norm, rel=1e-6)
    median = og.norm_quantile(state, 0.5, by_group=True)
    assert isinstance(median, dict)
    assert median["dense"] == pytest.approx(norm, rel=0.02)


def test_units_are_those_of_optax():
    tx = optax.adaptive_grad_clip(0.1)
    theirs: Any = tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]
    updates, state = step_of("unit")(GRADS)
    assert same_bits(updates.pop("bias"), GRADS["bias"])
    for name, x in updates.items():
        np.testing.assert_allclose(x, theirs[name], rtol=3e-6)
    assert state.units_clipped == 1.0


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e18, 1e36])
def test_norms_are_right_at_any_size(scale):
    grads = jax.tree.map(lambda x: x * np.float32(scale), GRADS)
    _, state = step_of("leaf")(grads)
    for name, x in grads.items():
        assert og.leaf_norms(state)[name] == pytest.approx(true_norm(x), rel=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_guard_names_the_bad_leaf(name):
    tx = og.guard(optax.adam(1e-3), clip=CLIPS[name])
    state = tx.init(PARAMS)
    bad = GRADS | {"dense": GRADS["dense"].at[1, 2].set(math.nan)}
    params, state = og.apply_gradients(tx, PARAMS, state, grads=bad)
    assert same_bits(params, PARAMS)
    (skipped,) = og.skipped_steps(state, PARAMS)
    assert skipped.leaf == "dense"


WIDE = {"w": GRADS["conv"].reshape(8, 36), "v": GRADS["layers"].reshape(8, 6)}
WIDE_CLIPS: dict[str, Callable[[Any], Any]] = {
    "leaf": lambda axis: og.clip_by_leaf_norm(2.0, axis_name=axis),
    "layer": lambda axis: og.clip_by_leaf_norm(0.5, layer_axis=1, axis_name=axis),
    "group": lambda axis: og.clip_by_group_norm({"all": 2.0}, "all", axis_name=axis),
    "unit": lambda axis: og.clip_by_unit_norm(0.5, axis=0, axis_name=axis),
}


@pytest.mark.parametrize("name", WIDE_CLIPS)
def test_sharded_is_as_on_one_device(name, mesh):
    def play(axis: Any) -> Any:
        tx = WIDE_CLIPS[name](axis)
        return lambda grads: tx.update(grads, tx.init(grads), grads)

    def values(result: Any) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(result)]

    grads = WIDE | {"v": 1e-4 * WIDE["v"]}
    expected = values(jax.jit(play(None))(grads))
    rows = PartitionSpec("data")
    sharded = jax.device_put(grads, NamedSharding(mesh, rows))
    automatic = jax.jit(play(None))(sharded)
    # Units lie along the sharded axis, layers across it.
    manual = jax.shard_map(
        play("data"), mesh=mesh, in_specs=rows, out_specs=(rows, PartitionSpec())
    )
    for result in (automatic, jax.jit(manual)(sharded)):
        for got, wanted in zip(values(result), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


THRESHOLDS = {
    "zscore": og.threshold.zscore(),
    "quantile": og.threshold.quantile(0.9),
    "relative_to_mean": og.threshold.relative_to_mean(1.2, warmup=25),
}
FAULTS = [math.nan, math.inf, 1e30, 1e-30, 0.0]
PHASES = [0, 3, 24, 25, 150]
NOISE = f32(0.1 * np.exp(0.1 * np.random.default_rng(1).normal(size=(250, 2))))


def loop_of(tx: Any) -> Any:
    """Norms of two leaves by step to clipped norms, thresholds and the last state."""

    def step(state: Any, norms: Any) -> Any:
        updates, state = tx.update({"a": norms[0], "b": norms[1]}, state)
        stats = state.group_stats
        return state, (jnp.stack([updates["a"], updates["b"]]), stats.group_threshold)

    def run(norms: Any) -> Any:
        start = tx.init({"a": jnp.zeros(()), "b": jnp.zeros(())})
        state, (clipped, thresholds) = jax.lax.scan(step, start, norms)
        return clipped, thresholds, state

    return jax.jit(jax.vmap(run))


@pytest.mark.parametrize("scope", ["leaf", "group"])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_fault_in_one_group_spares_the_others_and_is_forgotten(name, scope):
    rule = THRESHOLDS[name]
    run = loop_of(
        og.clip_by_leaf_norm(rule)
        if scope == "leaf"
        else og.clip_by_group_norm({"a": rule, "b": rule}, lambda path: path)
    )
    cases = [(fault, phase) for fault in FAULTS for phase in PHASES]
    lanes, without = [NOISE], [NOISE]
    for fault, phase in cases:
        faulty = NOISE.copy()
        faulty[phase, 0] = fault
        lanes.append(faulty)
        # As long as the others, so that one program runs all.
        without.append(np.append(np.delete(NOISE, phase, 0), NOISE[-1:], 0))
    clipped, thresholds, states = jax.device_get(run(np.stack(lanes)))
    *_, thresholds_without, _ = jax.device_get(run(np.stack(without)))
    assert all(
        np.isfinite(x).all()
        for x in jax.tree.leaves((states.threshold, states.stats.norm_mean))
    )
    for i, (fault, phase) in enumerate(cases, 1):
        rest = slice(phase + 1, None)
        if math.isfinite(fault):
            # The other leaf does not notice, but that AdaGC's warm-up clips all.
            seen = [k for k in range(250) if k != phase or name != "relative_to_mean"]
            assert same_bits(clipped[i, seen, 1], clipped[0, seen, 1])
            assert same_bits(thresholds[i, seen, 1], thresholds[0, seen, 1])
        else:
            # Neither leaf learns from the step, as if it had not been.
            expected = thresholds_without[i, phase:-1]
            assert same_bits(thresholds[i, rest], expected)
        # What passes the faulty leaf later is about what passed it in a clean run.
        late = slice(phase + 60, None)
        ratio = clipped[i, late, 0] / clipped[0, late, 0]
        assert 0.7 < ratio.min() <= ratio.max() < 1.4, (fault, phase)
        if fault == 1e30 and phase > 25:
            assert clipped[i, phase, 0] < 2 * NOISE.max()


@pytest.mark.parametrize(
    "tx", [og.clip_by_leaf_norm(1.0), og.clip_by_unit_norm(1.0)], ids=["leaf", "unit"]
)
def test_what_has_no_gradient_is_no_leaf(tx):
    tree: Any = {"a": None, "b": jnp.arange(3), "c": f32([3, 4]), "d": f32([[1.0]])}
    updates, state = tx.update(tree, tx.init(tree), tree)
    assert og.leaf_norms(state) == {"c": 5.0, "d": 1.0}
    assert state.group_stats.group_norm.shape == (2,)
    assert updates["a"] is None
    assert same_bits(updates["b"], tree["b"])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`max_norms` must have every label"):
        og.clip_by_group_norm({"a": 1.0}, lambda path: path).init(PARAMS)
    with pytest.raises(ValueError, match=r"no leaf for \['b'\]"):
        og.clip_by_group_norm({"a": 1.0, "b": 1.0}, "a").init(PARAMS)
    with pytest.raises(ValueError, match="`layer_axis` must be an axis"):
        og.clip_by_leaf_norm(1.0, layer_axis=1).init(PARAMS)
    with pytest.raises(ValueError, match="`params` of `clip_by_unit_norm`"):
        og.clip_by_unit_norm(0.1).update(GRADS, CLIPS["unit"].init(PARAMS))
    # Of 8 rows each of 8 devices has one, which looks like a vector.
    with pytest.raises(ValueError, match="`axis` must be given with `axis_name`"):
        og.clip_by_unit_norm(0.1, axis_name="data").init(jnp.ones((1, 6)))
    with pytest.raises(ValueError, match="`state` holds no norms of leaves"):
        og.leaf_norms(og.record_norm().init(PARAMS))


@pytest.mark.parametrize(
    ("make", "number", "static"),
    [
        (
            og.clip_by_leaf_norm,
            {"max_norm": 1.0},
            {"layer_axis": lambda path: 0 if path == "layers" else None},
        ),
        (
            og.clip_by_group_norm,
            {},
            {"max_norms": {"a": 1.0}, "labels": lambda path: "a"},
        ),
        (
            og.clip_by_unit_norm,
            {"max_ratio": 0.1},
            {"axis": (0,), "exclude": lambda path: path == "bias"},
        ),
    ],
    ids=["leaf", "group", "unit"],
)
def test_what_is_no_hyperparameter_can_be_static(make, number, static):
    tx = optax.inject_hyperparams(make, static_args=tuple(static))(**number, **static)
    plain = make(**number, **static)
    found, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    expected, _ = jax.jit(plain.update)(GRADS, plain.init(PARAMS), PARAMS)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
