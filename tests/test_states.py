"""States are good citizens: read through, mapped like parameters, and partitioned."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_guard as og
from tests.strategies import same_bits

PARAMS = {"a": jnp.ones((2, 2)), "b": {"c": jnp.ones(3), "hole": None}}
INJECTED = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
GUARDED = og.guard(INJECTED, clip=1e3)


# Read through --------------------------------------------------------------------

NAMES = ("hyperparams", "count", "mini_step", "gradient_step", "nu", "no_such", "_x")


@pytest.mark.parametrize(
    "plain",
    [INJECTED, optax.MultiSteps(INJECTED, 2), optax.scale_by_adam()],
    ids=["injected", "MultiSteps", "adam"],
)
def test_a_guard_has_the_attributes_of_what_it_wraps(plain):
    inside, state = plain.init(PARAMS), og.guard(plain).init(PARAMS)
    around = og.accumulate(og.guard(plain), 2).init(PARAMS)
    for name in NAMES:
        # A tuple has a method of that name, which is no attribute of an optimizer.
        expected = hasattr(inside, name) and not callable(getattr(inside, name))
        assert hasattr(state, name) == expected
        if expected:
            assert same_bits(getattr(state, name), getattr(inside, name))
            assert same_bits(getattr(around, name), getattr(inside, name))


def test_attributes_that_nobody_has_are_none():
    for state in (og.guard(optax.adam(0.1)).init(PARAMS), GUARDED.init(PARAMS)):
        for name in ("hyperparms", "__array__", "_asdict_", "index"):
            assert not hasattr(state, name)
    # Nor is the method of a tuple of states the count of an optimizer.
    assert not hasattr(og.guard(optax.adam(0.1)).init(PARAMS), "count")
    with pytest.raises(AttributeError, match=r"`GuardState` has no .* `hyperparms`"):
        getattr(GUARDED.init(PARAMS), "hyperparms")  # noqa: B009 - pyright knows none


def test_states_are_copied_pickled_and_restored_as_before():
    serialization = pytest.importorskip("flax.serialization")
    for tx in (GUARDED, og.accumulate(GUARDED, 2)):
        state = tx.init(PARAMS)
        saved = serialization.to_bytes(state)
        for other in (
            copy.copy(state),
            copy.deepcopy(state),
            pickle.loads(pickle.dumps(state)),
            serialization.from_bytes(state, saved),
        ):
            assert jax.tree.structure(other) == jax.tree.structure(state)
            assert same_bits(other, state)
        assert optax.tree.get(state, "learning_rate") == np.float32(0.1)
        assert len(optax.tree.get_all_with_path(state, "count")) == 1


def test_a_loop_sets_a_rate_and_asks_for_counts_as_before():
    tx: Any = og.accumulate(GUARDED, 2)
    multi = optax.MultiSteps(optax.sgd(0.1), 2)
    update = jax.jit(tx.update)
    grads, state = jnp.ones(2), tx.init(jnp.ones(2))
    seen = []
    for bad in (1.0, 1.0, jnp.nan, jnp.nan, 1.0):
        state.hyperparams["learning_rate"] = jnp.float32(0.25)
        updates, state = update(grads * bad, state)
        counts = state.mini_step, state.gradient_step, state.count, state.num_updates
        seen.append((*map(int, counts), bool(multi.has_updated(state)), updates[0]))
    # Two groups close: a step of -0.25, and one that is skipped. `count` then waits.
    assert seen == [
        (1, 0, 0, 0, False, 0.0),
        (0, 1, 1, 1, True, -0.25),
        (1, 1, 1, 1, False, 0.0),
        (0, 2, 1, 2, True, 0.0),
        (1, 2, 1, 2, False, 0.0),
    ]


# Mapped and partitioned ----------------------------------------------------------

SPECS = {"a": P("x"), "b": {"c": P("y"), "hole": None}}
ZSCORE = og.threshold.zscore()


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


CLIPS: dict[str, Any] = {
    "global": ZSCORE,
    "leaf": og.clip_by_leaf_norm(ZSCORE, record_quantiles=True),
    "layer": og.clip_by_leaf_norm(1.0, layer_axis=0),
    "function": og.clip_by_group_norm({"a": 1.0, "b": ZSCORE}, lambda path: path[0]),
    "labels": og.clip_by_group_norm({"x": 1.0, "y": 2.0}, {"a": "x", "b": "y"}),
    "unit": og.clip_by_unit_norm(ZSCORE),
    "value": og.clip_by_value(1.0),
}


def transformations_of(scope: str) -> list[Any]:
    clip: Any = CLIPS[scope]
    bound = CLIPS["leaf"] if scope in ("unit", "labels") else clip
    mask = {"a": True, "b": scope in ("function", "labels")}
    guards = [
        og.guard(optax.adam(0.1), clip),
        og.guard(optax.adam(0.1), clip, mask=mask, max_update=bound),
        og.guard(optax.adam(0.1), clip, mask=lambda tree: mask),
    ]
    return [*guards, og.accumulate(guards[1], 2)]


@pytest.mark.parametrize("scope", CLIPS)
def test_trees_like_the_parameters_are_mapped_with_their_specs(scope):
    txs = transformations_of(scope)
    accumulated, masks_nothing = txs[-1], scope in ("function", "labels")
    for tx in txs:
        state = jax.eval_shape(tx.init, PARAMS)
        found: Any = optax.tree.map_params(
            tx,
            lambda x, spec: x if is_masked(x) else spec,
            state,
            SPECS,
            transform_non_params=lambda _: P(),
            # As for `optax.masked`: where the mask is false there is no accumulator.
            is_leaf=is_masked,
        )
        assert jax.tree.structure(found) == jax.tree.structure(state)
        num_like = 2 if tx is not accumulated else 3
        num_y = num_like - (tx is accumulated and not masks_nothing)
        assert jax.tree.leaves(found).count(P("x")) == num_like
        assert jax.tree.leaves(found).count(P("y")) == num_y
        assert optax.tree.get(found, "mu") == optax.tree.get(found, "nu") == SPECS
        if tx is accumulated and masks_nothing:
            assert found.grad_mean == SPECS
        # Without specs, all else stays.
        marked = optax.tree.map_params(tx, lambda _: "here", state)
        assert jax.tree.structure(marked) == jax.tree.structure(state)
        assert jax.tree.leaves(marked).count("here") == num_like + num_y


def test_boxes_of_flax_give_the_specs_of_their_moments():
    nn = pytest.importorskip("flax.linen")
    boxed = {
        "kernel": nn.Partitioned(jnp.ones((2, 2)), names=(None, "model")),
        "bias": nn.LogicallyPartitioned(jnp.ones(2), names=("mlp",)),
    }
    for clip in (1.0, CLIPS["leaf"], CLIPS["unit"]):
        tx = og.accumulate(og.guard(optax.sgd(0.1, momentum=0.9), clip), 2)
        state = jax.eval_shape(tx.init, boxed)
        specs = nn.get_partition_spec(state)
        wanted = {"kernel": P(None, "model"), "bias": P("mlp")}
        assert specs.grad_mean == wanted
        assert optax.tree.get(specs, "trace") == wanted
        others = [x for x in jax.tree.leaves(specs) if x not in wanted.values()]
        assert set(others) == {P()}
        on_mesh = nn.logical_to_mesh(specs, [("mlp", "model"), ("model", "model")])
        assert on_mesh.grad_mean["bias"] == P("model")


def test_an_optimizer_of_nnx_is_partitioned_as_its_parameters():
    nnx = pytest.importorskip("flax.nnx")
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        init = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
        model = nnx.Linear(2, 2, kernel_init=init, rngs=nnx.Rngs(0))
        tx = og.guard(optax.sgd(0.1, momentum=0.9), CLIPS["leaf"])
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        specs = nnx.get_partition_spec(nnx.state(optimizer))
    found = {
        jax.tree_util.keystr(path): spec
        for path, spec in jax.tree.leaves_with_path(specs)
    }
    sharded = [path for path, spec in found.items() if spec == P(None, "model")]
    assert len(sharded) == 1
    assert "trace" in sharded[0]
    assert "kernel" in sharded[0]


def test_names_of_no_groups_fit_all_others_and_others_only_their_own():
    clip = CLIPS["leaf"]
    none, one, two = (
        jax.tree.structure(clip.init(dict.fromkeys(names, jnp.ones(1))))
        for names in ("", "a", "ab")
    )
    assert none == one
    assert none == two
    assert one != two
