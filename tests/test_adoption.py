"""A run in progress moves into the guard and out of it, and goes on bit for bit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from tests.strategies import same_bits, types_of

ADAMW = optax.adamw(optax.cosine_decay_schedule(0.1, 20), weight_decay=0.1)
CLIPPED = optax.chain(optax.clip_by_global_norm(1e3), ADAMW)
# Above all norms of the run.
GUARDED = og.guard(ADAMW, clip=1e3)
ACCUMULATED = og.accumulate(GUARDED, 1)
LOOSE: Any = og


def params() -> dict[str, jax.Array]:
    return {"b": jnp.array(0.5), "w": jnp.arange(16.0).reshape(8, 2) / 8}


def gradients(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {k: rng.normal(size=x.shape).astype(np.float32) for k, x in SHAPES.items()}


SHAPES = jax.eval_shape(params)


@functools.cache
def stepper(tx: Any, is_donated: bool = False) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1) if is_donated else ())
    def step(params, state, grads):
        return og.apply_gradients(tx, params, state, grads=grads)

    return step


def go_on(tx: Any, params: Any, state: Any, steps: range, is_donated: bool = False):
    for step in steps:
        params, state = stepper(tx, is_donated)(params, state, gradients(step))
    return params, state


@functools.cache
def unguarded(num_steps: int) -> Any:
    """The trajectory that no guard has seen."""
    return go_on(ADAMW, params(), ADAMW.init(params()), range(num_steps))


def inside_and_outside(tx: Any, plain: Any) -> Any:
    """Three steps without the guard, three with it, two without."""
    weights, state = go_on(plain, params(), plain.init(params()), range(3))
    state = og.wrap_state(tx, weights, state)
    assert types_of(state) == types_of(tx.init(weights))
    weights, state = go_on(tx, weights, state, range(3, 6))
    assert og.metrics(state)["num_updates"] == 3
    return go_on(plain, weights, og.unwrap_state(state), range(6, 8))


# Compilers round a step with a guard and one without differently, unless all products
# are exact, as by powers of two.
EXACT = optax.sgd(0.125, momentum=0.5)
EXACT_GUARDED = og.guard(EXACT, clip=1e3)


@pytest.mark.parametrize("is_accumulated", [False, True])
def test_run_goes_on_inside_and_outside_bit_for_bit(is_accumulated):
    tx = og.accumulate(EXACT_GUARDED, 1) if is_accumulated else EXACT_GUARDED
    expected = go_on(EXACT, params(), EXACT.init(params()), range(8))
    assert same_bits(inside_and_outside(tx, EXACT), expected)


def test_run_of_adamw_goes_on_inside_and_outside():
    found = inside_and_outside(GUARDED, ADAMW)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        found,
        unguarded(8),
    )
    assert types_of(found) == types_of(unguarded(8))


def test_a_clip_of_optax_around_is_left_out():
    weights, state = unguarded(3)
    inside = og.unwrap_state(
        og.wrap_state(GUARDED, weights, (optax.EmptyState(), state))
    )
    assert same_bits(inside, state)
    # What is the same on both sides stays.
    kept = (optax.EmptyState(), state)
    assert same_bits(
        og.unwrap_state(og.wrap_state(og.guard(CLIPPED), weights, kept)), kept
    )
    # A chain that is written out.
    parts = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))
    written_out = optax.chain(
        optax.clip(1.0), optax.scale_by_adam(), optax.scale(-0.1)
    ).init(weights)
    found = og.unwrap_state(og.wrap_state(og.guard(parts), weights, written_out))
    assert same_bits(found, parts.init(weights))


TRACE = optax.sgd(0.1, momentum=0.5)
CLIP = optax.clip_by_global_norm(1e3)
HALF = {"b": True, "w": False}
LABELS = {"b": "x", "w": "y"}


def injected(*before: Any) -> Any:
    def build(learning_rate):
        return optax.chain(*before, optax.sgd(learning_rate, momentum=0.5))

    # A chain of one is a tuple of one.
    return optax.inject_hyperparams(build)(0.1)


def parts(*before: Any) -> Any:
    return optax.partition({"x": optax.chain(*before, TRACE), "y": CLIP}, LABELS)


# The optimizer of an old run, and that in the guard.
OLD: dict[str, tuple[Any, Any]] = {
    "chain": (optax.chain(CLIP, TRACE), TRACE),
    "masked clip": (optax.chain(optax.masked(CLIP, HALF), TRACE), TRACE),
    "injected clip": (
        optax.chain(optax.inject_hyperparams(optax.clip)(max_delta=1.0), TRACE),
        TRACE,
    ),
    "clip of this library": (optax.chain(og.clip_by_value(1.0), TRACE), TRACE),
    "injected, as before": (injected(CLIP), injected()),
    "injected": (injected(CLIP), TRACE),
    "if finite": (optax.apply_if_finite(optax.chain(CLIP, TRACE), 5), TRACE),
    "clip, if finite": (optax.chain(CLIP, optax.apply_if_finite(TRACE, 5)), TRACE),
    "mask": (
        optax.masked(optax.chain(CLIP, TRACE), HALF),
        optax.masked(TRACE, HALF),
    ),
    "partition": (parts(CLIP), parts()),
    "micro-batches": (optax.MultiSteps(optax.chain(CLIP, TRACE), 2), TRACE),
}


@pytest.mark.parametrize("name", OLD)
def test_what_was_around_an_optimizer_is_left_out_and_its_moments_stay(name):
    before, inside = OLD[name]
    old = jax.tree.map(lambda x: x + 3, before.init(params()))
    tx = og.guard(inside, clip=1e3)
    if name == "micro-batches":
        tx = og.accumulate(tx, 2)
    state = og.wrap_state(tx, params(), old)
    assert types_of(state) == types_of(tx.init(params()))
    trace = optax.tree.get(state, "trace")
    assert same_bits(trace["b"], jnp.float32(3))
    if name == "micro-batches":
        # A function for `every_k` counts on.
        assert (state.gradient_step, state.mini_step) == (3, 0)


def test_an_old_state_dict_of_flax_is_restored_by_its_own_target_first():
    serialization = pytest.importorskip("flax.serialization")
    old, guarded = optax.chain(CLIP, TRACE), og.guard(TRACE, clip=1e3)
    saved = serialization.to_state_dict(old.init(params()))
    with pytest.raises(ValueError, match="The field names"):
        serialization.from_state_dict(guarded.init(params()), saved)
    state = serialization.from_state_dict(old.init(params()), saved)
    state = og.wrap_state(guarded, params(), state)
    assert types_of(state) == types_of(guarded.init(params()))


def test_arrays_are_taken_over_and_no_two_leaves_share_one():
    weights, state = unguarded(3)
    wrapped = og.wrap_state(ACCUMULATED, weights, state)
    pairs = zip(
        jax.tree.leaves(og.unwrap_state(wrapped)), jax.tree.leaves(state), strict=True
    )
    assert all(x is y for x, y in pairs)
    leaves = jax.tree.leaves((weights, wrapped))
    addresses = {x.unsafe_buffer_pointer() for x in leaves}
    assert len(addresses) == len(leaves)


def test_under_jit_moments_are_not_copied():
    wrap = jax.jit(lambda p, s: og.wrap_state(GUARDED, p, s), donate_argnums=1)
    size = 1 << 16
    weights = jax.ShapeDtypeStruct((size,), jnp.float32)
    state = jax.eval_shape(ADAMW.init, weights)
    memory: Any = wrap.lower(weights, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * size
    assert memory.temp_size_in_bytes < size


def without(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: leaf for key, leaf in tree.items() if key != name}


def misfits() -> dict[str, tuple[Any, str]]:
    weights: Any = params()
    plain: Any = ADAMW.init(weights)
    wide = weights | {"w": jnp.zeros((8, 3))}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    nested = optax.MultiSteps(ADAMW, 2).init(weights)
    # With a state of its own, which would be lost.
    counting = optax.chain(optax.zero_nans(), ADAMW).init(weights)
    return {
        "a chain": (counting, r"`0/count` is not there.*same chain"),
        "shape": (
            ADAMW.init(wide),
            r"`0/mu/w` is float32\[8, 3\], and should be float32\[8, 2\]",
        ),
        "dtype": (ADAMW.init(half), r"`0/mu/b` is bfloat16\[\], .* float32\[\]"),
        "a part": (ADAMW.init(without(weights, "w")), r"`0/mu/w` is not there"),
        "another": (
            optax.sgd(0.1, momentum=0.9).init(weights),
            r"`0/count` is not there, and should be int32\[\].*same chain",
        ),
        "inside of a clip": (CLIPPED.init(wide), r"`0/mu/w` is float32\[8, 3\]"),
        "guarded": (GUARDED.init(weights), r"`old_opt_state.wrapped_state`"),
        "in MultiSteps": (nested, r"`old_opt_state.inner_opt_state`"),
        "a list": (
            list(plain),
            r"it is PyTreeDef\(\[.*not PyTreeDef\(.*with its own target",
        ),
    }


@pytest.mark.parametrize("name", list(misfits()))
def test_what_does_not_fit_is_named(name):
    state, message = misfits()[name]
    with pytest.raises(ValueError, match=f"(?s)`old_opt_state` must be .*{message}"):
        og.wrap_state(GUARDED, params(), state)


def test_the_guard_must_be_outermost():
    weights = params()
    tx = optax.chain(GUARDED, optax.identity())
    for outer in (tx, ADAMW):
        with pytest.raises(TypeError, match="`tx` must be a `guard`"):
            og.wrap_state(outer, weights, ADAMW.init(weights))
    multi = optax.MultiSteps(GUARDED, 2).init(weights)
    for state in (ADAMW.init(weights), multi):
        with pytest.raises(ValueError, match="`opt_state` must be the state of a `g"):
            og.unwrap_state(state)


def test_train_state_and_nnx_optimizer_are_unwrapped():
    weights = params()
    flax = pytest.importorskip("optax_guard.flax")
    nnx = pytest.importorskip("flax.nnx")
    state = flax.TrainState.create(apply_fn=str, params=weights, tx=GUARDED)
    assert same_bits(og.unwrap_state(state), ADAMW.init(weights))
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, GUARDED, wrt=nnx.Param)
    count = og.unwrap_state(optimizer)[0].count
    assert isinstance(count, jax.Array)
    assert count == 0


# Checkpoints -------------------------------------------------------------------


def test_sharded_checkpoints_of_orbax_go_both_ways(tmp_path, mesh):
    ocp = pytest.importorskip("orbax.checkpoint")
    whole, split = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), ("data",)))

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, split if np.shape(x) == (8, 2) else whole), tree
        )

    def through_disk(name, tree, like):
        def target(x):
            sharding = split if x.shape == (8, 2) else whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
            checkpointer.wait_until_finished()
            return checkpointer.restore(tmp_path / name, jax.tree.map(target, like))

    weights = placed(params())
    plain = weights, placed(EXACT.init(weights))
    kinds = jax.eval_shape(lambda p: (p, EXACT.init(p)), weights)
    weights, state = go_on(EXACT, *plain, range(3))
    expected = go_on(EXACT, weights, state, range(3, 9))
    # A plain run is saved, and goes on guarded, donated.
    weights, state = through_disk("plain", (weights, state), kinds)
    state = placed(og.wrap_state(EXACT_GUARDED, weights, state))
    kinds = jax.eval_shape(lambda p: (p, EXACT_GUARDED.init(p)), weights)
    weights, state = go_on(EXACT_GUARDED, weights, state, range(3, 6), is_donated=True)
    # That is saved, and goes on plain.
    weights, state = through_disk("guarded", (weights, state), kinds)
    assert og.metrics(state)["num_updates"] == 3
    found = go_on(EXACT, weights, og.unwrap_state(state), range(6, 9))
    assert same_bits(found, expected)
    assert found[0]["w"].sharding.is_equivalent_to(split, 2)
    assert found[1][0].trace["w"].sharding.is_equivalent_to(split, 2)
