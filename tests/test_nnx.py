"""Flax NNX: `nnx.Optimizer` forwards extra arguments, so the guard works as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_guard as og


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2)


@nnx.jit
def train_step(model, optimizer, x):
    # A copy: the variables themselves are changed in place by the forward pass.
    old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    loss, grads = nnx.value_and_grad(loss_fn)(model, x)
    optimizer.update(model, grads, value=loss)
    new = nnx.state(model, nnx.BatchStat)
    nnx.update(model, og.keep_if_skipped(optimizer.opt_state, new, old))
    return loss


GOOD = np.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7]], np.float32)
BAD = np.where(GOOD == 2.0, np.nan, GOOD).astype(np.float32)


def made(tx):
    model = Normalized(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


# One for all tests: a step is compiled for each optimizer that it meets.
GUARDED = og.guard(optax.adamw(0.01), clip=1.0)


def arrays(tree):
    # Copies, because the modules change in place.
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_on_clean_data_it_is_optaxs_clip_and_optimizer():
    ours, our_optimizer = made(GUARDED)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    theirs, their_optimizer = made(clipped)

    @nnx.jit
    def plain_step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss_fn)(model, x))

    for _ in range(4):
        train_step(ours, our_optimizer, GOOD)
        plain_step(theirs, their_optimizer, GOOD)
    for x, y in zip(arrays(nnx.state(ours)), arrays(nnx.state(theirs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_nan_batch_changes_neither_parameters_nor_averages_nor_moments():
    model, optimizer = made(GUARDED)
    train_step(model, optimizer, GOOD)
    before = arrays(nnx.state(model))
    moments = arrays(og.find_state(optimizer, og.GuardState).wrapped_state)
    loss = train_step(model, optimizer, BAD)
    assert np.isnan(loss)
    after = arrays(nnx.state(model))
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y)
    guard_state = og.find_state(optimizer, og.GuardState)
    for x, y in zip(arrays(guard_state.wrapped_state), moments, strict=True):
        np.testing.assert_array_equal(x, y)
    assert isinstance(guard_state.num_skipped, jax.Array)
    assert guard_state.num_skipped == 1
    # Flax counts its own steps, taken or not.
    assert optimizer.step[...] == 2
    train_step(model, optimizer, GOOD)
    assert any(
        np.any(x != y) for x, y in zip(arrays(nnx.state(model)), before, strict=True)
    )


def test_without_keep_if_skipped_a_nan_batch_poisons_the_averages():
    model, optimizer = made(GUARDED)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss_fn)(model, x))

    step(model, optimizer, BAD)
    assert all(np.isfinite(x).all() for x in arrays(nnx.state(model, nnx.Param)))
    assert not any(
        np.isfinite(x).all() for x in arrays(nnx.state(model, nnx.BatchStat))
    )


def test_metrics_are_read_from_the_optimizer():
    model, optimizer = made(GUARDED)
    for x in (GOOD, BAD, GOOD, GOOD):
        train_step(model, optimizer, x)
    found = jax.device_get(og.metrics(optimizer))
    assert found["num_updates"] == 4
    assert found["num_skipped"] == 1
    assert found["skip_rate"] == 0.25
    grads = nnx.grad(loss_fn)(model, GOOD)
    train_step(model, optimizer, GOOD)
    squares = sum(np.sum(g.astype(np.float64) ** 2) for g in arrays(grads))
    np.testing.assert_allclose(
        og.metrics(optimizer)["grad_norm"], np.sqrt(squares), rtol=1e-5
    )


def test_metrics_are_read_inside_the_step():
    model, optimizer = made(GUARDED)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss_fn)(model, x))
        return og.metrics(optimizer)

    assert step(model, optimizer, BAD)["skip_reason"] == og.SkipReason.NONFINITE


def test_skipped_steps_name_the_step_and_its_loss():
    model, optimizer = made(GUARDED)
    train_step(model, optimizer, GOOD)
    train_step(model, optimizer, BAD)
    [skipped] = og.skipped_steps(optimizer, nnx.state(model, nnx.Param))
    assert skipped.update == 1
    assert skipped.reason == og.SkipReason.NONFINITE
    assert np.isnan(skipped.value)
    assert skipped.leaf == "first/kernel/value"


def test_value_is_forwarded():
    model, optimizer = made(GUARDED)
    before = arrays(nnx.state(model, nnx.Param))
    grads = nnx.grad(loss_fn)(model, GOOD)
    optimizer.update(model, grads, value=jnp.inf)
    after = arrays(nnx.state(model, nnx.Param))
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y)
    reason = og.find_state(optimizer, og.GuardState).skip_reason
    assert reason == og.SkipReason.NONFINITE_VALUE


def test_step_is_traced_once():
    num_traces = 0

    @nnx.jit
    def step(model, optimizer, x):
        nonlocal num_traces
        num_traces += 1
        loss, grads = nnx.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads, value=loss)

    model, optimizer = made(GUARDED)
    for x in (GOOD, BAD, GOOD):
        step(model, optimizer, x)
    assert num_traces == 1


def test_early_stopping_takes_the_state_of_a_module():
    model, _ = made(GUARDED)
    stopper = og.early_stopping(og.stop.patience(1))
    first = arrays(nnx.state(model, nnx.Param))
    stop = stopper.init(nnx.state(model, nnx.Param))
    stop = stopper.update(1.0, stop, nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.Param)))
    stop = stopper.update(2.0, stop, nnx.state(model, nnx.Param))
    assert stop.should_stop
    nnx.update(model, stopper.best(stop, nnx.state(model, nnx.Param)))
    for x, y in zip(arrays(nnx.state(model, nnx.Param)), first, strict=True):
        np.testing.assert_array_equal(x, y)


def test_variables_themselves_in_place_of_a_copy_are_refused():
    model, optimizer = made(GUARDED)
    old = nnx.state(model, nnx.BatchStat)
    with pytest.raises(ValueError, match=r"`old` must be a copy.*jax.tree.map\(jnp.c"):
        og.keep_if_skipped(optimizer.opt_state, nnx.state(model, nnx.BatchStat), old)


def test_keep_if_skipped_without_a_guard_is_refused():
    model, optimizer = made(optax.adamw(0.01))
    stats = nnx.state(model, nnx.BatchStat)
    with pytest.raises(ValueError, match="`opt_state` must hold a `GuardState`"):
        og.keep_if_skipped(optimizer.opt_state, stats, stats)
