"""`optax_guard.flax.TrainState`: Flax's own, but a skipped step changes nothing."""

import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import optax_guard as og
from optax_guard.flax import TrainState

PARAMS = {"kernel": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)}
GOOD = {"kernel": np.array([[3.0, 0.1], [-0.2, 4.0]], np.float32)}
BAD = {"kernel": np.array([[3.0, np.nan], [-0.2, 4.0]], np.float32)}


def params() -> Any:
    return jax.tree.map(jnp.array, PARAMS)


def created(tx, cls: Any = TrainState, **fields):
    return cls.create(apply_fn=str, params=params(), tx=tx, **fields)


# One for all tests: a step is compiled for each optimizer that it meets.
GUARDED = og.guard(optax.adamw(0.1), clip=1.0)


def assert_same(ours, theirs, rtol=0.0):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0)


def random_grads(seed):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(2, 2)).astype(np.float32)}


def test_without_guard_it_is_flaxs_own_bit_for_bit():
    ours = created(optax.adamw(0.1))
    theirs = created(optax.adamw(0.1), train_state.TrainState)
    for seed in range(5):
        ours = ours.apply_gradients(grads=random_grads(seed))
        theirs = theirs.apply_gradients(grads=random_grads(seed))
    assert_same(ours, theirs)


@pytest.mark.parametrize("is_jitted", [True, False])
def test_on_clean_data_the_guard_gives_what_flax_gives_with_optaxs_clip(is_jitted):
    ours = created(GUARDED)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    theirs = created(clipped, train_state.TrainState)

    def step(state, grads):
        return state.apply_gradients(grads=grads)

    step = jax.jit(step) if is_jitted else step
    for seed in range(5):
        ours, theirs = step(ours, random_grads(seed)), step(theirs, random_grads(seed))
    assert_same(ours.params, theirs.params, rtol=1e-6)
    assert int(ours.step) == int(theirs.step) == 5


def test_skipped_step_changes_only_step_and_records():
    before = created(GUARDED).apply_gradients(grads=GOOD)
    after = before.apply_gradients(grads=BAD)
    assert_same(after.params, before.params)
    old, new = (og.find_state(s, og.GuardState) for s in (before, after))
    assert_same(new.wrapped_state, old.wrapped_state)
    assert int(after.step) == 2
    assert int(new.num_skipped) == 1


def test_arguments_that_are_no_fields_reach_the_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda params: (), update)
    created(recorder).apply_gradients(grads=GOOD, value=2.5, key="k", batch_stats=None)
    assert seen == {"value": 2.5, "key": "k"}


def test_nan_loss_given_as_value_skips_the_step():
    state = created(GUARDED).apply_gradients(grads=GOOD, value=jnp.nan)
    assert_same(state.params, PARAMS)


def test_flaxs_own_class_gives_no_loss_and_the_error_names_ours():
    # It would give `value` to `replace`, but the optimizer comes first.
    watching = og.guard(optax.sgd(0.1), skip=og.skip.spike())
    state = created(watching, train_state.TrainState)
    with pytest.raises(TypeError, match=r"take the subclass `optax_guard.flax.Train"):
        state.apply_gradients(grads=GOOD, value=1.0)


def test_flaxs_own_class_with_the_step_written_out_is_ours():
    watching = og.guard(optax.sgd(0.1), skip=og.skip.spike())
    ours, theirs = (
        created(watching, cls, **fields)
        for cls, fields in (
            (Averaged, {"ema_params": params()}),
            (FlaxAveraged, {"ema_params": params()}),
        )
    )

    @jax.jit
    def step(ours, state, grads, loss):
        tx, ema = state.tx, {"kernel": state.ema_params["kernel"] * loss}
        new, opt_state = og.apply_gradients(
            tx, state.params, state.opt_state, grads=grads, value=loss
        )
        ema = og.keep_if_skipped(opt_state, ema, state.ema_params)
        state = state.replace(step=state.step + 1, params=new, opt_state=opt_state)
        state = state.replace(ema_params=ema)
        ema = {"kernel": ours.ema_params["kernel"] * loss}
        return ours.apply_gradients(grads=grads, value=loss, ema_params=ema), state

    for grads, loss in ((GOOD, 2.0), (BAD, 3.0), (GOOD, np.nan), (GOOD, 0.5)):
        ours, theirs = step(ours, theirs, grads, np.float32(loss))
        assert_same(ours, theirs)
    assert int(theirs.opt_state.num_skipped) == 2
    assert_same(theirs.ema_params, params())


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(3)(x))
        return nn.Dense(1)(x)


