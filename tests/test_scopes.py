"""Norms of leaves, layers, groups and units, against float64 and against Optax."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    params, state = og.apply_gradients(tx, PARAMS, state, bad)
    assert same_bits(params, PARAMS)
    (rejection,) = og.rejections(state, PARAMS)
    assert rejection.leaf == "dense"


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
    with pytest.raises(ValueError, match="`state` holds no norms of leaves"):
        og.leaf_norms(og.record_norm().init(PARAMS))
