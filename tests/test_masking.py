"""Leaves that do not count: frozen, overwritten, or of another optimizer."""

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
PARAMS = {
    "layers": [
        {"frozen": f32(RNG.normal(size=(4, 3))), "tuned": f32(RNG.normal(size=(4, 3)))}
        for _ in range(2)
    ],
    "scales_of_fp8": {"input": f32([3.0]), "kernel": f32([4.0])},
}
GRADS: Any = jax.tree.map(lambda x: 2 * x, PARAMS)
# It may end above the leaves.
MASK = {"layers": [{"frozen": False, "tuned": True}] * 2, "scales_of_fp8": False}
TUNED = [layer["tuned"] for layer in GRADS["layers"]]


def by_name(tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "tuned" in str(path[-1]), tree)


CLIPS: dict[str, Any] = {
    "norm": og.clip_by_global_norm(1.0),
    "value": og.clip_by_value(0.5),
    "leaf": og.clip_by_leaf_norm(1.0, layer_axis=0),
    "group": og.clip_by_group_norm({"all": 1.0}, "all"),
    "unit": og.clip_by_unit_norm(0.1),
}


def expected_of(name: str) -> list[np.ndarray]:
    def scaled(x: Any, norm: Any) -> np.ndarray:
        return x * np.minimum(1.0, 1.0 / norm)

    tuned = [np.asarray(x, np.float64) for x in TUNED]
    if name in ("norm", "group"):
        return [scaled(x, true_norm(tuned)) for x in tuned]
    if name == "value":
        return [np.clip(x, -0.5, 0.5) for x in tuned]
    if name == "leaf":
        return [scaled(x, np.linalg.norm(x, axis=1, keepdims=True)) for x in tuned]
    # Gradients are twice the parameters in every unit.
    return [x * 0.1 / 2 for x in tuned]


@functools.cache
def step() -> Any:
    """What each guard makes of gradients, and the states after."""
    txs: dict[str, Any] = {
        name: og.guard(optax.identity(), clip, mask=by_name if name == "norm" else MASK)
        for name, clip in CLIPS.items()
    }
    return jax.jit(
        lambda grads: {
            name: tx.update(grads, tx.init(PARAMS), PARAMS) for name, tx in txs.items()
        }
    )


def poisoned(i: int, name: str) -> Any:
    grads = jax.tree.map(np.copy, GRADS)
    grads["layers"][i][name][2, 1] = math.nan
    return grads


def test_norm_clip_and_verdict_are_of_what_counts():
    # A NaN where nothing counts changes neither the norm nor the verdict.
    for grads in (GRADS, poisoned(0, "frozen")):
        for name, (updates, state) in step()(grads).items():
            stats = og.find_state(state, og.NormStats)
            assert stats.grad_norm == pytest.approx(true_norm(TUNED), rel=1e-6)
            assert state.num_skipped == 0
            assert same_bits(updates["scales_of_fp8"], grads["scales_of_fp8"])
            for i, wanted in enumerate(expected_of(name)):
                layer = updates["layers"][i]
                np.testing.assert_allclose(layer["tuned"], wanted, rtol=1e-5)
                # A NaN would make a parameter NaN, so that entry is left alone.
                frozen = grads["layers"][i]["frozen"]
                frozen = np.where(np.isnan(frozen), 0.0, frozen).astype(frozen.dtype)
                assert same_bits(layer["frozen"], frozen)


def test_bad_leaf_that_counts_skips_all_and_is_named():
    for updates, state in step()(poisoned(1, "tuned")).values():
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        (skipped,) = og.skipped_steps(state, PARAMS)
        assert skipped.leaf == "layers/1/tuned"


def test_bad_leaf_among_many_is_in_the_run_that_is_named():
    params = {f"{i:03}": f32([1.0]) for i in range(129)}
    mask = {name: int(name) % 3 == 1 for name in params}
    tx: Any = og.guard(optax.sgd(1.0), mask=mask)
    state = tx.init(params)
    _, state = tx.update(params | {"100": f32([math.nan])}, state)
    (skipped,) = og.skipped_steps(state, params)
    assert isinstance(skipped.leaf, str)
    first, last = skipped.leaf.split(" to ")
    assert first <= "100" <= last
    assert int(last) - int(first) < 32