def batch_norm_step(tx):
    model = Normalized()
    variables = model.init(jax.random.key(0), jnp.ones((4, 2)))
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)

    @jax.jit
    def step(state, x):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, updated = state.apply_fn(variables, x, mutable=["batch_stats"])
            return jnp.mean(y**2), updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, value=loss, batch_stats=stats)

    return state, step


def test_nan_batch_leaves_the_averages_of_batch_norm_alone():
    first, step = batch_norm_step(GUARDED)
    x = jax.random.normal(jax.random.key(1), (4, 2))
    good = step(first, x)
    # The averages do move on a good batch, and only there.
    assert any(
        np.any(x != y)
        for x, y in zip(
            jax.tree.leaves(good.batch_stats),
            jax.tree.leaves(first.batch_stats),
            strict=True,
        )
    )
    bad = step(good, x.at[0, 0].set(jnp.nan))
    assert_same(bad.batch_stats, good.batch_stats)
    assert_same(bad.params, good.params)
    # What comes after is what would have come without the bad batch.
    assert_same(step(bad, x).params, step(good, x).params)


def test_without_guard_a_nan_batch_poisons_the_averages_as_in_flax():
    state, step = batch_norm_step(optax.adamw(0.1))
    state = step(state, jnp.full((4, 2), jnp.nan))
    leaves = jax.tree.leaves(state.batch_stats)
    assert all(np.isnan(leaf).all() for leaf in leaves)


class Averaged(TrainState):
    # No default: a subclass of Flax's may do that, so one of ours may.
    ema_params: Any
    label: str = struct.field(default="", pytree_node=False)


def test_fields_of_a_subclass_are_kept_on_a_skipped_step():
    state = created(GUARDED, Averaged, ema_params=params())
    good = state.apply_gradients(grads=GOOD, ema_params={"kernel": jnp.ones((2, 2))})
    assert_same(good.ema_params, {"kernel": np.ones((2, 2))})
    bad = good.apply_gradients(grads=BAD, ema_params={"kernel": jnp.zeros((2, 2))})
    assert_same(bad.ema_params, {"kernel": np.ones((2, 2))})


def test_fields_outside_of_the_tree_are_replaced_on_any_step():
    state = created(GUARDED, Averaged, ema_params=params())
    assert state.apply_gradients(grads=BAD, label="new").label == "new"


class FlaxAveraged(train_state.TrainState):
    ema_params: Any


class Random(TrainState):
    key: jax.Array


def test_random_keys_given_as_a_field_are_kept_too():
    state = created(GUARDED, Random, key=jax.random.key(0))
    good = state.apply_gradients(grads=GOOD, key=jax.random.key(1))
    bad = good.apply_gradients(grads=BAD, key=jax.random.key(2))
    assert bad.key == jax.random.key(1)


def test_guard_inside_a_chain_is_found():
    tx = optax.chain(optax.identity(), GUARDED)
    state = created(tx, batch_stats=jnp.zeros(()))
    state = state.apply_gradients(grads=BAD, batch_stats=jnp.ones(()))
    assert state.batch_stats == 0
    assert_same(state.params, PARAMS)


def overwriting(value):
    return {OVERWRITE_WITH_GRADIENT: {"scale": jnp.array(value)}}


def test_overwritten_collections_are_those_of_flax():
    fp8: Any = {"params": params(), **overwriting(1.0)}
    grads = {"params": GOOD, **overwriting(7.0)}
    states = [
        cls.create(apply_fn=str, params=fp8, tx=optax.sgd(0.1)).apply_gradients(
            grads=grads
        )
        for cls in (TrainState, train_state.TrainState)
    ]
    assert_same(states[0], states[1])
    assert states[0].params[OVERWRITE_WITH_GRADIENT]["scale"] == 7.0


