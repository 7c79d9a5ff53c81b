"""The guard: what a skipped step leaves alone, by both mechanisms of platforms."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from tests.strategies import f32, same_bits, types_of

P = PartitionSpec
REASON = og.SkipReason


def masked(*operands, default, **platforms):
    """Stands in for `platform_dependent` and takes what TPU and GPU would."""
    del platforms
    return default(*operands)


@pytest.fixture(params=["branch", "mask"])
def mechanism(request, monkeypatch):
    """Runs a test by the CPU's mechanism, and by that of accelerators."""
    if request.param == "mask":
        monkeypatch.setattr(jax.lax, "platform_dependent", masked)
    return request.param


@pytest.fixture(params=["update by branch", "apply by branch", "update by mask"])
def mode(request, monkeypatch):
    """How a step is made. By mask, applying is updating and one addition more."""
    mode, _, mechanism = request.param.split()
    if mechanism == "mask":
        monkeypatch.setattr(jax.lax, "platform_dependent", masked)
    return mode


@pytest.mark.parametrize("call", ["update", "apply_gradients"])
def test_with_cond_a_branch_skips_everywhere(monkeypatch, call):
    monkeypatch.setattr(jax.lax, "platform_dependent", masked)
    params, results, counts = params_of_two(), [], []
    for use_cond in (False, True):
        tx = og.guard(optax.adam(0.1), clip=1.0, use_cond=use_cond)

        def run(params, state, grads, tx=tx):
            if call == "apply_gradients":
                return og.apply_gradients(tx, params, state, grads=grads)
            return tx.update(grads, state, params)

        state = tx.init(params)
        counts.append(str(jax.make_jaxpr(run)(params, state, GOOD[0])).count(" cond["))
        for grads in (GOOD[0], BAD[0], GOOD[1]):
            found, state = jax.jit(run)(params, state, grads)
            params = found if call == "apply_gradients" else params
        results.append((found, state))
        params = params_of_two()
    assert counts[1] == counts[0] + 1
    jax.tree.map(lambda *x: np.testing.assert_allclose(*x, rtol=1e-6), *results)


def params_of_two() -> dict[str, Any]:
    return {"b": jnp.float32(0.5), "w": jnp.array([1.0, -2.0, 3.0])}


def grads_of(*numbers: float, like: Any = None) -> Any:
    """Gradients for `params_of_two`: `b`, then the entries of `w`."""
    flat = f32(numbers)
    return {"b": jnp.asarray(flat[0]), "w": jnp.asarray(flat[1:])}


GOOD = [grads_of(0.1, 1, 2, 3), grads_of(-1, 0.5, 0, 4), grads_of(2, 2, -2, 0.25)]
BAD = [
    grads_of(math.nan, 1, 2, 3),
    grads_of(1, 1, math.nan, 3),
    grads_of(1, math.inf, 1, 3),
    grads_of(-math.inf, 1, 1, math.nan),
]


def jitted(tx: Any, mode: str = "update") -> Any:
    """One step as `(params, state, grads, value) -> (params, state, updates)`.

    Compiled once for each transformation, whichever tests use it.
    """
    return _jitted(tx, mode, is_masking())


def is_masking() -> bool:
    return jax.lax.platform_dependent is masked


@functools.cache
def _jitted(tx: Any, mode: str, is_masking: bool) -> Any:
    del is_masking

    @jax.jit
    def step(params, state, grads, value):
        if mode == "apply":
            new, state = og.apply_gradients(tx, params, state, grads=grads, value=value)
            return new, state, ()
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, updates

    return step


def shared(build: Callable[[], Any]) -> Any:
    """What `build` makes, one for all tests by the same mechanism.

    Not one for both: a guard keeps its first trace for callers outside of `jit`.
    """
    return _shared(build, is_masking())


@functools.cache
def _shared(build: Callable[[], Any], is_masking: bool) -> Any:
    del is_masking
    return build()


def adam() -> Any:
    return og.guard(optax.adam(0.1), clip=1.0)


def adamw() -> Any:
    return og.guard(optax.adamw(0.1), clip=1.0)


INNERS = {
    "adamw on a schedule": lambda: optax.adamw(
        optax.cosine_decay_schedule(0.1, 9), weight_decay=0.1
    ),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1)
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.0, 9)
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
    "plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "partition": lambda: optax.partition(
        {"fast": optax.adam(1.0), "slow": optax.sgd(0.1)}, {"b": "fast", "w": "slow"}
    ),
    "masked": lambda: optax.masked(optax.adam(0.1), {"b": True, "w": False}),
}


