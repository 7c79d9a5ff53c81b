"""`fit` dispatches small steps in groups. Oracles are loops that take them singly."""

import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.flax import TrainState, fit
from optax_guard.loops import _group
from optax_guard.loops._group import Group, open_group, stacked
from optax_guard.loops._interval import compiled_step, first_interval

GUARDED = og.guard(optax.adam(0.1), clip=0.5)
HERE = set(jax.devices()[:1])


def targets(step):
    """A batch that depends on the step alone; that of step 20 is bad."""
    x = np.random.default_rng(step).normal(size=(3, 2)).astype(np.float32)
    return x * (np.nan if step == 20 else 1)


def train_step(state, x):
    x = x[0] if isinstance(x, tuple) else x
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - x) ** 2))(
        state.params
    )
    return state.apply_gradients(grads=grads, value=loss), {"loss": loss}


def made(tx: Any = GUARDED, dtype: Any = jnp.float32):
    params = {"w": jnp.array([1.0, -1.0], dtype)}
    return TrainState.create(apply_fn=str, params=params, tx=tx)


def by_hand(batches, num_steps, dtype: Any = jnp.float32, step: Any = train_step):
    """States and losses of a plain loop."""
    state: Any = made(dtype=dtype)
    losses, jitted = [], jax.jit(step)
    for i in range(num_steps):
        state, found = jitted(state, batches(i))
        losses.append(float(found["loss"]))
    return state, np.array(losses)


@pytest.fixture
def sizes(monkeypatch):
    """The sizes of the groups that were dispatched; nothing takes too long."""
    found = []
    take = Group.take

    def recorded(self):
        batches, size = take(self)
        found.append(int(size))
        return batches, size

    monkeypatch.setattr(Group, "take", recorded)
    monkeypatch.setattr(_group, "_MOST_SECONDS", np.inf)
    monkeypatch.setattr(_group, "_SLOW_SECONDS", np.inf)
    return found


# The last step before an evaluation is dispatched alone: `fit` compares its parameters.
def test_groups_are_full_and_end_at_each_evaluation(sizes):
    result: Any = fit(made(), train_step, targets, num_steps=90, eval_every=40)
    assert sizes == [32, 7, 1, 32, 7, 1, 9, 1]
    assert [row["step"] for row in result.history] == [40, 80, 90]
    state, losses = by_hand(targets, 90)
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-5)
    parts = np.split(losses, [40, 80])
    found = [row["train_loss"] for row in result.history]
    np.testing.assert_allclose(found, [np.nanmean(part) for part in parts], rtol=1e-5)
    assert [row["num_skipped"] for row in result.history] == [1, 1, 1]
    assert result.state.step == 90


def test_step_gives_the_same_bits_in_whatever_company(sizes, monkeypatch):
    whole = fit(made(), train_step, targets, num_steps=40, eval_every=20)
    assert sizes == [19, 1, 19, 1]
    # The first batch has always waited for too long.
    monkeypatch.setattr(_group, "_MOST_SECONDS", -1.0)
    alone = fit(made(), train_step, targets, num_steps=40, eval_every=20)
    assert sizes[4:] == [1] * 40
    assert alone.history == whole.history
    for a, b in zip(*map(jax.tree.leaves, (alone.state, whole.state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_array_that_the_user_writes_the_next_batch_into_is_copied(sizes):
    def reusing():
        same = np.empty((3, 2), np.float32)
        for step in range(40):
            same[:] = targets(step)
            yield same

    result: Any = fit(made(), train_step, reusing(), num_steps=40, eval_every=40)
    assert sizes == [32, 7, 1]
    state, _ = by_hand(targets, 40)
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-5)


def ragged(step):
    return targets(step)[: 1 if step % 10 == 9 else 3]


def wider(step):
    return np.float64(targets(step)) if step % 10 == 9 else targets(step)


def on_device(step):
    return jnp.asarray(targets(step))


def mixed(step):
    return on_device(step) if step % 10 < 5 else targets(step)


def in_tuple(step):
    return (targets(step),) if step % 10 == 9 else targets(step)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (ragged, [9, 1, 9, 1, 4, 1]),
        (wider, [9, 1, 9, 1, 4, 1]),
        (in_tuple, [9, 1, 9, 1, 4, 1]),
        (on_device, [24, 1]),
        (mixed, [5, 5, 5, 5, 4, 1]),
    ],
)
def test_batch_of_another_kind_opens_the_next_group(sizes, batches, expected):
    result: Any = fit(made(), train_step, batches, num_steps=25, eval_every=30)
    assert sizes == expected
    state, losses = by_hand(batches, 25)
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-5)
    [row] = result.history
    assert row["train_loss"] == pytest.approx(np.nanmean(losses), rel=1e-5)


def test_batch_of_several_arrays_keeps_its_structure(sizes):
    def step(state, batch):
        assert jax.tree.structure(batch) == jax.tree.structure(batches(0))
        assert batch["scale"].shape == batch["key"].shape == ()
        noise = jax.random.uniform(batch["key"])
        return train_step(state, batch["x"][0] * batch["scale"] + noise)

    def batches(i):
        key = jax.random.key(i)
        return {"x": [targets(i), None], "scale": np.float32(i), "key": key}

    result: Any = fit(made(), step, batches, num_steps=9, eval_every=9)
    assert sizes == [8, 1]
    state, _ = by_hand(batches, 9, step=step)
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "draw",
    [lambda step: 0.25, lambda step: jax.lax.full((), 0.25)],
    ids=["of Python", "on the device"],
)
def test_weak_type_of_a_number_is_kept(sizes, draw):
    """With a strong one, a parameter in half precision would become a float32."""

    def step(state, x):
        params = jax.tree.map(lambda w: w - 0.5 * (w - x), state.params)
        return state.replace(step=state.step + 1, params=params), 0.0

    start = made(optax.sgd(0.1), jnp.bfloat16)
    result: Any = fit(start, step, draw, num_steps=4, eval_every=4)
    assert sizes == []
    assert result.state.params["w"].dtype == jnp.bfloat16


