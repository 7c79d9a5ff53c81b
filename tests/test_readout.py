"""Reading the state: finding it, metrics, exhaustion, skipped steps."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._rows import replace_entries

PARAMS = {
    "head": {"bias": jnp.ones(1), "kernel": jnp.ones((2, 1))},
    "rest": jnp.ones(3),
}
# Each of the leaves, in their order.
PATHS = ["head/bias", "head/kernel", "rest"]
ALL = {"head": {"bias": True, "kernel": True}, "rest": True}
REST = {"head": {"bias": False, "kernel": False}, "rest": True}
GOOD = jax.tree.map(jnp.zeros_like, PARAMS) | {"rest": jnp.array([0.0, 3.0, 4.0])}


def bad(leaf: int, entry: float = math.nan) -> Any:
    leaves, structure = jax.tree.flatten(GOOD)
    leaves[leaf] = leaves[leaf].at[-1].set(entry)
    return jax.tree.unflatten(structure, leaves)


SGD = optax.sgd(0.1)
# One for all tests: outside of `jit`, a step is compiled for each guard that there is.
GUARD = og.guard(SGD, clip=1.0)


def stepped(tx: Any, *sequence: Any, **extra: Any) -> Any:
    """The optimizer's state after updates."""
    state = tx.init(PARAMS)
    update = jax.jit(optax.with_extra_args_support(tx).update)
    for grads in sequence:
        _, state = update(grads, state, PARAMS, **extra)
    return state


# Where a guard may be.
PLACES: dict[str, Callable[[], Any]] = {
    "guard": lambda: GUARD,
    "chain": lambda: optax.chain(optax.identity(), optax.chain(GUARD)),
    "named chain": lambda: optax.named_chain(("first", GUARD), ("last", SGD)),
    "masked": lambda: optax.masked(GUARD, ALL),
    "partition": lambda: optax.partition(
        {"a": GUARD, "b": SGD}, jax.tree.map(lambda x: "a", PARAMS)
    ),
    "MultiSteps": lambda: optax.MultiSteps(GUARD, 1).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda max_norm: og.guard(SGD, clip=max_norm)
    )(1.0),
    "apply_if_finite": lambda: optax.apply_if_finite(GUARD, 3),
    "guard in a guard": lambda: og.guard(optax.chain(og.record_norm(), SGD), clip=1.0),
}


# Finding -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
@pytest.mark.parametrize("place", PLACES)
def test_state_and_metrics_are_found_wherever_they_are(place):
    state = stepped(PLACES[place](), GOOD)
    found = og.find_state(state, og.GuardState)
    assert isinstance(found.clip_state, og.ClipByNormState)
    assert og.find_states(state, og.NormStats)[0].grad_norm == 5
    metrics = og.metrics(state)
    assert {k: float(metrics[k]) for k in ("grad_norm", "clipped_norm")} == {
        "grad_norm": 5,
        "clipped_norm": 1,
    }
    assert metrics["clip_rate"] == metrics["num_updates"] == 1
    assert metrics["skip_rate"] == metrics["num_skipped"] == 0


CLIPS: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(og.clip_by_global_norm(1.0), SGD),
    "guard": lambda: og.guard(SGD, og.clip_by_global_norm(1.0)),
    "inner of a guard": lambda: og.guard(optax.chain(og.clip_by_global_norm(1.0), SGD)),
    "masked": lambda: optax.masked(og.clip_by_global_norm(1.0), REST),
    "MultiSteps": lambda: optax.MultiSteps(og.clip_by_global_norm(1.0), 1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(og.clip_by_global_norm)(1.0),
}


@pytest.mark.parametrize("place", CLIPS)
def test_state_of_a_clip_is_found_wherever_it_is(place):
    state = og.find_state(CLIPS[place]().init(PARAMS), og.ClipByNormState)
    assert isinstance(state.stats, og.NormStats)


def test_states_come_outermost_first_and_in_the_order_of_the_chain():
    tx = optax.chain(
        og.guard(og.guard(SGD, max_consecutive_skips=1), max_consecutive_skips=2),
        og.clip_by_value(1.0),
        og.guard(SGD, max_consecutive_skips=3),
    )
    state = stepped(tx, bad(0))
    kinds = [
        type(s) for s in og.find_states(state, (og.GuardState, og.ClipByValueState))
    ]
    assert kinds == [og.GuardState, og.GuardState, og.ClipByValueState, og.GuardState]
    outer, inner, last = og.find_states(state, og.GuardState)
    # The outer one kept the step from the inner one, and sent zeros to the last.
    assert [int(s.num_skipped) for s in (outer, inner, last)] == [1, 0, 0]


def test_nothing_found_is_an_empty_list():
    assert og.find_states(SGD.init(PARAMS), og.GuardState) == []
    assert og.find_states({}, og.GuardState) == []
    assert og.find_states(None, og.GuardState) == []