def guarded(build: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: og.guard(build(), clip=2.0, skip=og.skip.norm_above(50.0))


GUARDED = {name: guarded(build) for name, build in INNERS.items()}


# A skipped step


@pytest.mark.parametrize("name", INNERS)
def test_skipped_step_changes_nothing_but_records(name, mode):
    tx = shared(GUARDED[name])
    step = jitted(tx, mode)
    params, value = params_of_two(), 1.0
    state = tx.init(params)
    params, state, _ = step(params, state, GOOD[0], value)
    params, state, _ = step(params, state, GOOD[1], value)
    skipped = [(grads, value) for grads in BAD]
    skipped += [
        (GOOD[2], math.nan),
        (GOOD[2], -math.inf),
        (grads_of(60, 0, 0, 0), 1.0),
    ]
    after = params, state
    for count, (grads, loss) in enumerate(skipped, 1):
        new_params, new_state, updates = step(*after, grads, loss)
        assert same_bits(new_params, params)
        assert same_bits(new_state.wrapped_state, state.wrapped_state)
        assert types_of(new_state) == types_of(state)
        assert new_state.num_skipped == new_state.skip_streak == count
        if mode == "update":
            assert same_bits(updates, jax.tree.map(jnp.zeros_like, params))
        after = new_params, new_state
    # What follows is what would have followed without them.
    with_gap = step(*after, GOOD[2], value)
    without = step(params, state, GOOD[2], value)
    assert same_bits(with_gap[0], without[0])
    assert same_bits(with_gap[1].wrapped_state, without[1].wrapped_state)
    assert with_gap[1].skip_streak == 0
    assert with_gap[1].skip_reason == REASON.NONE


@pytest.mark.parametrize("name", INNERS)
def test_both_mechanisms_mean_the_same(name, monkeypatch):
    results = []

    def play(mode: str) -> None:
        tx = shared(GUARDED[name])
        step = jitted(tx, mode)
        params, state = params_of_two(), tx.init(params_of_two())
        for grads in (GOOD[0], BAD[0], GOOD[1], BAD[2], GOOD[2]):
            params, state, _ = step(params, state, grads, 1.0)
        results.append((params, state))

    play("update")
    play("apply")
    monkeypatch.setattr(jax.lax, "platform_dependent", masked)
    play("update")
    if name == "momentum":
        play("apply")
    # To the last bit but one: compilers fuse the two differently.
    for result in results[1:]:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(_data(x), _data(y), rtol=5e-7),
            result,
            results[0],
        )


def _data(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)])
def test_good_steps_are_those_of_clip_and_optimizer(inner, mechanism):
    del mechanism
    guarded = og.guard(inner, clip=2.0)
    plain = optax.chain(optax.clip_by_global_norm(2.0), inner)
    ours, theirs = jitted(guarded, "apply"), jitted(plain)
    params, state = params_of_two(), guarded.init(params_of_two())
    expected, plain_state = params, plain.init(params)
    for grads in GOOD * 3:
        params, state, _ = ours(params, state, grads, 1.0)
        expected, plain_state, _ = theirs(expected, plain_state, grads, 1.0)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, expected
    )


def test_eager_and_jitted_steps_agree():
    tx = shared(adamw)
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in (GOOD[0], BAD[1], GOOD[1]):
        expected = step(params, state, grads, 1.0)
        updates, state = tx.update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            (params, state, updates),
            expected,
        )


# Verdicts, streaks, bounds


def test_reasons_are_told_apart_and_non_finite_gradients_come_first():
    rules = [og.skip.norm_above(10.0), og.skip.norm_above(5.0)]
    tx: Any = og.guard(optax.sgd(1.0), skip=rules)
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads, value, reason in [
        (GOOD[0], 1.0, REASON.NONE),
        (BAD[0], 1.0, REASON.NONFINITE),
        (BAD[2], math.nan, REASON.NONFINITE),
        (GOOD[0], math.nan, REASON.NONFINITE_VALUE),
        (grads_of(9, 0, 0, 0), -math.inf, REASON.NONFINITE_VALUE),
        (grads_of(9, 0, 0, 0), 1.0, REASON.NORM_ABOVE),
        (grads_of(5, 0, 0, 0), 1.0, REASON.NONE),
    ]:
        params, state, _ = step(params, state, grads, value)
        assert state.skip_reason == reason


def test_without_a_value_only_gradients_are_judged():
    tx: Any = og.guard(optax.sgd(1.0))
    params = params_of_two()
    _, state = tx.update(GOOD[0], tx.init(params), params)
    assert state.skip_reason == REASON.NONE
    _, state = tx.update(GOOD[0], tx.init(params), params, value=None)
    assert state.skip_reason == REASON.NONE


@pytest.mark.parametrize("value", [1, np.float64(2.0), jnp.bfloat16(3.0), jnp.int32(4)])
def test_value_may_be_any_number(value):
    tx: Any = og.guard(optax.sgd(1.0))
    params = params_of_two()
    _, state = tx.update(GOOD[0], tx.init(params), params, value=value)
    assert state.skip_reason == REASON.NONE
    assert types_of(state) == types_of(tx.init(params))


@pytest.mark.usefixtures("x64")
def test_double_loss_beyond_float32_is_finite():
    tx: Any = og.guard(optax.sgd(1.0))
    params = params_of_two()
    _, state = tx.update(GOOD[0], tx.init(params), params, value=jnp.float64(1e300))
    assert state.skip_reason == REASON.NONE


def test_exhaustion_is_flagged_after_the_stated_number_in_a_row():
    tx: Any = og.guard(optax.sgd(0.1), max_consecutive_skips=3)
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    flags = []
    for is_bad in [1, 1, 0, 1, 1, 1, 1, 0, 1]:
        params, state, _ = step(params, state, BAD[0] if is_bad else GOOD[0], 1.0)
        flags.append(bool(state.guard_exhausted))
    assert flags == [False] * 5 + [True, True, False, False]
    assert state.num_skipped == 7
    default = inspect.signature(og.guard).parameters["max_consecutive_skips"].default
    assert default == 10
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


