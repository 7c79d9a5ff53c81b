"""Parameters of any kind: models with functions in them, pairs, shapes alone."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._guarding.judging import checked_loss, with_one_loss
from tests.strategies import same_bits, types_of

eqx = pytest.importorskip("equinox")

MODEL: Any = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
TRAINED = eqx.filter(MODEL, eqx.is_inexact_array)
GRADS = jax.tree.map(jnp.ones_like, TRAINED)
LOOSE: Any = og


# Models of Equinox ---------------------------------------------------------------


def test_a_whole_model_does_for_its_parameters():
    txs = [
        og.guard(optax.adamw(0.1), 1.0),
        og.guard(optax.sgd(0.1), og.clip_by_leaf_norm(1.0), max_update=10.0),
        og.guard(optax.sgd(0.1), og.clip_by_unit_norm(0.1)),
    ]

    @jax.jit
    def steps(trained, grads):
        # Functions cannot be arguments, so the model closes over them.
        whole = eqx.combine(trained, MODEL)
        starts = [tx.init(trained) for tx in txs]
        return [
            [tx.update(grads, s, params) for tx, s in zip(txs, starts, strict=True)]
            for params in (whole, trained)
        ]

    found, expected = steps(TRAINED, GRADS)
    assert same_bits(found, expected)
    assert eqx.apply_updates(MODEL, found[0][0]).activation is MODEL.activation


def test_modules_of_settings_are_trees():
    mask = jax.tree.map(lambda x: x.ndim == 2, TRAINED)
    labels = jax.tree.map(lambda x: "wb"[x.ndim == 1], TRAINED)
    assert callable(mask)
    # Of 16 weights of one, clipped to 1, and 5 others.
    by_mask = og.guard(optax.identity(), 1.0, mask=mask)
    by_label = og.guard(
        optax.identity(), og.clip_by_group_norm({"w": 1.0, "b": 99.0}, labels)
    )
    for tx in (by_mask, by_label):
        updates, _ = jax.jit(tx.update)(GRADS, tx.init(TRAINED))
        for layer in updates.layers:
            np.testing.assert_allclose(layer.weight, 0.25, rtol=1e-6)
            np.testing.assert_array_equal(layer.bias, 1.0)
    # A function that JAX can take apart is still a function.
    partial = jax.tree_util.Partial(lambda floor, path: "wb"["bias" in path], 0.5)
    tx: Any = og.clip_by_group_norm({"w": 1.0, "b": 99.0}, partial)
    assert tx.init(TRAINED).group_stats.group_counts.shape == (2, 8)


def test_the_stopper_keeps_the_arrays_of_a_model():
    stopper = og.early_stopping(og.stop.patience(2), average_last=2)
    worse = jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, MODEL)
    state = stopper.update(1.0, stopper.init(MODEL), MODEL)
    state = stopper.update(2.0, state, worse)
    best: Any = stopper.best(state, worse)
    assert best.activation is MODEL.activation
    assert same_bits(eqx.filter(best, eqx.is_array), TRAINED)
    average: Any = stopper.average(state, worse)
    assert average.activation is MODEL.activation
    wanted = jax.tree.map(lambda x: np.float32(x) + 0.5, TRAINED)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        eqx.filter(average, eqx.is_array),
        wanted,
    )


def test_a_skipped_step_keeps_the_arrays_of_a_model():
    model = (MODEL, eqx.nn.Dropout(0.5))
    new = jax.tree.map(lambda x: x * jnp.nan if eqx.is_array(x) else x, model)
    state: Any = og.guard(optax.sgd(0.1)).init(TRAINED)
    counts = state.skip_counts.at[2].set(og.SkipReason.NONFINITE)
    kept = og.keep_if_skipped(state._replace(skip_counts=counts), new, model)
    assert kept[0].activation is MODEL.activation
    assert kept[1].inference is False
    assert same_bits(eqx.filter(kept[0], eqx.is_array), TRAINED)


def test_a_bad_leaf_of_a_model_has_a_name():
    tx: Any = og.guard(optax.sgd(0.1))
    bad = eqx.tree_at(lambda m: m.layers[1].bias, GRADS, jnp.full(1, jnp.nan))
    _, state = tx.update(bad, tx.init(TRAINED))
    assert og.skipped_steps(state, MODEL)[0].leaf == "layers/1/bias"


# Lookahead -----------------------------------------------------------------------


def test_lookahead_is_clipped_by_its_fast_parameters():
    inner = optax.lookahead(optax.sgd(0.5), sync_period=2, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced({"w": jnp.ones(4), "x": jnp.ones(1)})
    grads = {"w": jnp.ones(4), "x": jnp.ones(1)}
    mask = {"w": True, "x": False}
    leaf = og.guard(inner, og.clip_by_leaf_norm(1.0), mask=mask)
    unit = og.guard(inner, og.clip_by_unit_norm(0.5), max_update=99.0)

    @jax.jit
    def two_steps():
        ends = []
        for tx in (og.accumulate(leaf, 1), unit):
            params, state = pair, tx.init(pair)
            for _ in range(2):
                params, state = og.apply_gradients(tx, params, state, grads=grads)
            ends.append((params, og.metrics(state)["num_skipped"]))
        return ends

    # Four entries of one clipped to the norm 1 are halves: fast goes from 1 by 0.25 to
    # 0.5, slow half of the way, and fast is set back to it. What the mask leaves out
    # goes from 1 by 0.5 to 0, and to 0.5.
    [(params, skipped), (by_unit, also)] = two_steps()
    for part in params:
        np.testing.assert_allclose(part["w"], 0.75, rtol=1e-6)
        np.testing.assert_allclose(part["x"], 0.5, rtol=1e-6)
    # By units: gradients of 0.5 times the parameters, 1 and then 0.75.
    for part in by_unit:
        np.testing.assert_allclose(part["w"], 1 - (0.25 + 0.1875) / 2, rtol=1e-6)
    assert skipped == also == 0


# Other trees ---------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    w: Any
    b: Any


class Named(NamedTuple):
    w: Any
    b: Any


class Shaped:
    """What some libraries give for an array: a shape and a dtype, no rank."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, np.dtype(np.float32)


