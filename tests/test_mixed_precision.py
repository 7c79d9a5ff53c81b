"""Half precision: the guard's verdict drives the loss scale; updates that vanish."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

import optax_guard as og
from optax_guard.flax import TrainState, update_dynamic_scale
from tests.strategies import f32, same_bits

RATE, CLIP = 0.5, 0.2
MODEL_SIZE = 8
# Of each step, what its data are multiplied with: a NaN, and an overflow of float16.
FACTORS: Any = f32([1, 1, 1, 1, math.nan, 1, 1, 3e4, 1, 1, 1, 1, 1, 1, 1, 1])


class ScaledState(TrainState):
    dynamic_scale: Any = None


class Model(nn.Module):
    """Computes in float16; its parameters are float32."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(MODEL_SIZE, dtype=jnp.float16)(x))
        return nn.Dense(1, dtype=jnp.float16)(x)[:, 0]


MODEL = Model()
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = X.sum(axis=1)
PARAMS = MODEL.init(jax.random.key(0), X)["params"]


def loss_of(factor: jax.Array) -> Any:
    def loss_fn(params):
        found: Any = MODEL.apply({"params": params}, X)
        return jnp.mean((found.astype(jnp.float32) * factor - Y) ** 2)

    return loss_fn


def first_scale() -> DynamicScale:
    # Too large at first, so that it must back off; and it grows again soon.
    return DynamicScale(
        growth_interval=3, scale=jnp.float32(2.0**24), fin_steps=jnp.int32(0)
    )


def with_guard(state: ScaledState, factor: jax.Array) -> Any:
    """The recipe."""
    grad_fn = state.dynamic_scale.value_and_grad(loss_of(factor))
    _, _, loss, grads = grad_fn(state.params)
    state = state.apply_gradients(grads=grads, value=loss)
    scale = update_dynamic_scale(state.dynamic_scale, state.opt_state)
    return state.replace(dynamic_scale=scale), (scale.scale, scale.fin_steps, loss)


def with_flax(carry: Any, factor: jax.Array) -> Any:
    """The same as Flax documents it, with Flax's own verdict."""
    params, opt_state, dynamic_scale = carry
    grad_fn = dynamic_scale.value_and_grad(loss_of(factor))
    dynamic_scale, is_finite, loss, grads = grad_fn(params)
    updates, new_state = THEIRS.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates), new_state
    params, opt_state = jax.tree.map(
        lambda x, y: jnp.where(is_finite, x, y), new, (params, opt_state)
    )
    scale = dynamic_scale.scale, dynamic_scale.fin_steps, loss
    return (params, opt_state, dynamic_scale), scale


SGD = optax.sgd(RATE, momentum=0.9)
THEIRS = optax.chain(optax.clip_by_global_norm(CLIP), SGD)


def first_state() -> ScaledState:
    return ScaledState.create(
        apply_fn=MODEL.apply,
        params=PARAMS,
        tx=og.guard(SGD, clip=CLIP),
        dynamic_scale=first_scale(),
    )


def run(step: Any, carry: Any) -> tuple[Any, str]:
    """What a scan over all steps gives, and its compiled program."""
    scan = jax.jit(lambda c: jax.lax.scan(step, c, FACTORS)).lower(carry).compile()
    return scan(carry), str(scan.as_text())


@functools.cache
def ours() -> tuple[Any, str]:
    return run(with_guard, first_state())


@functools.cache
def theirs() -> tuple[Any, str]:
    return run(with_flax, (PARAMS, THEIRS.init(PARAMS), first_scale()))


def test_scale_and_steps_are_those_of_flaxs_own_verdict():
    state, (scales, streaks, losses) = ours()[0]
    (params, _, _), expected = theirs()[0]
    np.testing.assert_array_equal(scales, expected[0])
    np.testing.assert_array_equal(streaks, expected[1])
    # Backs off at first, at both bad batches, and grows where nothing is wrong.
    ratios = np.asarray(scales[1:]) / np.asarray(scales[:-1])
    assert ratios[3] == 0.5
    assert ratios[6] == 0.5
    assert {0.5, 1.0, 2.0} == set(ratios)
    np.testing.assert_allclose(losses, expected[2], rtol=1e-3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4),
        state.params,
        params,
    )
    assert losses[-1] < 0.7 * losses[0]
    # Clipped after unscaling, by norms of the unscaled gradients.
    assert og.metrics(state)["clipped_norm"] <= CLIP * (1 + 1e-6)


def judged(text: str) -> set[int]:
    """Sizes of the arrays of which it is asked whether all entries are finite."""
    found = set()
    for name in re.findall(r"pred\[\]\S* reduce\((%[\w.-]+)", text):
        shape = re.search(re.escape(name) + r" = pred\[([\d,]*)\]", text)
        if shape is not None:
            found.add(math.prod(int(n) for n in shape.group(1).split(",") if n))
    return found


def test_gradients_are_judged_once():
    kernel = X.shape[1] * MODEL_SIZE
    assert kernel in judged(theirs()[1])
    assert kernel not in judged(ours()[1])