def test_counts_stay_at_the_largest():
    largest = 2**31 - 1
    # Of the first gradients one entry counts as vanished, and one is 0 / 0.
    tx: Any = og.guard(optax.rmsprop(0.5, eps=0.0), clip=1e-3)
    params = jnp.ones(2, jnp.bfloat16)
    state = tx.init(params)
    full = state._replace(skip_counts=jnp.full_like(state.skip_counts, largest))
    for grads, names in (
        ([1.0, 0.0], ("num_vanished", "num_partial")),
        ([math.nan, 1.0], ("num_skipped", "skip_streak")),
    ):
        for before, expected in ((state, 1), (full, largest)):
            _, after = tx.update(jnp.array(grads, jnp.bfloat16), before, params)
            assert [getattr(after, name) for name in names] == [expected] * 2


def test_non_finite_steps_are_never_applied_however_many():
    tx: Any = og.guard(optax.adam(0.1), max_consecutive_skips=1)

    def body(carry, _):
        updates, state = tx.update(BAD[0], carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    params = params_of_two()
    (after, state), _ = jax.lax.scan(body, (params, tx.init(params)), length=500)
    assert same_bits(after, params)
    assert state.num_skipped == state.skip_streak == 500


def test_lasting_change_of_scale_is_accepted_after_the_stated_number():
    rule = og.skip.norm_above(10.0, max_consecutive=3)
    tx: Any = og.guard(optax.sgd(1e-3), skip=rule, max_consecutive_skips=2)
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    high, low = grads_of(40, 0, 0, 0), grads_of(1, 0, 0, 0)
    taken, flags = [], []
    # Steps that are not finite neither count for the rule nor end its row.
    with_nan = [high, BAD[0], high, BAD[1], high, BAD[0], high]
    for grads in [low, *[high] * 5, low, *with_nan]:
        params, state, _ = step(params, state, grads, 1.0)
        taken.append(state.skip_reason == REASON.NONE)
        flags.append(bool(state.guard_exhausted))
    assert [i for i, t in enumerate(taken) if t] == [0, 4, 6, 13]
    # And for the guard they alone count.
    assert [i for i, flag in enumerate(flags) if flag] == [10, 11, 12]


def test_limits_may_be_traced():
    @jax.jit
    def run(limit, count, grads):
        rule = og.skip.norm_above(limit, max_consecutive=count)
        tx: Any = og.guard(optax.sgd(1.0), skip=rule, max_consecutive_skips=count)
        state = tx.init(GOOD[0])
        for _ in range(2):
            _, state = tx.update(grads, state, GOOD[0])
        return state.skip_reason, state.guard_exhausted

    assert run(1.0, 1, GOOD[0]) == (REASON.NONE, False)
    assert run(1.0, 2, GOOD[0]) == (REASON.NORM_ABOVE, False)
    assert run(10.0, 1, GOOD[0]) == (REASON.NONE, False)
    assert run(10.0, 2, BAD[0]) == (REASON.NONFINITE, True)
    assert run(10.0, 3, BAD[0]) == (REASON.NONFINITE, False)


def test_skipped_step_does_not_move_the_clip_schedule():
    tx: Any = og.guard(
        optax.sgd(1.0), clip=lambda n: 1.0 + n, skip=og.skip.norm_above(100.0)
    )
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    limits = []
    for grads in [GOOD[0], BAD[0], grads_of(200, 0, 0, 0), GOOD[1], GOOD[2]]:
        params, state, _ = step(params, state, grads, 1.0)
        limits.append(float(state.clip_state.stats.clip_threshold))
    assert limits == [1.0, 2.0, 2.0, 2.0, 3.0]


# The ring of skipped steps


def test_last_sixteen_skipped_steps_are_kept_with_their_facts():
    tx: Any = og.guard(optax.sgd(0.1), skip=og.skip.norm_above(100.0))
    params = params_of_two()

    def body(state, i):
        bad = i % 3 != 0
        first = jnp.where(bad & (i % 2 == 0), jnp.nan, 1.0)
        last = jnp.where(bad & (i % 2 == 1), jnp.inf, 1.0)
        grads = {"b": first, "w": jnp.array([1.0, 1.0, 0.0]).at[2].set(last)}
        return tx.update(grads, state, params, value=i * 1.0)[1], None

    state = tx.init(params)
    for field in "skipped_update", "skipped_leaf":
        assert (getattr(state.skip_log, field) == -1).all()
    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(40)))(state)
    expected = [i for i in range(40) if i % 3 != 0]
    assert state.num_skipped == len(expected)
    rows = og.skipped_steps(state, params)
    assert [r.update for r in rows] == expected[-16:]
    assert [r.value for r in rows] == [float(i) for i in expected[-16:]]
    assert [r.leaf for r in rows] == [
        "b" if i % 2 == 0 else "w" for i in expected[-16:]
    ]
    assert {r.reason for r in rows} == {REASON.NONFINITE}
    assert not any(math.isfinite(r.grad_norm) for r in rows)