def test_overwritten_collections_are_kept_on_a_skipped_step():
    fp8: Any = {"params": params(), **overwriting(1.0)}
    state = TrainState.create(apply_fn=str, params=fp8, tx=GUARDED)
    good = state.apply_gradients(grads={"params": GOOD, **overwriting(7.0)})
    bad = good.apply_gradients(grads={"params": BAD, **overwriting(np.nan)})
    assert bad.params[OVERWRITE_WITH_GRADIENT]["scale"] == 7.0
    assert_same(bad.params, good.params)


def test_step_is_traced_once():
    num_traces = 0

    @jax.jit
    def step(state, grads):
        nonlocal num_traces
        num_traces += 1
        return state.apply_gradients(grads=grads, value=1.0)

    state = created(GUARDED, batch_stats={"mean": jnp.zeros(2)})
    for _ in range(3):
        state = step(state, GOOD)
    assert num_traces == 1


def test_state_keeps_its_types():
    before = created(GUARDED, batch_stats={"mean": jnp.zeros(2)})
    stats = {"mean": jnp.ones(2)}
    after = before.apply_gradients(grads=GOOD, value=1.0, batch_stats=stats)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)
    assert jax.typeof(before.step) == jax.typeof(jnp.zeros((), jnp.int32))


@pytest.mark.usefixtures("x64")
def test_step_stays_int32_under_x64():
    state = created(GUARDED)
    assert state.step.dtype == jnp.int32
    assert state.apply_gradients(grads=GOOD).step.dtype == jnp.int32


def test_initial_state_can_be_donated_though_one_tree_is_given_twice():
    shared = params()
    state = Averaged.create(apply_fn=str, params=shared, ema_params=shared, tx=GUARDED)

    def step(state, grads):
        ema = jax.tree.map(lambda e, p: (e + p) / 2, state.ema_params, state.params)
        return state.apply_gradients(grads=grads, ema_params=ema)

    after = jax.jit(step, donate_argnums=0)(state, GOOD)
    assert_same(after.ema_params, PARAMS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.ema_params))


def test_scan_is_the_python_loop():
    def step(state, scale):
        grads = jax.tree.map(lambda g: g * scale, GOOD)
        state = state.apply_gradients(grads=grads, value=scale)
        return state, state.step

    scales = jnp.array([1.0, jnp.nan, 0.01, 2.0])
    scanned, steps = jax.jit(lambda s: jax.lax.scan(step, s, scales))(created(GUARDED))
    looped = created(GUARDED)
    for scale in scales:
        looped, _ = jax.jit(step)(looped, scale)
    assert_same(scanned.params, looped.params, rtol=1e-6)
    assert steps.tolist() == [1, 2, 3, 4]


def test_metrics_skipped_steps_and_find_state_take_the_state():
    state = created(GUARDED).apply_gradients(grads=BAD, value=3.0)
    assert og.metrics(state)["num_skipped"] == 1
    [skipped] = og.skipped_steps(state)
    assert skipped.leaf == "kernel"
    assert skipped.value == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_stat": 1.0},
            "got `batch_stat`, which is not a field of `TrainState`",
        ),
        ({"opt_states": ()}, r"did you mean `opt_state`\?"),
        ({"step": 3}, "multiple values for keyword argument 'step'"),
    ],
)
def test_misspelt_and_computed_fields_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        created(GUARDED).apply_gradients(grads=GOOD, **arguments)


def test_batch_stats_without_initial_ones_are_refused():
    message = r"`batch_stats` must keep its structure.*`create\(..., batch_stats=...\)`"
    with pytest.raises(ValueError, match=message):
        created(GUARDED).apply_gradients(grads=GOOD, batch_stats={"mean": 1.0})


def test_without_flax_the_import_names_the_extra():
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import optax_guard\n"
        "try: import optax_guard.flax\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "pip install 'optax-guard[flax]'" in result.stdout