def test_one_of_several_classes_is_found():
    loose: Any = og
    state = stepped(og.clip_by_value(1.0), GOOD)
    found = loose.find_state(state, (og.ClipByNormState, og.ClipByValueState))
    assert isinstance(found, og.ClipByValueState)


def test_states_are_found_while_traced():
    tx = GUARD
    norm = jax.jit(lambda s: og.find_state(s, og.GuardState).clip_state.stats.grad_norm)
    assert norm(stepped(tx, GOOD)) == 5


# Metrics -----------------------------------------------------------------------

NAMES_OF_CLIP = [
    "grad_norm",
    "clipped_norm",
    "clip_threshold",
    "norm_mean",
    "norm_std",
    "norm_max",
    "num_updates",
    "clip_rate",
    "nonfinite_rate",
]
NAMES_OF_GUARD = [
    "num_skipped",
    "skip_rate",
    "skip_streak",
    "skip_reason",
    "guard_exhausted",
]


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (og.clip_by_global_norm(1.0), NAMES_OF_CLIP),
        (og.record_norm(), NAMES_OF_CLIP),
        (og.clip_by_value(1.0), [*NAMES_OF_CLIP, "entries_clipped", "update_cosine"]),
        (GUARD, NAMES_OF_CLIP + NAMES_OF_GUARD),
    ],
    ids=["norm", "record", "value", "guard"],
)
def test_names_of_metrics_are_stable(tx, names):
    """They are in users' logs: add new ones, never rename."""
    metrics = og.metrics(tx.init(PARAMS))
    assert set(names) <= set(metrics)
    # Numbers of the host, read once.
    assert all(isinstance(x, np.generic) and x.shape == () for x in metrics.values())
    assert set(og.metrics(stepped(tx, GOOD))) == set(metrics)


def test_metrics_are_right_before_and_after_updates():
    metrics = og.metrics(GUARD.init(PARAMS))
    for name in ("clip_rate", "nonfinite_rate", "skip_rate", "norm_std", "num_updates"):
        assert metrics[name] == 0, name
    small = jax.tree.map(lambda x: x * 0.1, GOOD)
    metrics = og.metrics(stepped(GUARD, GOOD, small, bad(0), bad(1)))
    expected = {
        "clip_rate": 0.25,
        "nonfinite_rate": 0.5,
        "skip_rate": 0.5,
        "num_updates": 4,
        "num_skipped": 2,
        "skip_streak": 2,
        "skip_reason": og.SkipReason.NONFINITE,
        "guard_exhausted": False,
        "clip_threshold": 1,
        "norm_max": 5,
    }
    assert {k: metrics[k].item() for k in expected} == expected
    # Weights 0.99 and 1 of norms 5 and 0.5.
    mean = (0.99 * 5 + 0.5) / 1.99
    var = (0.99 * (5 - mean) ** 2 + (0.5 - mean) ** 2) / 1.99
    assert float(metrics["norm_mean"]) == pytest.approx(mean, rel=1e-6)
    assert float(metrics["norm_std"]) == pytest.approx(var**0.5, rel=1e-6)
    assert math.isnan(metrics["grad_norm"])


def test_several_clips_are_told_apart_by_suffixes():
    tx = optax.chain(
        og.clip_by_value(2.0), og.clip_by_global_norm(1.0), SGD, og.record_norm()
    )
    metrics = og.metrics(stepped(tx, GOOD))
    norms = [float(metrics["grad_norm" + suffix]) for suffix in ("", "_1", "_2")]
    # By value 0 2 2, then of length one, then times the learning rate.
    np.testing.assert_allclose(norms, [5, 8**0.5, 0.1], rtol=1e-6)
    assert "update_cosine" in metrics
    assert "update_cosine_1" not in metrics
    assert "grad_norm_3" not in metrics


def test_several_guards_are_told_apart_by_suffixes():
    tx = og.guard(og.guard(SGD), clip=1.0)
    metrics = og.metrics(stepped(tx, GOOD, bad(2)))
    assert (metrics["num_skipped"], metrics["num_skipped_1"]) == (1, 0)
    assert (metrics["num_updates"], metrics["num_updates_1"]) == (2, 1)
    assert (metrics["grad_norm_1"], metrics["clip_threshold"]) == (1, 1)


def test_metrics_inside_a_step_survive_the_donation_of_its_state():
    def step(params: Any, state: Any, grads: Any) -> Any:
        params, state = og.apply_gradients(GUARD, params, state, grads=grads)
        return params, state, og.metrics(state)

    run = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, PARAMS), GUARD.init(PARAMS)
    logged = []
    for grads in (GOOD, bad(0), GOOD):
        params, state, metrics = run(params, state, grads)
        logged.append(metrics)
    assert [int(m["num_skipped"]) for m in logged] == [0, 1, 1]
    assert [int(m["num_updates"]) for m in logged] == [1, 2, 3]