# What advances on a skipped step: the rows of the README's table


def after_good_and_bad(tx, bad=None, steps=1):
    """States after a good step, and after `steps` bad ones more."""
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    params, state, _ = step(params, state, GOOD[0], 1.0)
    after = params, state
    for _ in range(steps):
        after = step(*after, BAD[0] if bad is None else bad, 1.0)[:2]
    return (params, state), after


def test_schedule_inside_the_guard_does_not_advance():
    tx: Any = og.guard(optax.adam(optax.linear_schedule(0.1, 0.0, 10)))
    (_, before), (_, after) = after_good_and_bad(tx)
    counts = optax.tree.get_all_with_path(after.wrapped_state, "count")
    assert [int(count) for _, count in counts] == [1, 1]
    assert same_bits(before.wrapped_state, after.wrapped_state)


def test_schedule_outside_the_guard_advances():
    tx: Any = optax.chain(
        og.guard(optax.scale_by_adam()),
        optax.scale_by_learning_rate(optax.linear_schedule(0.1, 0.0, 10)),
    )
    _, (_, after) = after_good_and_bad(tx)
    assert optax.tree.get(after[1], "count") == 2


def test_weight_decay_inside_the_guard_is_not_applied():
    (before, _), (after, _) = after_good_and_bad(
        og.guard(optax.adamw(0.1, weight_decay=0.5))
    )
    assert same_bits(before, after)


def test_weight_decay_outside_the_guard_is_applied():
    tx: Any = optax.chain(og.guard(optax.sgd(0.1)), optax.add_decayed_weights(-0.5))
    (before, _), (after, _) = after_good_and_bad(tx)
    np.testing.assert_allclose(after["w"], before["w"] / 2)


def test_average_of_updates_outside_the_guard_advances_on_zeros():
    tx: Any = optax.chain(og.guard(optax.sgd(1.0)), optax.ema(0.5, debias=False))
    (_, before), (_, after) = after_good_and_bad(tx)
    np.testing.assert_allclose(after[1].ema["w"], before[1].ema["w"] / 2)


def test_average_of_parameters_outside_stays_with_keep_if_skipped():
    tx: Any = og.guard(optax.sgd(1.0))
    (params, _), (after, state) = after_good_and_bad(tx)
    average = jax.tree.map(lambda x: x * 0.5, params)
    moved = optax.incremental_update(after, average, 0.1)
    assert not same_bits(moved, average)
    assert same_bits(og.keep_if_skipped(state, moved, average), average)


def test_keys_inside_the_guard_do_not_advance():
    tx: Any = og.guard(optax.add_noise(0.1, 0.5, jax.random.key(3)))
    (_, before), (_, after) = after_good_and_bad(tx)
    assert same_bits(before.wrapped_state, after.wrapped_state)


def test_accumulation_inside_the_guard_loses_only_the_bad_part():
    tx: Any = og.guard(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in (GOOD[0], BAD[0], GOOD[1]):
        params, state, _ = step(params, state, grads, 1.0)
    assert optax.tree.get(state, "gradient_step") == 1
    mean = jax.tree.map(lambda a, b: (a + b) / 2, GOOD[0], GOOD[1])
    expected = optax.tree.sub(params_of_two(), mean)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected
    )


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
def test_accumulation_outside_the_guard_keeps_nan_until_the_flag_is_set():
    # Optax multiplies the accumulated NaN by zero and keeps it; nothing is applied.
    tx: Any = optax.MultiSteps(og.guard(optax.sgd(1.0), max_consecutive_skips=2), 2)
    step = jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in (GOOD[0], BAD[0], GOOD[1], GOOD[1]):
        params, state, updates = step(params, state, grads, 1.0)
    assert same_bits(params, params_of_two())
    guard_state = og.find_state(state, og.GuardState)
    assert (guard_state.num_skipped, state.gradient_step) == (2, 2)
    assert guard_state.guard_exhausted
    assert not np.any(updates["w"])


def test_steps_of_train_state_and_nnx_optimizer_advance():
    nnx = pytest.importorskip("flax.nnx")
    guard_flax = pytest.importorskip("optax_guard.flax")
    tx: Any = og.guard(optax.adam(0.1))
    state = guard_flax.TrainState.create(
        apply_fn=lambda: None, params=params_of_two(), tx=tx
    )
    after = state.apply_gradients(grads=BAD[0], value=1.0)
    assert after.step == 1
    assert same_bits(after.params, state.params)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    grads = jax.tree.map(lambda x: x * jnp.nan, nnx.state(model))
    optimizer.update(model, grads, value=jnp.array(1.0))
    assert optimizer.step[...] == 1
    assert same_bits(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(before))


# Trees outside the optimizer