def test_a_finite_step_that_a_rule_skips_leaves_the_scale_alone():
    tx = og.guard(optax.sgd(0.1), skip=og.skip.norm_above(1.0))
    scale = DynamicScale(scale=8.0, growth_interval=2)
    found = []
    for grad in [5.0, 5.0, 5.0, math.inf, 0.5]:
        _, state = tx.update(f32([grad]), tx.init(jnp.zeros(1)))
        scale = update_dynamic_scale(scale, state)
        found.append(float(scale.scale))
    assert found == [8.0, 8.0, 16.0, 8.0, 8.0]


def test_under_accumulation_every_micro_batch_drives_the_scale():
    tx = og.accumulate(optax.sgd(0.1), 4)
    state = tx.init(jnp.zeros(1))
    scale = DynamicScale(scale=8.0)
    found = []
    for grad in [1.0, math.inf, 1.0, math.nan, 1.0]:
        _, state = tx.update(f32([grad]), state)
        scale = update_dynamic_scale(scale, state)
        found.append(float(scale.scale))
    assert found == [8.0, 4.0, 4.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="`opt_state` must hold a `GuardState`"):
        update_dynamic_scale(scale, optax.sgd(0.1).init(jnp.zeros(1)))


def test_bfloat16_gradients_move_float32_parameters_as_the_oracle():
    tx = og.guard(optax.sgd(RATE, momentum=0.9), clip=CLIP)
    rng = np.random.default_rng(1)
    batches = rng.normal(size=(12, 6)).astype(jnp.bfloat16)
    batches[4, 2], batches[9, 0] = np.nan, np.inf

    def body(carry, grads):
        return og.apply_gradients(tx, carry[0], carry[1], grads=grads), None

    carry: Any = jnp.zeros(6), tx.init(jnp.zeros(6))
    params: Any = jax.jit(lambda c: jax.lax.scan(body, c, batches))(carry)[0][0]
    w, trace = np.zeros(6), np.zeros(6)
    for grads in batches.astype(np.float64):
        norm = np.linalg.norm(grads)
        if np.isfinite(norm):
            # Clipped gradients are bfloat16 again; what is summed is not.
            clipped = (grads * min(1.0, CLIP / norm)).astype(jnp.bfloat16)
            trace = clipped.astype(np.float64) + 0.9 * trace
            w = w - RATE * trace
    assert params.dtype == jnp.float32
    np.testing.assert_allclose(params, w, rtol=1e-5)


# Updates that vanish -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_steps_counted_as_vanished_are_those_that_move_nothing(dtype):
    eps = float(jnp.finfo(dtype).eps)
    rng = np.random.default_rng(2)
    weights = rng.choice([-1, 1], 64) * rng.uniform(1, 4, 64)
    # At both ends of a binade, where a number is most and least easily changed.
    weights[:3] = 1.0, -2.0, 2.0 - eps
    weights = weights.astype(dtype)
    # No unclipped update is larger than its parameter.
    grads = (weights.astype(np.float64) * rng.uniform(0.1, 1, 64)).astype(dtype)
    grads[:3] = weights[:3]
    norm = np.linalg.norm(grads.astype(np.float64))
    # Coefficients of clipping; at the last there is nothing to clip.
    coefficients = f32([eps / 5, eps / 300, eps / 4.1, eps / 2.5, 4 * eps, 0.3, 2.0])

    @jax.jit
    def after(max_norm):
        tx = og.guard(optax.sgd(1.0), clip=max_norm)
        params, state = og.apply_gradients(tx, weights, tx.init(weights), grads=grads)
        return params, og.metrics(state)["num_vanished"]

    counted = []
    for coefficient in coefficients:
        params, num_vanished = after(coefficient * f32(norm))
        # NumPy's own arithmetic in that dtype.
        update = grads.astype(np.float64) * min(1.0, float(coefficient))
        moved = weights - update.astype(dtype)
        assert same_bits(params, weights) == same_bits(moved, weights)
        counted.append(int(num_vanished))
        assert counted[-1] == same_bits(moved, weights)
    assert counted == [1, 1, 1, 0, 0, 0, 0]


def test_vanished_steps_add_up_and_skipped_ones_do_not_count():
    tx = og.guard(optax.sgd(1.0), clip=1e-3, skip=og.skip.norm_above(10.0))
    half = jnp.ones(2, jnp.bfloat16)
    state, counts = tx.init(half), []
    update = jax.jit(tx.update)
    for size in [1.0, 1.0, 100.0, math.nan, 0.0, 1e-3, 1.0]:
        _, state = update(half * size, state, half)
        counts.append(int(og.metrics(state)["num_vanished"]))
    assert counts == [1, 2, 2, 2, 2, 2, 3]
    # What is added to float32 does not vanish.
    _, state = update(half, tx.init(half), half.astype(jnp.float32))
    assert og.metrics(state)["num_vanished"] == 0


def test_dtype_of_what_is_masked_out_does_not_count():
    """A frozen base in bfloat16 tells nothing of float32 adapters, which do move."""
    params = {"base": jnp.ones(2, jnp.bfloat16), "lora": jnp.ones(2)}
    grads = jax.tree.map(lambda p: 1e3 * p, params)
    for mask, num_vanished in (({"base": False, "lora": True}, 0), (True, 1)):
        tx: Any = og.guard(optax.sgd(1e-2), clip=0.5, mask=mask)
        moved: Any
        moved, state = og.apply_gradients(tx, params, tx.init(params), grads=grads)
        assert og.metrics(state)["num_vanished"] == num_vanished
        assert (moved["lora"] != params["lora"]).all()