def test_metrics_outside_a_step_survive_the_donation_of_their_state():
    run = jax.jit(lambda g, s: GUARD.update(g, s)[1], donate_argnums=1)
    state = GUARD.init(PARAMS)
    before = og.metrics(state)
    state = run(GOOD, state)
    assert before["num_updates"] == 0
    assert og.metrics(state)["num_updates"] == 1


def test_metrics_of_a_population_are_one_a_member():
    many = jax.tree.map(lambda *x: jnp.stack(x), GOOD, bad(0), GOOD)
    states = jax.vmap(GUARD.init)(many)
    states = jax.jit(jax.vmap(lambda g, s: GUARD.update(g, s)[1]))(many, states)
    np.testing.assert_array_equal(og.metrics(states)["num_skipped"], [0, 1, 0])
    with pytest.raises(ValueError, match=r"`state` must be .*one run.*\(3,\)"):
        og.skipped_steps(states)
    one = jax.tree.map(lambda x: x[1], states)
    assert og.skipped_steps(one, PARAMS)[0].leaf == PATHS[0]


# Exhaustion --------------------------------------------------------------------


def test_exhaustion_raises_and_says_where_to_look():
    tx = og.guard(SGD, max_consecutive_skips=2)
    og.raise_if_exhausted(og.metrics(stepped(tx, bad(0), GOOD, bad(0))))
    metrics = og.metrics(stepped(tx, GOOD, bad(0), bad(1), bad(0)))
    message = r"last 3 step\(s\) in a row, the last for NONFINITE.*`skipped_steps\("
    with pytest.raises(og.GuardExhaustedError, match=message):
        og.raise_if_exhausted(metrics)
    # What a logger gave back, too.
    with pytest.raises(og.GuardExhaustedError, match=message):
        og.raise_if_exhausted({k: v.item() for k, v in metrics.items()})


def test_exhaustion_of_any_guard_raises():
    first = og.guard(SGD, max_consecutive_skips=5)
    second = og.guard(SGD, max_consecutive_skips=1)
    tx = optax.partition(
        {"first": first, "second": second}, {"head": "first", "rest": "second"}
    )
    with pytest.raises(og.GuardExhaustedError, match=r"last 1 step"):
        og.raise_if_exhausted(og.metrics(stepped(tx, bad(2))))
    og.raise_if_exhausted(og.metrics(stepped(tx, bad(0))))


def test_exhaustion_of_a_member_of_a_population_raises():
    tx = og.guard(SGD, max_consecutive_skips=1)
    many = jax.tree.map(lambda *x: jnp.stack(x), GOOD, bad(0))
    states = jax.vmap(tx.init)(many)
    states = jax.jit(jax.vmap(lambda g, s: tx.update(g, s)[1]))(many, states)
    with pytest.raises(og.GuardExhaustedError, match="NONFINITE"):
        og.raise_if_exhausted(og.metrics(states))


# Skipped steps --------------------------------------------------------------------


@pytest.mark.parametrize("leaf", range(3))
def test_skipped_steps_name_the_first_bad_leaf(leaf):
    state = stepped(GUARD, GOOD, bad(leaf, math.inf), value=jnp.float32(0.5))
    [row] = og.skipped_steps(state, PARAMS)
    finite = [PATHS[i] for i in (leaf - 1, leaf + 1) if i in range(3)]
    around = {PATHS[leaf]: "Inf", **dict.fromkeys(finite, "finite")}
    leaves = tuple(sorted(around.items()))
    expected = og.SkippedStep(
        1, math.inf, 0.5, og.SkipReason.NONFINITE, PATHS[leaf], leaves
    )
    assert row == expected
    # Without parameters there are no names.
    nameless = expected._replace(leaf=leaf, leaves=((leaf, "Inf"),))
    assert og.skipped_steps(state) == [nameless]


def test_nothing_skipped_is_an_empty_list():
    assert og.skipped_steps(GUARD.init(PARAMS), PARAMS) == []
    assert og.skipped_steps(stepped(GUARD, GOOD, GOOD), PARAMS) == []


def test_rejection_of_a_loss_or_by_a_rule_names_no_leaf():
    state = stepped(GUARD, GOOD, value=jnp.float32(math.nan))
    [row] = og.skipped_steps(state, PARAMS)
    assert (row.reason, row.leaf) == (og.SkipReason.NONFINITE_VALUE, None)
    assert math.isnan(row.value)
    assert row.grad_norm == 5
    [row] = og.skipped_steps(
        stepped(og.guard(SGD, skip=og.skip.norm_above(2.0)), GOOD), PARAMS
    )
    assert row[:2] == (0, 5.0)
    assert (row.reason, row.leaf) == (og.SkipReason.NORM_ABOVE, None)
    assert math.isnan(row.value)