def test_batch_statistics_of_a_bad_batch_are_undone():
    tx: Any = og.guard(optax.sgd(0.1))
    params = params_of_two()
    old = {"mean": jnp.array([1.0, 2.0]), "count": jnp.int32(3), "lr": 0.5}
    new = {"mean": jnp.array([jnp.nan, 2.0]), "count": jnp.int32(4), "lr": 0.25}
    _, state = tx.update(BAD[0], tx.init(params), params)
    kept = jax.jit(og.keep_if_skipped)(state, new, old)
    assert same_bits(kept, jax.tree.map(jnp.asarray, old))
    _, state = tx.update(GOOD[0], tx.init(params), params)
    assert same_bits(
        og.keep_if_skipped(state, old, new), jax.tree.map(jnp.asarray, old)
    )


def test_keys_are_kept_too(mechanism):
    del mechanism
    tx: Any = og.guard(optax.sgd(0.1))
    _, state = tx.update(BAD[0], tx.init(GOOD[0]), GOOD[0])
    old, new = jax.random.key(0), jax.random.key(1)
    assert same_bits(og.keep_if_skipped(state, new, old), old)


def test_one_of_several_guards_is_enough_to_keep():
    tx: Any = optax.partition(
        {"x": og.guard(optax.sgd(0.1)), "y": og.guard(optax.adam(0.1))},
        {"b": "x", "w": "y"},
    )
    params = params_of_two()
    for grads, is_kept in [(BAD[0], True), (BAD[1], True), (GOOD[0], False)]:
        updates, state = tx.update(grads, tx.init(params), params)
        kept = og.keep_if_skipped(state, {"s": jnp.ones(2)}, {"s": jnp.zeros(2)})
        assert bool(kept["s"][0] == 0) == is_kept
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


# Kinds of inner optimizers and of trees


def test_inner_with_another_dtype_than_the_gradients(mechanism):
    del mechanism
    # `apply_if_finite` fails here: its branches have different types.
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    grads = {"w": jnp.full(3, 0.5, jnp.bfloat16)}
    for inner in (
        optax.sgd(jnp.float32(0.1), momentum=0.9),
        optax.adamw(optax.constant_schedule(jnp.float32(0.1)), mu_dtype=jnp.float32),
    ):
        tx: Any = og.guard(inner, clip=1.0)
        state = tx.init(params)
        update = jax.jit(tx.update)
        updates, after = update(grads, state, params)
        expected: Any = inner.update(grads, inner.init(params), params)[0]
        assert updates["w"].dtype == expected["w"].dtype
        zeros, skipped = update({"w": grads["w"] * jnp.nan}, after, params)
        assert zeros["w"].dtype == updates["w"].dtype
        assert same_bits(skipped.wrapped_state, after.wrapped_state)


class GrowingState(NamedTuple):
    """A state whose dtype is another after the first update."""

    last: Any


def test_inner_whose_state_changes_dtype(mechanism):
    del mechanism
    inner: Any = optax.GradientTransformation(
        lambda params: GrowingState(jnp.zeros(3, jnp.bfloat16)),
        lambda updates, state, params=None: (updates, GrowingState(updates["w"])),
    )
    tx: Any = og.guard(inner)
    params = params_of_two()
    _, state = tx.update(BAD[0], tx.init(params), params)
    assert not np.any(state.wrapped_state.last)
    _, state = tx.update(GOOD[0], state, params)
    _, after = tx.update(BAD[0], state, params)
    assert same_bits(after.wrapped_state.last, GOOD[0]["w"])


def test_inner_that_searches_along_a_line(mechanism):
    del mechanism

    def loss(params):
        return jnp.sum((params["w"] - 1.0) ** 4) + params["b"] ** 2

    tx: Any = og.guard(
        optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(5))
    )

    @jax.jit
    def step(params, state, poison):
        value, grads = jax.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda g: g * poison, grads)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    params, state = params_of_two(), tx.init(params_of_two())
    for poison in (1.0, math.nan, 1.0):
        last = params, state
        params, state = step(params, state, poison)
        if math.isnan(poison):
            assert same_bits(params, last[0])
            assert same_bits(state.wrapped_state, last[1].wrapped_state)
    assert loss(params) < loss(params_of_two())


def test_inner_that_wants_the_value_gets_it():
    seen = []

    def update(updates, state, params=None, *, value, lam=None):
        seen.append((value, lam))
        return updates, state

    wanting: Any = update
    inner = optax.GradientTransformationExtraArgs(lambda params: (), wanting)
    tx: Any = og.guard(inner)
    tx.update(GOOD[0], tx.init(GOOD[0]), GOOD[0], value=1.0, lam="text")
    assert seen[0] == (1.0, "text")


def test_integer_parameters_pass(mode):
    inner: Any = optax.masked(optax.adam(0.1), {"i": False, "w": True})
    tx: Any = og.guard(inner, clip=1.0)
    params = {"i": jnp.arange(3), "w": jnp.ones(2)}
    step = jitted(tx, mode)
    good = {"i": jnp.zeros(3, jnp.int32), "w": jnp.ones(2)}
    bad = good | {"w": jnp.array([1.0, jnp.nan])}
    after, state, _ = step(params, tx.init(params), good, 1.0)
    assert same_bits(after["i"], params["i"])
    assert not same_bits(after["w"], params["w"])
    assert same_bits(step(after, state, bad, 1.0)[0], after)