SHAPES = {"w": (2, 3), "b": (3,)}


@pytest.mark.parametrize("make", [Shaped, lambda *s: jax.ShapeDtypeStruct(s, "f4")])
@pytest.mark.parametrize(
    "clip", [og.clip_by_leaf_norm(1.0, layer_axis=0), og.clip_by_unit_norm(0.1)]
)
def test_shapes_alone_make_a_state(make, clip):
    params = {name: make(*shape) for name, shape in SHAPES.items()}
    arrays = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    tx = og.accumulate(og.guard(optax.sgd(0.1, momentum=0.9), clip), 2)
    assert types_of(tx.init(params)) == types_of(tx.init(arrays))


def test_containers_of_any_kind_take_one_step():
    struct = pytest.importorskip("flax.struct")
    nnx = pytest.importorskip("flax.nnx")
    fields = {"__annotations__": {"w": Any, "b": Any}}
    of_flax = struct.dataclass(type("OfFlax", (), fields))
    w, b = jnp.ones((2, 2)), jnp.ones(2)
    # Haiku's dicts have slashes in their keys.
    trees = [
        Record(w, b),
        Named(w, b),
        of_flax(w, b),
        {"mlp/~/linear_0": {"w": w, "b": b}},
        nnx.State({"w": nnx.Param(w), "b": nnx.Param(b)}),
        [w, (b, None)],
    ]
    tx = og.guard(optax.sgd(1.0), og.clip_by_leaf_norm(1.0))

    @jax.jit
    def step(trees):
        return [og.apply_gradients(tx, x, tx.init(x), grads=x)[0] for x in trees]

    for before, after in zip(trees, step(trees), strict=True):
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for x in jax.tree.leaves(after):
            # Ones of norm 2 and of norm sqrt(2), less themselves clipped to norm 1.
            np.testing.assert_allclose(x, 1 - 1 / np.sqrt(x.size), rtol=1e-6)


