"""Trees split over devices, by the compiler or by hand: the answers of one device."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from tests.strategies import (
    f32,
    in_force,
    same_bits,
    true_norm,
    types_of,
    unlike_lowest_jax,
)

RNG = np.random.default_rng(0)
SHAPES = {
    "bias": (4,),
    "cols": (8, 4),
    "expert": (8, 3),
    "layers": (4, 6, 2),
    "rows": (6, 8),
    "scale": (),
}
PARAMS = {k: f32(RNG.normal(size=s)) for k, s in SHAPES.items()}
CLEAN = {k: f32(RNG.normal(size=s)) for k, s in SHAPES.items()}
# What single devices have: column- and row-parallel matrices, experts, stacked layers
# of a pipeline, and what all have.
TENSOR = {
    "bias": P(),
    "cols": P(None, "model"),
    "expert": P("data"),
    "layers": P("data", None, "model"),
    "rows": P("model"),
    "scale": P(),
}
FSDP = {
    "bias": P("data"),
    "cols": P(("data", "model")),
    "expert": P(("data", "model")),
    "layers": P("data"),
    "rows": P(None, ("data", "model")),
    "scale": P(),
}
NAMES = ("data", "model")


def with_entry(grads: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    changed = {k: x.copy() for k, x in grads.items()}
    changed[name].reshape(-1)[-1] = value
    return changed


# Learnt from twice, skipped by a rule, taken, skipped for one entry of one device.
SEQUENCE = [
    CLEAN,
    {k: 1.1 * x for k, x in CLEAN.items()},
    {k: 30 * x for k, x in CLEAN.items()},
    {k: 0.9 * x for k, x in CLEAN.items()},
    CLEAN,
    with_entry(CLEAN, "expert", math.nan),
]
SKIPPED = [False, False, True, False, False, True]
LOSSES = f32([3.0, 2.0, 2.5, 1.0, 1.5, 1.2])


def layer_axis(path: str) -> int | None:
    return 0 if path == "layers" else None


def unit_axis(path: str) -> Any:
    return (1, 2) if path == "layers" else None


def group_of(path: str) -> str:
    return "matrices" if path in ("cols", "rows") else "rest"


def transformations(axis_name: Any) -> dict[str, Any]:
    """Every scope, norm and preset, every threshold and rule in one of them."""
    over = {"axis_name": axis_name}
    relative = og.threshold.relative_to_mean(warmup=2)
    groups = {"matrices": og.threshold.quantile(0.5, warmup=1), "rest": 1.0}
    watch = ("grad_norm", "value")
    spike = og.skip.spike(3.0, window=4, min_history=2, watch=watch)
    rules = [spike, og.skip.norm_above(1e3)]
    clip = og.clip_by_global_norm(og.threshold.zscore(max_norm=2.0), **over)
    return {
        "norm": og.guard(optax.sgd(0.1, momentum=0.5), clip, skip=rules),
        "norm 1": og.clip_by_global_norm(2.0, ord=1, **over),
        "norm inf": og.clip_by_global_norm(0.5, ord=math.inf, **over),
        "norm 3": og.clip_by_global_norm(1.0, ord=3, **over),
        "record": og.record_norm(**over),
        "value": og.clip_by_value(0.5, **over),
        "leaf": og.clip_by_leaf_norm(relative, layer_axis=layer_axis, **over),
        "group": og.clip_by_group_norm(groups, group_of, **over),
        "unit": og.clip_by_unit_norm(0.5, axis=unit_axis, **over),
        "zclip": og.zclip(warmup_steps=2, **over),
        "autoclip": og.autoclip(50.0, **over),
        "adagc": og.adagc(warmup_steps=3, **over),
    }


# Programs this small run no faster for what LLVM does to them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
STOPPER = og.early_stopping(og.stop.patience(2))


def start(txs: dict[str, Any], params: Any) -> Any:
    """What a run carries: parameters and state of each, and of stopping."""
    carry = {name: (params, tx.init(params)) for name, tx in txs.items()}
    return carry, STOPPER.init(params)


def run(txs: dict[str, Any], carry: Any, sequence: Any) -> Any:
    """The carry after the last step, and after each, stacked."""

    def step(carry: Any, batch: Any) -> Any:
        (runs, stop), (grads, loss) = carry, batch
        new = {}
        for name, tx in txs.items():
            params, state = runs[name]
            new[name] = og.apply_gradients(tx, params, state, grads=grads, value=loss)
        carry = new, STOPPER.update(loss, stop, new["norm"][0])
        return carry, carry

    return jax.lax.scan(step, carry, (sequence, LOSSES))


STACKED = jax.tree.map(lambda *x: np.stack(x), *SEQUENCE)


@functools.cache
def on_one_device() -> Any:
    """The run after each step, checked against float64."""
    txs = transformations(None)
    _, found = jit(functools.partial(run, txs))(start(txs, PARAMS), STACKED)
    found = jax.device_get(found)
    check_against_float64([jax.tree.map(lambda x, i=i: x[i], found) for i in range(6)])
    return found


def clipped(x: Any, limit: float, norm: float) -> np.ndarray:
    return np.asarray(x, np.float64) * min(1.0, limit / norm)


def units_clipped(name: str) -> np.ndarray:
    x, w = (np.asarray(tree[name], np.float64) for tree in (CLEAN, PARAMS))
    reduced: dict[str, Any] = {"layers": (1, 2), "scale": ()}
    axes = reduced.get(name, (0,))
    limit = 0.5 * np.maximum(np.sqrt(np.sum(w**2, axes, keepdims=True)), 1e-3)
    return x * np.minimum(1, limit / np.sqrt(np.sum(x**2, axes, keepdims=True)))


def check_against_float64(found: list[Any]) -> None:
    """What steps did to the gradient, the norms, the verdicts, the stop."""
    expected: dict[str, Callable[[str, Any], Any]] = {
        "norm": lambda _, x: -0.1 * clipped(x, 2.0, true_norm(CLEAN)),
        "norm 1": lambda _, x: clipped(x, 2.0, true_norm(CLEAN, 1)),
        "norm inf": lambda _, x: clipped(x, 0.5, true_norm(CLEAN, math.inf)),
        "norm 3": lambda _, x: clipped(x, 1.0, true_norm(CLEAN, 3)),
        "record": lambda _, x: x,
        "value": lambda _, x: np.clip(x, -0.5, 0.5),
        "unit": lambda k, _: units_clipped(k),
    }
    for name, of in expected.items():
        for k, x in CLEAN.items():
            moved = found[0][0][name][0][k] - np.asarray(PARAMS[k], float)
            np.testing.assert_allclose(moved, of(k, x), rtol=1e-4, atol=1e-5)
    orders = {"norm 1": 1, "norm inf": math.inf, "norm 3": 3}
    for i, grads in enumerate(SEQUENCE):
        runs, _ = found[i]
        guard = runs["norm"][1]
        assert (guard.skip_reason > 0) == SKIPPED[i]
        for name, (_, state) in runs.items():
            stats = og.find_state(state, og.NormStats)
            norm = true_norm(grads, orders.get(name, 2))
            if math.isfinite(norm):
                np.testing.assert_allclose(stats.grad_norm, norm, rtol=1e-6)
            assert stats.num_nonfinite == (i == 5)
    # The third, too large, after two that presets learn from.
    mean, deviation = 1.05 * true_norm(CLEAN), 0.05 * true_norm(CLEAN)
    excess = 30 * true_norm(CLEAN) - mean
    for name, norm in {
        "zclip": mean + (2.5 * deviation) ** 2 / excess,
        "autoclip": 1.1 * true_norm(CLEAN),
        # Warm-up left leaves as they were in a tree of norm one.
        "adagc": 1.05,
    }.items():
        stats = og.find_state(found[2][0][name][1], og.NormStats)
        rtol = 0.01 if name == "autoclip" else 1e-5
        np.testing.assert_allclose(stats.clipped_norm, norm, rtol=rtol)
    runs, stop = found[-1]
    leaf = runs["norm"][1].skip_log.skipped_leaf[1]
    assert leaf == list(SHAPES).index("expert")
    assert og.leaf_norms(runs["leaf"][1])["layers/2"] == pytest.approx(
        true_norm(CLEAN["layers"][2]), rel=1e-6
    )
    assert (stop.best_value, bool(stop.should_stop)) == (1.0, True)
    assert same_bits(stop.best_params, found[3][0]["norm"][0])


def assert_as_on_one_device(carry: Any, expected: Any) -> None:
    assert jax.tree.structure(carry) == jax.tree.structure(expected)
    for got, wanted in zip(*map(jax.tree.leaves, (carry, expected)), strict=True):
        # Where each device tells, all must tell the same.
        wanted = np.broadcast_to(wanted, np.shape(got))
        np.testing.assert_allclose(np.asarray(got), wanted, rtol=3e-5, atol=1e-6)


def grid(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), NAMES, axis_types=(kind, kind))


def put(tree: Any, mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs
    )


def own_records(carry: Any) -> Any:
    """All of the states but for what is shaped like parameters."""
    states = {name: state for name, (_, state) in carry[0].items()}
    states["norm"] = states["norm"]._replace(wrapped_state=())
    return states, carry[1]._replace(best_params=())


# By the compiler ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "specs", "grad_specs"),
    [
        pytest.param(
            *(AxisType.Auto, FSDP, TENSOR),
            marks=unlike_lowest_jax("XLA splits a record over devices"),
        ),
        (AxisType.Explicit, TENSOR, TENSOR),
    ],
    ids=["gradients unlike parameters", "explicit"],
)
def test_compiler_gives_what_one_device_does(kind, specs, grad_specs):
    mesh = grid(kind)
    txs = transformations(None)
    # Without `axis_name` these are scopes and thresholds of others.
    left_out = ["zclip", "autoclip", "adagc"]
    if kind is AxisType.Explicit:
        # These take the norm as others do.
        left_out += ["record", "norm 1", "norm inf", "norm 3"]
    txs = {name: tx for name, tx in txs.items() if name not in left_out}
    grad_specs = {name: P(None, *spec) for name, spec in grad_specs.items()}
    with in_force(mesh):
        carry = jit(functools.partial(start, txs))(put(PARAMS, mesh, specs))
        grads = put(STACKED, mesh, grad_specs)
        last, found = jit(functools.partial(run, txs))(carry, grads)
        runs, stop = on_one_device()
        assert_as_on_one_device(found, ({name: runs[name] for name in txs}, stop))
        assert types_of(last) == types_of(carry)
        before, after = map(jax.tree.leaves, map(own_records, (carry, last)))
        for x, y in zip(before, after, strict=True):
            assert x.sharding.is_fully_replicated
            assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_outside_of_jit_explicit_shardings_are_kept():
    mesh = grid(AxisType.Explicit)
    with in_force(mesh):
        params, grads, specs = (
            {k: tree[k] for k in ("cols", "expert")} for tree in (PARAMS, CLEAN, TENSOR)
        )
        params, grads = put((params, grads), mesh, (specs, specs))
        tx: Any = og.guard(optax.sgd(1.0), og.clip_by_unit_norm(0.5))
        updates, state = tx.update(grads, tx.init(params), params)
        assert types_of(updates) == types_of(grads)
        assert types_of(state) == types_of(tx.init(params))
        for k, x in updates.items():
            np.testing.assert_allclose(x, -units_clipped(k), rtol=1e-5)


def test_init_needs_no_values():
    abstract = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()}
    for tx in transformations(None).values():
        wanted = types_of(tx.init(PARAMS))
        assert types_of(tx.init(abstract)) == wanted
        assert types_of(jax.eval_shape(tx.init, abstract)) == wanted


# By hand ------------------------------------------------------------------------


def is_like_params(x: Any) -> bool:
    return isinstance(x, dict) and all(
        isinstance(v, jax.ShapeDtypeStruct) for v in x.values()
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_give_what_one_device_does(check_vma):
    # Specs as they are given to `shard_map`, or a function that looks them up.
    txs = transformations(TENSOR if check_vma else TENSOR.get)
    if not check_vma:
        # Types are all that differs: that is seen where all else is at its hardest.
        txs = {name: txs[name] for name in ("norm", "unit")}
    # Without checks nobody says that what is replicated is: all devices tell.
    records = P() if check_vma else P(NAMES)
    carry = jax.eval_shape(functools.partial(start, txs), PARAMS)
    stacked = {name: P(None, *spec) for name, spec in TENSOR.items()}
    specs = jax.tree.map(
        lambda x: stacked if is_like_params(x) else records,
        carry,
        is_leaf=is_like_params,
    )

    def found(params: Any, sequence: Any) -> Any:
        _, found = run(txs, start(txs, params), sequence)
        return jax.tree.map(lambda x, s: x[None] if s == P(NAMES) else x, found, specs)

    mapped = jax.shard_map(
        found,
        mesh=grid(AxisType.Auto),
        in_specs=(TENSOR, stacked),
        out_specs=specs,
        check_vma=check_vma,
    )
    runs, stop = on_one_device()
    expected = {name: runs[name] for name in txs}, stop
    assert_as_on_one_device(jit(mapped)(PARAMS, STACKED), expected)


def test_shards_drop_a_micro_batch_together_and_take_the_step_of_the_others():
    clip = og.clip_by_global_norm(2.0, axis_name=TENSOR)
    tx: Any = og.accumulate(og.guard(optax.sgd(0.1), clip), 2)

    def accumulated(params: Any, sequence: Any) -> Any:
        def step(carry: Any, grads: Any) -> Any:
            return og.apply_gradients(tx, carry[0], carry[1], grads=grads), None

        params, state = jax.lax.scan(step, (params, tx.init(params)), sequence)[0]
        stats = og.find_state(state, og.NormStats)
        return params, state.num_dropped, stats.grad_norm

    stacked = {name: P(None, *spec) for name, spec in TENSOR.items()}
    mapped = by_shards(
        accumulated, in_specs=(TENSOR, stacked), out_specs=(TENSOR, P(), P())
    )
    params, num_dropped, norm = mapped(PARAMS, STACKED)
    assert num_dropped == 1
    assert norm == pytest.approx(true_norm(CLEAN), rel=1e-6)
    # All three means are multiples of one gradient, and clipped.
    for k, x in CLEAN.items():
        expected = PARAMS[k] - 3 * 0.1 * clipped(x, 2.0, true_norm(CLEAN))
        np.testing.assert_allclose(params[k], expected, rtol=1e-5, atol=1e-6)


def by_shards(f: Callable[..., Any], check_vma: bool = True, **kwargs: Any) -> Any:
    """`f` of gradients on each device."""
    settings = {"mesh": grid(AxisType.Auto), "in_specs": (TENSOR,), "out_specs": P()}
    return jit(jax.shard_map(f, check_vma=check_vma, **(settings | kwargs)))


def test_with_checks_names_count_once_what_does_not_vary():
    norm: Any = og.record_norm(axis_name=list(NAMES))
    value: Any = og.clip_by_value(0.5, axis_name=NAMES)

    def states(grads: Any) -> Any:
        return [tx.update(grads, tx.init(grads))[1] for tx in (norm, value)]

    watched, state = by_shards(states)(CLEAN)
    for stats in (watched.stats, state.stats):
        assert stats.grad_norm == pytest.approx(true_norm(CLEAN), rel=1e-6)
    entries = np.concatenate([x.ravel() for x in CLEAN.values()])
    share = np.mean(np.abs(entries) > 0.5)
    assert state.entries_clipped == pytest.approx(share, rel=1e-6)


def test_function_says_over_which_axis_of_pmap_a_leaf_is_split():
    tx: Any = og.guard(
        optax.sgd(1.0),
        og.clip_by_global_norm(
            1.0, axis_name=lambda path: None if path == "bias" else "d"
        ),
    )
    grads = {
        "bias": np.tile(f32([3.0, 4.0]), (8, 1)),
        "expert": f32(RNG.normal(size=(8, 5))),
    }
    whole = {"bias": grads["bias"][0], "expert": grads["expert"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        step = jax.pmap(lambda g: tx.update(g, tx.init(g)), axis_name="d")
        updates, state = step(grads)
        norm = true_norm(whole)
        np.testing.assert_allclose(state.clip_state.stats.grad_norm, norm, rtol=1e-6)
        for k, x in updates.items():
            np.testing.assert_allclose(x, -clipped(grads[k], 1.0, norm), rtol=1e-5)
        grads["expert"][6, 2] = math.inf
        updates, state = step(grads)
    np.testing.assert_array_equal(state.num_skipped, 1)
    np.testing.assert_array_equal(state.skip_log.skipped_leaf[:, 0], 1)
    assert not any(map(np.any, updates.values()))


def test_each_set_of_axes_has_its_own_sum():
    tx: Any = og.record_norm(axis_name=TENSOR)
    mapped = by_shards(
        lambda grads: tx.update(grads, tx.init(grads))[1].stats.grad_norm
    )
    text = mapped.lower(CLEAN).as_text()
    # Over data, over model and over both; what all have is not sent.
    assert len(set(re.findall(r"replica_groups = (.*?)}>", text))) == 3


FORGETFUL = {
    "guard": lambda: og.guard(optax.sgd(0.1), 1.0),
    "watching guard": lambda: og.guard(optax.sgd(0.1)),
    "norm": lambda: og.clip_by_global_norm(1.0),
    "value": lambda: og.clip_by_value(1.0),
    "leaf": lambda: og.clip_by_leaf_norm(1.0),
    "group": lambda: og.clip_by_group_norm({"all": 1.0}, "all"),
    "unit": lambda: og.clip_by_unit_norm(1.0),
    "zclip": og.zclip,
    "autoclip": og.autoclip,
    "adagc": og.adagc,
    "one of two axes": lambda: og.clip_by_global_norm(1.0, axis_name="data"),
    "spec of another": lambda: og.record_norm(axis_name=TENSOR | {"cols": P("data")}),
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_forgotten_axis_is_an_error(name):
    tx: Any = FORGETFUL[name]()
    where = "'cols' varies over 'model', got (None|'data'|P)"
    with pytest.raises(ValueError, match=where) as error:
        jax.eval_shape(by_shards(lambda g: tx.update(g, tx.init(g), g)), CLEAN)
    assert "clip=clip_by_global_norm(max_norm, axis_name='model')" in str(error.value)
    assert "record_norm(axis_name='model')" in str(error.value)


def test_function_is_taken_for_no_schedule_under_inject_hyperparams_if_static():
    inject = optax.inject_hyperparams(og.clip_by_global_norm, static_args="axis_name")
    tx: Any = inject(1.0, axis_name=TENSOR.get)
    jax.eval_shape(by_shards(lambda g: tx.update(g, tx.init(g))[1]), CLEAN)


def test_each_device_goes_its_own_way_when_told_to():
    tx = og.guard(optax.sgd(1.0), og.clip_by_global_norm(1.0, axis_name=()))

    def members(grads: Any) -> Any:
        return tx.update(grads, tx.init(grads), value=grads[0])[0]

    grads = f32(RNG.normal(size=(16,)))
    grads[3] = math.nan
    out = by_shards(members, in_specs=P(NAMES), out_specs=P(NAMES))(grads)
    for i, (x, y) in enumerate(
        zip(grads.reshape(8, 2), out.reshape(8, 2), strict=True)
    ):
        wanted = 0 * y if i == 1 else -clipped(x, 1.0, true_norm(x))
        np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_loss_of_one_device_is_an_error():
    tx = og.guard(optax.sgd(1.0), og.clip_by_global_norm(1.0, axis_name=TENSOR))

    def step(grads: Any) -> Any:
        return tx.update(grads, tx.init(grads), value=grads["expert"][0, 0])[1]

    with pytest.raises(ValueError, match=r"`value` must be the same.*\('data',\)"):
        jax.eval_shape(by_shards(step), CLEAN)


def test_what_is_no_axis_is_an_error():
    for axis_name, error, match in [
        ({"cols": "model"}, TypeError, "`axis_name` must be a name or names"),
        ({"cols": P("model")}, ValueError, "`axis_name` must be a function"),
        (TENSOR | {"bias": P(None, "data")}, ValueError, "at most one entry for each"),
    ]:
        tx = og.clip_by_leaf_norm(1.0, axis_name=axis_name)
        with pytest.raises(error, match=match):
            tx.update(CLEAN, tx.init(CLEAN))