def test_float0_gradients_pass_as_they_do_without_a_guard(mechanism):
    del mechanism
    params = {"i": jnp.arange(3), "w": jnp.ones(2)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    inner: Any = optax.masked(optax.sgd(0.1), {"i": False, "w": True})
    tx: Any = og.guard(inner, clip=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["i"].dtype == jax.dtypes.float0
    assert updates["i"].shape == (3,)
    grads["w"] = grads["w"] * jnp.nan
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["i"].dtype == jax.dtypes.float0
    assert state.num_skipped == 1


def test_empty_tree_is_a_good_step():
    tx: Any = og.guard(optax.adam(0.1), clip=1.0)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.skip_reason == REASON.NONE
    assert og.apply_gradients(tx, {}, state, grads={})[0] == {}


def test_none_leaves_pass(mechanism):
    del mechanism
    tx: Any = og.guard(optax.sgd(1.0), clip=10.0)
    params = {"a": jnp.ones(2), "n": None}
    for mode in ("update", "apply"):
        after, _, _ = jitted(tx, mode)(params, tx.init(params), params, 1.0)
        np.testing.assert_array_equal(after["a"], [0, 0])
        assert after["n"] is None


NESTED = {
    "chained": lambda: optax.chain(optax.identity(), og.guard(optax.adam(0.1), 1.0)),
    "chain inside": lambda: og.guard(
        optax.chain(optax.clip(1.0), optax.adam(0.1), optax.scale(0.5)), 1.0
    ),
    "guard inside": lambda: og.guard(og.guard(optax.adam(0.1), 1.0), 2.0),
    "clip inside": lambda: og.guard(
        optax.chain(og.clip_by_global_norm(1.0), optax.adam(0.1))
    ),
    "masked outside": lambda: optax.masked(
        og.guard(optax.adam(0.1), 1.0), {"b": True, "w": True}
    ),
    "injected": lambda: optax.inject_hyperparams(og.guard, static_args=("inner",))(
        inner=optax.adam(0.1), clip=1.0, max_consecutive_skips=5
    ),
    "apply_if_finite outside": lambda: optax.apply_if_finite(
        og.guard(optax.adam(0.1), 1.0), 3
    ),
    "by value": lambda: og.guard(optax.adam(0.1), og.clip_by_value(0.5)),
    "recorded": lambda: og.guard(optax.adam(0.1), og.record_norm()),
    "scheduled": lambda: og.guard(optax.adam(0.1), optax.linear_schedule(2.0, 1.0, 10)),
}


@pytest.mark.parametrize("mode", ["update", "apply"])
@pytest.mark.parametrize("name", NESTED)
def test_guard_nested_in_other_transformations(name, mode):
    tx = shared(NESTED[name])
    step = jitted(tx, mode)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in (GOOD[0], BAD[0], GOOD[1], BAD[2], GOOD[2]):
        before = params
        params, state, _ = step(params, state, grads, 1.0)
        is_bad = any(grads is bad for bad in BAD)
        assert same_bits(params, before) == is_bad


@pytest.mark.parametrize("name", ["chained", "guard inside", "clip inside"])
def test_apply_gradients_is_update_and_apply_updates(name):
    tx = shared(NESTED[name])
    whole, parts = jitted(tx, "apply"), jitted(tx)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in (GOOD[0], BAD[0], GOOD[1]):
        expected = parts(params, state, grads, 1.0)
        params, state, _ = whole(params, state, grads, 1.0)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            (params, state),
            expected[:2],
        )


def test_apply_gradients_takes_any_optax_transformation():
    params = params_of_two()
    tx: Any = optax.sgd(1.0)
    after, _ = og.apply_gradients(tx, params, tx.init(params), grads=GOOD[0], value=1.0)
    assert same_bits(after, optax.tree.sub(params, GOOD[0]))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    guarded = og.guard(tx)
    cast: Any = og.apply_gradients(guarded, half, guarded.init(half), grads=GOOD[0])[0]
    assert cast["w"].dtype == jnp.bfloat16


# Under JAX's transformations


def loop_over(grads_sequence):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads_sequence)


SEQUENCE = [GOOD[0], BAD[0], GOOD[1], BAD[3], GOOD[2]]


def expected_after(tx, sequence):
    step = jitted(tx, "apply")
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in sequence:
        params, state, _ = step(params, state, grads, 1.0)
    return params, state


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.float64(x), np.float64(y), rtol=rtol, atol=1e-6
        ),
        a,
        b,
    )


@pytest.mark.parametrize("loop", ["scan", "while_loop", "fori_loop"])
def test_guard_in_a_loop_on_the_device(loop, mechanism):
    del mechanism
    tx = shared(adamw)
    stacked = loop_over(SEQUENCE)

    def body(carry, grads):
        params, state = carry
        return og.apply_gradients(
            tx, params, state, grads=grads, value=jnp.float32(1.0)
        )

    def at(i):
        return jax.tree.map(lambda x: x[i], stacked)

    @jax.jit
    def run(carry):
        if loop == "scan":
            return jax.lax.scan(lambda c, g: (body(c, g), None), carry, stacked)[0]
        if loop == "fori_loop":
            return jax.lax.fori_loop(0, 5, lambda i, c: body(c, at(i)), carry)
        return jax.lax.while_loop(
            lambda ic: ic[0] < 5,
            lambda ic: (ic[0] + 1, body(ic[1], at(ic[0]))),
            (0, carry),
        )[1]

    params, state = run((params_of_two(), tx.init(params_of_two())))
    assert state.num_skipped == 2
    assert_close(params, expected_after(tx, SEQUENCE)[0])