def test_function_is_taken_for_no_schedule_under_inject_hyperparams_if_static():
    inject = optax.inject_hyperparams(og.guard, static_args=("inner", "mask"))
    tx: Any = inject(optax.identity(), 1.0, mask=by_name)
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert og.metrics(state)["grad_norm"] == pytest.approx(true_norm(TUNED), rel=1e-6)


def test_what_is_no_mask_is_an_error():
    for mask, error, match in [
        ({"layers": 1, "scales_of_fp8": False}, TypeError, "must have a bool.*got 1"),
        ({"layers": True}, ValueError, "`mask` must be, or return, a tree"),
        (lambda tree: "all", TypeError, "must have a bool.*got 'all'"),
    ]:
        with pytest.raises(error, match=match):
            og.guard(optax.sgd(1.0), 1.0, mask=mask).init(PARAMS)


# Low-rank adaptation: most of the model is frozen --------------------------------

LORA = {
    "a": f32(RNG.normal(size=(6, 2))),
    "b": f32(RNG.normal(size=(2, 3))),
    "kernel": f32(10 * RNG.normal(size=(6, 3))),
}
X, Y = f32(RNG.normal(size=(16, 6))), f32(RNG.normal(size=(16, 3)))
LABELS = {"a": "tuned", "b": "tuned", "kernel": "frozen"}
# The third batch is broken.
SCALES = f32([1.0, 0.5, math.nan, 2.0])


def lora_loss(params: Any, scale: Any) -> Any:
    out = scale * X @ (params["kernel"] + params["a"] @ params["b"])
    return jnp.mean((out - Y) ** 2)


def tuned_in_float64() -> dict[str, np.ndarray]:
    """SGD with its gradient clipped to 0.5, of the two factors alone."""
    p = {k: x.astype(np.float64) for k, x in LORA.items()}
    for scale in SCALES[np.isfinite(SCALES)]:
        x = scale * X.astype(np.float64)
        slope = x.T @ (2 / Y.size * (x @ (p["kernel"] + p["a"] @ p["b"]) - Y))
        grads = {"a": slope @ p["b"].T, "b": p["a"].T @ slope}
        for k, g in grads.items():
            p[k] = p[k] - 0.1 * g * min(1.0, 0.5 / true_norm(grads))
    return p


def freezing(tuned: Any) -> Any:
    return optax.partition({"tuned": tuned, "frozen": optax.set_to_zero()}, LABELS)


WAYS: dict[str, Any] = {
    "guard around": lambda: og.guard(
        freezing(optax.sgd(0.1)), 0.5, mask={"a": True, "b": True, "kernel": False}
    ),
    "guard inside": lambda: freezing(og.guard(optax.sgd(0.1), 0.5)),
    "clip in a mask": lambda: og.guard(
        optax.chain(
            optax.masked(
                og.clip_by_global_norm(0.5), {"a": True, "b": True, "kernel": False}
            ),
            freezing(optax.sgd(0.1)),
        )
    ),
    "gradients of a part": lambda: og.guard(optax.sgd(0.1), 0.5),
}


@pytest.mark.parametrize("way", WAYS)
def test_low_rank_adaptation(way):
    tx: Any = WAYS[way]()

    def take(carry: Any, scale: Any) -> Any:
        params, state = carry
        if way == "gradients of a part":
            rest = {"kernel": params["kernel"]}
            part = {k: params[k] for k in ("a", "b")}
            grads = jax.grad(lambda p: lora_loss(p | rest, scale))(part)
            new: Any = og.apply_gradients(tx, part, state, grads=grads)
            return (new[0] | rest, new[1]), None
        grads = jax.grad(lora_loss)(params, scale)
        return og.apply_gradients(tx, params, state, grads=grads), None

    trained = {k: LORA[k] for k in ("a", "b")} if "part" in way else LORA
    run = jax.jit(lambda start: jax.lax.scan(take, start, SCALES)[0])
    params, state = run((LORA, tx.init(trained)))
    for k, wanted in tuned_in_float64().items():
        np.testing.assert_allclose(params[k], wanted, rtol=1e-4, atol=1e-5)
    assert same_bits(params["kernel"], LORA["kernel"])
    assert og.metrics(state)["num_skipped"] == 1