@pytest.mark.parametrize("count", [15, 16, 17, 40])
def test_the_last_sixteen_skipped_steps_are_kept(count):
    def body(state: Any, i: Any) -> Any:
        grads = GOOD | {"rest": jnp.full(3, jnp.nan)}
        return GUARD.update(grads, state, value=i)[1], None

    run = jax.jit(lambda s, i: jax.lax.scan(body, s, i)[0])
    rows = og.skipped_steps(run(GUARD.init(PARAMS), jnp.arange(count) * 1.0), PARAMS)
    kept = list(range(max(0, count - 16), count))
    assert [row.update for row in rows] == kept
    assert [row.value for row in rows] == kept
    assert {row.leaf for row in rows} == {PATHS[2]}


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(GUARD, REST),
        optax.partition({"a": GUARD, "b": SGD}, {"head": "b", "rest": "a"}),
    ],
    ids=["masked", "partition"],
)
def test_leaf_of_a_part_of_the_parameters_is_an_index_not_a_wrong_name(tx):
    # To the guard, the third leaf is the first.
    [row] = og.skipped_steps(stepped(tx, bad(2)), PARAMS)
    assert row.leaf == 0


def test_leaf_is_an_index_where_gradients_lack_leaves_of_the_parameters():
    grads = GOOD | {"head": {"bias": None, "kernel": bad(1)["head"]["kernel"]}}
    params = PARAMS | {"head": {"bias": None, "kernel": PARAMS["head"]["kernel"]}}
    tx = og.guard(optax.identity())
    state = tx.init(params)
    _, state = tx.update(grads, state)
    assert og.skipped_steps(state, PARAMS)[0].leaf == 0
    assert og.skipped_steps(state, params)[0].leaf == PATHS[1]


def test_names_are_right_under_a_mask_that_is_all_true():
    [row] = og.skipped_steps(stepped(optax.masked(GUARD, ALL), bad(1)), PARAMS)
    assert row.leaf == PATHS[1]


def test_leaves_without_gradients_do_not_shift_names():
    params = {"a": jnp.arange(3), "b": jnp.ones(2), "c": jnp.ones(2)}
    grads = {"a": jnp.arange(3), "b": jnp.ones(2), "c": jnp.array([1.0, jnp.nan])}
    tx = og.guard(optax.identity())
    _, state = tx.update(grads, tx.init(params))
    assert og.skipped_steps(state, params)[0].leaf == "c"


def test_leaf_among_very_many_is_named_as_a_run_that_holds_it():
    params = {f"{i:03}": jnp.zeros(()) for i in range(300)}
    state: Any = GUARD.init(params)
    # As a step would leave it; compiling one of 600 reductions takes long.
    log = replace_entries(state.skip_log, skipped_num_leaves=jnp.full(16, 300))
    run = 150 // 32
    log = log._replace(skipped_leaves=log.skipped_leaves.at[:, 0].set(1 << run))
    state = replace_entries(state._replace(skip_log=log), num_skipped=1)
    leaf = og.skipped_steps(state, params)[0].leaf
    assert isinstance(leaf, str)
    first, last = leaf.split(" to ")
    assert first <= "150" <= last
    assert int(last) - int(first) < 32


# Flax --------------------------------------------------------------------------


def test_train_state_is_read_as_it_is():
    flax = pytest.importorskip("optax_guard.flax")
    state = flax.TrainState.create(apply_fn=str, params=PARAMS, tx=GUARD)
    state = state.apply_gradients(grads=GOOD)
    state = state.apply_gradients(grads=bad(1), value=0.25)
    assert og.find_state(state, og.GuardState).num_skipped == 1
    assert og.metrics(state)["skip_rate"] == 0.5
    assert math.isnan(og.metrics(state)["grad_norm"])
    [row] = og.skipped_steps(state)
    assert (row.update, row.value, row.leaf) == (1, 0.25, PATHS[1])
    # Other parameters may be given, for other names.
    assert og.skipped_steps(state, [0.0, 0.0, 0.0])[0].leaf == "1"


def test_nnx_optimizer_is_read_as_it_is():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, GUARD, wrt=nnx.Param)
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    grads["kernel"] = grads["kernel"].replace(jnp.array([[3.0], [jnp.nan]]))
    optimizer.update(model, grads, value=jnp.float32(0.25))
    found = og.find_state(optimizer, og.GuardState)
    # Plain arrays, not variables.
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    assert og.metrics(optimizer)["num_skipped"] == 1
    [row] = og.skipped_steps(optimizer, nnx.state(model, nnx.Param))
    assert row.value == 0.25
    assert "kernel" in str(row.leaf)