def test_members_of_a_population_are_judged_one_by_one(mode):
    tx = shared(adam)
    stacked = loop_over(SEQUENCE)
    many = jax.tree.map(lambda x: jnp.stack([x] * 5), params_of_two())
    states = jax.vmap(tx.init)(many)

    @jax.jit
    @jax.vmap
    def step(params, state, grads):
        if mode == "apply":
            return og.apply_gradients(tx, params, state, grads=grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, states = step(many, states, stacked)
    np.testing.assert_array_equal(states.num_skipped, [0, 1, 0, 1, 0])
    for i, grads in enumerate(SEQUENCE):
        alone = expected_after(tx, [grads])[0]
        assert_close(jax.tree.map(lambda x, i=i: x[i], after), alone)


@pytest.mark.parametrize(("batch", "remat"), [("alone", True), ("vmap", False)])
def test_derivatives_through_a_guarded_step_are_finite(mode, batch, remat):

    def total(scale, size, poison):
        tx: Any = og.guard(optax.sgd(scale, momentum=0.9), clip=1.0)
        params = params_of_two()

        def step(carry, factor):
            params, state = carry
            grads = jax.tree.map(lambda x: x * size * factor, GOOD[0])
            if mode == "apply":
                return og.apply_gradients(tx, params, state, grads=grads), None
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        factors = jnp.stack([jnp.ones_like(poison), poison, jnp.ones_like(poison)])
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), factors)
        return sum(jnp.sum(x) for x in jax.tree.leaves(params))

    total = jax.checkpoint(total) if remat else total
    slope = jax.grad(total)
    slope = jax.vmap(slope) if batch == "vmap" else slope
    sizes = [1.0, 0.0, 1e-3, 1.0, 1.0]
    poisons = [1.0, 1.0, 1.0, math.nan, math.inf]
    run = jax.jit(slope)
    if batch == "vmap":
        slopes = run(jnp.full(5, 0.1), jnp.array(sizes), jnp.array(poisons))
    else:
        pairs = zip(sizes, poisons, strict=True)
        slopes = jnp.stack([run(0.1, size, poison) for size, poison in pairs])
    assert np.all(np.isfinite(slopes))
    # Two steps of length one and two, the second with momentum; three without the gap.
    assert slopes[1] == 0
    np.testing.assert_allclose(slopes[3], slopes[4], rtol=1e-6)
    assert abs(slopes[0]) > abs(slopes[3]) > 0


@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_are_judged_together(mode, check_vma, mesh):
    tx: Any = og.guard(
        optax.adam(0.1), clip=og.clip_by_global_norm(1.0, axis_name="data")
    )
    params = {"w": jnp.arange(16.0)}
    state = tx.init(params)
    specs = jax.tree.map(
        lambda x: P("data") if x.shape == (16,) and x.dtype == jnp.float32 else P(),
        state,
    )
    specs = specs._replace(skip_log=jax.tree.map(lambda x: P(), state.skip_log))

    def step(params, state, grads):
        if mode == "apply":
            return og.apply_gradients(tx, params, state, grads=grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P("data"), specs, P("data")),
            out_specs=(P("data"), specs),
            check_vma=check_vma,
        )
    )
    grads = {"w": jnp.ones(16)}
    after, good = run(params, state, grads)
    assert good.clip_state.stats.grad_norm == 4
    np.testing.assert_allclose(after["w"], params["w"] - 0.1, rtol=1e-4)
    kept, bad = run(after, good, {"w": grads["w"].at[13].set(jnp.nan)})
    assert same_bits(np.asarray(kept["w"]), np.asarray(after["w"]))
    assert bad.num_skipped == 1
    assert bad.skip_log.skipped_leaf[0] == 0


@pytest.mark.parametrize("check_vma", [False, True])
def test_replicated_parameters_under_shard_map(check_vma, mesh):
    # The usual data-parallel step: gradients are averaged, then everything is the same
    # on all devices. The loss too must be, or shards would disagree.
    tx = shared(adam)
    params = params_of_two()

    def step(params, state, batch):
        grads = jax.tree.map(lambda g: jax.lax.pmean(g * batch[0], "data"), GOOD[0])
        value = jax.lax.pmean(batch[0], "data")
        return og.apply_gradients(tx, params, state, grads=grads, value=value)

    run = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    after, state = run(params, tx.init(params), jnp.ones(8))
    assert_close(after, expected_after(tx, [GOOD[0]])[0])
    kept, state = run(after, state, jnp.ones(8).at[3].set(jnp.inf))
    assert same_bits(jax.tree.map(np.asarray, kept), jax.tree.map(np.asarray, after))
    assert state.num_skipped == 1


def test_loss_that_differs_between_devices_is_refused(mesh):
    tx = shared(adam)

    def step(params, batch):
        state = tx.init(params)
        return og.apply_gradients(tx, params, state, grads=GOOD[0], value=batch[0])

    run = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    message = r"`value` must be the same .* axes \('data',\): .* `jax.lax.pmean"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, params_of_two(), jnp.ones(8))