def test_an_object_with_init_and_update_is_an_optimizer():
    class Halving:
        def init(self, params):
            return ()

        def update(self, updates, state, params=None):
            return jax.tree.map(lambda g: -g / 2, updates), state

    tx: Any = og.guard(LOOSE.guard(Halving()))
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=1.0)
    np.testing.assert_array_equal(updates, -0.5)
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    noting = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = LOOSE.guard(optax.MultiSteps(noting, 1))
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), own="text")
    assert seen[-1] == {"own": "text"}


# The loss ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["value", "loss"])
def test_the_loss_is_one_number_of_any_kind(name):
    for x in (2, 2.0, np.float64(2), np.array([2.0]), jnp.bfloat16(2), jnp.full(1, 2)):
        found = checked_loss({name: x})
        assert found is not None
        assert (found.shape, float(found)) == ((), 2.0)
    for x in (jnp.ones(2), np.ones((1, 1)), 1j):
        with pytest.raises(ValueError, match=f"`{name}` must be one real number"):
            checked_loss({name: x})
    with pytest.raises(TypeError, match=f"`{name}` must be a number"):
        checked_loss({name: [2.0]})
    # An optimizer may take a function by that name.
    assert checked_loss({"loss": jnp.sum}) is None
    assert checked_loss({}) is None


def test_loss_is_judged_and_goes_on_as_it_was_given():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(jax.tree.map(jnp.shape, extra_args))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx: Any = og.guard(inner)
    state = tx.init(jnp.ones(2))
    for loss, skipped in (([1.0], 0), ([np.nan], 1)):
        _, state = tx.update(jnp.ones(2), state, loss=np.array(loss, np.float32))
        assert state.num_skipped == skipped
    assert seen[-1] == {"loss": (1,)}


def test_a_loss_by_both_names_is_one_object():
    tx: Any = og.guard(og.guard(optax.sgd(1.0)))
    state, loss = tx.init(jnp.ones(2)), jnp.float32(jnp.nan)
    _, after = tx.update(jnp.ones(2), state, value=loss, loss=loss)
    assert after.num_skipped == 1
    for other in (tx, og.accumulate(og.guard(optax.sgd(1.0)), 2)):
        with pytest.raises(ValueError, match=r"`value` and `loss` of .* one object"):
            other.update(jnp.ones(2), other.init(jnp.ones(2)), value=loss, loss=1.0)


def test_one_object_goes_on_by_the_names_that_were_given():
    x, y = object(), object()
    for given, loss, wanted in (
        ({"key": 1}, None, {"key": 1}),
        ({"value": x, "key": 1}, None, {"value": x, "key": 1}),
        ({"value": x, "loss": len}, None, {"value": x, "loss": len}),
        ({"value": x, "loss": y, "key": 1}, None, {"value": x, "loss": x, "key": 1}),
        ({"value": x, "loss": x, "key": 1}, y, {"value": y, "loss": y, "key": 1}),
        ({"value": None, "loss": x, "key": 1}, y, {"value": None, "loss": y, "key": 1}),
    ):
        assert with_one_loss(given, loss) == wanted


def test_the_mean_loss_of_a_group_has_the_name_of_the_losses():
    tx: Any = og.accumulate(og.guard(optax.sgd(1.0)), 2)
    update, state, updates = jax.jit(tx.update), tx.init(jnp.ones(2)), None
    # The last micro-batch of the group is bad, the group is not.
    for loss in (3.0, jnp.nan):
        updates, state = update(jnp.ones(2), state, loss=loss)
    assert (state.num_dropped, state.num_skipped, state.value_mean) == (1, 0, 3)
    np.testing.assert_array_equal(updates, -1.0)


# Errors that advise --------------------------------------------------------------


def test_gradients_of_single_examples_are_named_where_they_do_not_fit():
    params, each = jnp.ones(2), jnp.ones((5, 2))
    unit = og.clip_by_unit_norm(0.1)
    with pytest.raises(ValueError, match="single examples have an axis more"):
        unit.update(each, unit.init(params), params)
    group: Any = og.accumulate(og.guard(optax.sgd(1.0)), 2)
    with pytest.raises(ValueError, match="Gradients per example cannot"):
        group.update(each, group.init(params), params)