def test_batches_that_wait_hold_a_bounded_number_of_bytes():
    for num_bytes, room in [(1, 32), (1 << 16, 4), (1 << 17, 2), ((1 << 17) + 1, 0)]:
        group = Group(100, HERE)
        batch = np.zeros(num_bytes, np.uint8)
        added = 0
        while group.add(batch) and not group.is_due():
            added += 1
        assert added + (room > 0) == room


def test_batch_that_has_waited_a_millisecond_is_dispatched(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    group = Group(100, HERE)
    for seconds, is_due in [(0, False), (0.0009, False), (0.0002, True)]:
        now[0] += seconds
        assert group.add(targets(0))
        assert group.is_due() == is_due
    batches, size = group.take()
    assert (size, group.size) == (3, 0)
    np.testing.assert_array_equal(stacked(batches)[:3], [targets(0)] * 3)
    # JAX may cast these places too, and what lies in fresh memory may overflow.
    np.testing.assert_array_equal(stacked(batches)[3:], 0)


def test_groups_become_small_where_the_host_waits_for_long_and_large_again(
    sizes, monkeypatch
):
    def batches(step):
        if step == 128:
            monkeypatch.setattr(_group, "_SLOW_SECONDS", np.inf)
        return targets(step)

    # The first two are under way when the host waits for the first time.
    monkeypatch.setattr(_group, "_SLOW_SECONDS", -1.0)
    result: Any = fit(made(), train_step, batches, num_steps=170, eval_every=170)
    assert sizes == [32, 32, 32, 16, 8, 4, 2, *[1] * 3, 2, 4, 8, 16, 10, 1]
    state, _ = by_hand(targets, 170)
    np.testing.assert_allclose(result.state.params["w"], state.params["w"], rtol=1e-5)


def test_group_is_under_way_until_its_steps_are_done():
    @jax.jit
    def slow_step(state, x):
        matrix = jnp.full((400, 400), jnp.sum(x)) * state["w"]
        matrix = jax.lax.fori_loop(0, 100, lambda i, a: (a @ a) * 1e-3, matrix)
        return {"w": jnp.minimum(matrix[0, 0], 1.0)}, 0.0

    step = compiled_step(slow_step)
    batches, state = np.ones((2, 3), np.float32), {"w": jnp.zeros(())}
    interval = first_interval(step.train_step, state, batches[0])
    # The first call compiles.
    state, interval, done = step.run_steps(state, interval, batches, np.int32(2))
    done.block_until_ready()
    assert state["w"].is_ready()
    _, _, done = step.run_steps(state, interval, batches, np.int32(2))
    assert not done.is_ready()


def test_no_group_where_each_step_is_seen_or_none_would_gain(mesh):
    def printing(state, x):
        jax.debug.print("{}", x[0, 0])
        return train_step(state, x)

    x = targets(0)
    assert isinstance(open_group(train_step, made(), x, 2), Group)
    assert open_group(train_step, made(), x, 1) is None
    assert open_group(printing, made(), x, 2) is None
    with jax.debug_nans(True):
        assert open_group(train_step, made(), x, 2) is None
    with jax.disable_jit():
        assert open_group(train_step, made(), x, 2) is None
    large = made().replace(batch_stats=jnp.zeros(1 << 17))
    assert open_group(train_step, large, x, 2) is None
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.device_put(made(), everywhere)
    assert open_group(train_step, spread, x, 2) is None


def test_batch_on_another_device_than_the_state_waits_for_none():
    group = Group(100, HERE)
    assert not group.add(jax.device_put(targets(0), jax.devices()[1]))
    assert group.add(jax.device_put(targets(0), jax.devices()[0]))
    assert not group.add(jax.device_put(targets(0), jax.devices()[1]))


@pytest.mark.parametrize("place", [np.array, jnp.asarray])
def test_group_has_one_shape_however_many_wait(place):
    group, shapes = Group(5, HERE), []
    for size in (1, 3, 5):
        for step in range(size):
            assert group.add(place(targets(step)))
        batches, found = group.take()
        assert found == size
        np.testing.assert_array_equal(
            stacked(batches)[:size], [targets(step) for step in range(size)]
        )
        shapes.append([leaf.shape for leaf in jax.tree.leaves(batches)])
    assert shapes[0] == shapes[1] == shapes[2]


def test_interrupt_ends_a_group_after_the_step_at_hand(sizes):
    def batches(step):
        if step == 45:
            signal.raise_signal(signal.SIGINT)
        return targets(step)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result: Any = fit(made(), train_step, batches, num_steps=90, eval_every=90)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sizes == [32, 14]
    assert result.interrupted
    assert result.state.step == 46


def test_rows_of_a_run_in_groups_are_those_of_steps_that_are_too_large_for_them(sizes):
    """The state that is too large holds the same run, and dispatches each step."""
    small = fit(made(), train_step, targets, num_steps=50, eval_every=25)
    padded = made().replace(batch_stats=jnp.zeros(1 << 17))
    large = fit(padded, train_step, targets, num_steps=50, eval_every=25)
    assert sizes == [24, 1, 24, 1]
    for a, b in zip(small.history, large.history, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