def test_devices_of_pmap_agree():
    tx: Any = og.guard(optax.adam(0.1), clip=og.clip_by_global_norm(1.0, axis_name="d"))
    params = jax.tree.map(lambda x: jnp.stack([x] * 8), params_of_two())
    states = jax.vmap(tx.init)(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        step = jax.pmap(
            lambda p, s, g, tx=tx: og.apply_gradients(tx, p, s, grads=g), axis_name="d"
        )
        grads = jax.tree.map(jnp.ones_like, params)
        after, states = step(params, states, grads)
        np.testing.assert_allclose(
            states.clip_state.stats.grad_norm, 32**0.5, rtol=1e-6
        )
        grads["b"] = grads["b"].at[5].set(jnp.nan)
        kept, states = step(after, states, grads)
    np.testing.assert_array_equal(states.num_skipped, 1)
    assert same_bits(jax.tree.map(np.asarray, kept), jax.tree.map(np.asarray, after))


@pytest.mark.parametrize("is_jitted", [True, False])
def test_explicit_shardings_are_kept(mode, is_jitted, explicit_mesh):
    tx: Any = og.guard(optax.adamw(0.1), clip=1.0)
    sharding = NamedSharding(explicit_mesh, P("data", None))
    params = {"w": jax.device_put(jnp.ones((8, 2)), sharding)}
    state = tx.init(params)

    def step(params, state, grads):
        if mode == "apply":
            return og.apply_gradients(tx, params, state, grads=grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run: Any = jax.jit(step) if is_jitted else step
    grads = jax.tree.map(jnp.ones_like, params)
    after, good = run(params, state, grads)
    assert jax.typeof(after["w"]) == jax.typeof(params["w"])
    assert types_of(good) == types_of(state)
    np.testing.assert_allclose(good.clip_state.stats.grad_norm, 4)
    kept, bad = run(after, good, jax.tree.map(lambda g: g * jnp.nan, grads))
    assert same_bits(kept, after)
    assert same_bits(bad.wrapped_state, good.wrapped_state)


@pytest.mark.parametrize("mode", ["update", "apply"])
def test_sharded_arrays_under_jit_agree_with_one_device(mode, mesh):
    tx: Any = og.guard(optax.adamw(0.1), clip=1.0)
    step = jitted(tx, mode)
    params = {"w": jnp.arange(16.0).reshape(8, 2), "b": jnp.ones(8)}
    grads = jax.tree.map(lambda x: x * 0.3 + 1, params)
    spread = jax.device_put((params, grads), NamedSharding(mesh, P("data")))
    expected, one, _ = step(params, tx.init(params), grads, 1.0)
    after, many, _ = step(spread[0], tx.init(spread[0]), spread[1], 1.0)
    assert_close(after, expected)
    np.testing.assert_allclose(
        many.clip_state.stats.grad_norm, one.clip_state.stats.grad_norm, rtol=1e-6
    )


def test_guarded_step_is_exported_for_all_platforms():
    tx = shared(adam)
    params = params_of_two()
    state = tx.init(params)

    def step(params, leaves, grads):
        state = jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)
        params, state = og.apply_gradients(tx, params, state, grads=grads)
        return params, jax.tree.leaves(state)

    exported = export.export(jax.jit(step), platforms=("cpu", "tpu", "cuda"))(
        params, jax.tree.leaves(state), GOOD[0]
    )
    after, leaves = exported.call(params, jax.tree.leaves(state), GOOD[0])
    assert_close(after, expected_after(tx, [GOOD[0]])[0])
    kept, _ = exported.call(after, leaves, BAD[0])
    assert same_bits(kept, after)


def test_initial_state_and_parameters_can_be_donated(mode):
    tx: Any = og.guard(
        optax.adamw(0.1),
        clip=optax.linear_schedule(2.0, 1.0, 10),
        skip=og.skip.norm_above(100.0),
    )

    def step(params, state, grads):
        if mode == "apply":
            return og.apply_gradients(tx, params, state, grads=grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, donate_argnums=(0, 1))
    params = params_of_two()
    carry = params, tx.init(params)
    for grads in SEQUENCE:
        before = jax.tree.leaves((carry[0], carry[1].wrapped_state))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carry = run(*carry, grads)
        assert all(x.is_deleted() for x in before)
    assert carry[1].num_skipped == 2
    assert_close(carry[0], expected_after(tx, SEQUENCE)[0])


@pytest.mark.parametrize("mode", ["update", "apply"])
def test_step_is_traced_once(mode):
    traces = []
    inner: Any = optax.adamw(0.1)

    def update(updates, state, params=None):
        traces.append(None)
        return inner.update(updates, state, params)

    tx: Any = og.guard(optax.GradientTransformation(inner.init, update), clip=1.0)
    step = jitted(tx, mode)
    params, state = params_of_two(), tx.init(params_of_two())
    for grads in SEQUENCE:
        params, state, _ = step(params, state, grads, jnp.float32(1.0))
    assert len(traces) == 1
