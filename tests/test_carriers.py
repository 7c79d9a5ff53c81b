"""Loops take NNX, Equinox and NamedTuples as they take a `TrainState`; and averages.

The oracles are loops of Flax, Equinox and Optax alone over the good batches, and plain
float64.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_guard as og
from optax_guard.flax import Checkpointer, Rewind, TrainState, fit, load_best
from optax_guard.loops import train_on_device, train_population

INNER = optax.adamw(0.05)
GUARDED = og.guard(INNER, clip=1.0)
PLAIN = optax.chain(optax.clip_by_global_norm(1.0), INNER)
BAD_STEP, NUM_STEPS = 2, 6
LENGTH: Any = {"num_steps": NUM_STEPS, "eval_every": 2}
DATA = np.random.default_rng(0).normal(size=(NUM_STEPS, 4, 2)).astype(np.float32)
GOOD = [i for i in range(NUM_STEPS) if i != BAD_STEP]
PATIENT = og.early_stopping(og.stop.patience(9), average_last=2)


def batches(step):
    return jnp.where(jnp.equal(step, BAD_STEP), jnp.nan, jnp.asarray(DATA)[step])


def same(x, y, **bounds):
    got, wanted = (jax.tree.leaves(tree) for tree in (x, y))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **bounds)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def mean_of(trees):
    return jax.tree.map(lambda *x: np.mean(np.array(x, np.float64), 0), *trees)


# NNX -------------------------------------------------------------------------------


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(x))


class Objects(NamedTuple):
    optimizer: Any
    model: Any
    metrics: Any
    rngs: Any


def objects(tx):
    model = Normalized(nnx.Rngs(0))
    return Objects(
        nnx.Optimizer(model, tx, wrt=nnx.Param),
        model,
        nnx.MultiMetric(loss=nnx.metrics.Average("loss")),
        nnx.Rngs(1),
    )


def nnx_step(state, x):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(state.model)
    state.optimizer.update(state.model, grads, value=loss)
    state.metrics.update(loss=loss)
    state.rngs.default()
    return state, loss


def nnx_value(state):
    state.model.eval()  # Of the run's model it would change the form.
    return jnp.mean((state.model(DATA[0]) - 1) ** 2)


def pure(node, kind: Any = ...):
    return nnx.to_pure_dict(nnx.state(node, kind))


@pytest.fixture(scope="module")
def fitted():
    given = objects(GUARDED)
    result = fit(
        given, nnx_step, batches, evaluate=nnx_value, stopper=PATIENT, **LENGTH
    )
    return given, result


def test_run_of_nnx_is_flaxs_own_over_the_good_batches(fitted):
    given, result = fitted
    theirs = objects(PLAIN)

    @nnx.jit
    def step(state, x):
        return nnx_step(state, x)[1]

    losses, evaluated = [], []
    for i in GOOD:
        losses.append(step(theirs, DATA[i]))
        if i % 2 == 1:
            evaluated.append(pure(theirs.model, nnx.Param))
    assert isinstance(result.state, Objects)
    # The parameters, and the batch statistics.
    same(pure(result.state.model), pure(theirs.model), **CLOSE)
    np.testing.assert_allclose(
        result.state.metrics.compute()["loss"], np.mean(losses), rtol=1e-5
    )
    # Three evaluations are the block of two that was full last, and one since then.
    same(result.average_params, mean_of(evaluated), **CLOSE)
    # A skipped step draws new numbers, and counts.
    assert result.state.rngs.default.count[...] == NUM_STEPS
    assert result.state.optimizer.step[...] == NUM_STEPS
    assert result.history[-1]["num_skipped"] == 1
    # What was given is as it was.
    same(pure(given.model), pure(objects(PLAIN).model))
    assert given.optimizer.step[...] == 0


def test_best_of_nnx_gives_the_best_value(fitted):
    _, result = fitted
    model = result.state.model
    nnx.update(model, result.best_params)
    nnx.update(model, result.best_batch_stats)
    best = min(row["value"] for row in result.history)
    np.testing.assert_allclose(nnx_value(result.state), best, rtol=1e-6)


def test_run_of_nnx_resumes_and_its_best_is_on_disk(fitted, tmp_path):
    _, whole = fitted

    def part(num_steps):
        return fit(
            objects(GUARDED),
            nnx_step,
            batches,
            num_steps=num_steps,
            eval_every=2,
            evaluate=nnx_value,
            stopper=PATIENT,
            checkpointer=Checkpointer(tmp_path),
        )

    part(4)
    result = part(NUM_STEPS)
    assert result.history == whole.history
    same(result.average_params, whole.average_params, rtol=0)
    for part_of in ("model", "metrics"):
        ours, wanted = (pure(getattr(x.state, part_of)) for x in (result, whole))
        same(ours, wanted, rtol=0)
    assert result.state.rngs.default.count[...] == NUM_STEPS
    same(load_best(tmp_path)["params"], nnx.to_pure_dict(result.best_params), rtol=0)


def test_nnx_on_the_device_is_nnx_on_the_host(fitted):
    _, host = fitted
    device = train_on_device(
        objects(GUARDED),
        nnx_step,
        batches,
        evaluate=nnx_value,
        stopper=PATIENT,
        **LENGTH,
    )
    same(pure(device.state.model), pure(host.state.model), **CLOSE)
    same(device.best_params, host.best_params, **CLOSE)
    same(device.average_params, host.average_params, **CLOSE)


def test_state_of_nnx_that_cannot_be_carried_is_refused():
    _, model, metrics, _ = objects(GUARDED)
    optimizer = nnx.Optimizer(model, GUARDED, wrt=nnx.Param)
    unclear = optimizer, model, Normalized(nnx.Rngs(1))
    with pytest.raises(ValueError, match="one that a NamedTuple or dict calls `model`"):
        fit(unclear, nnx_step, batches, **LENGTH)
    other = nnx.Optimizer(model, GUARDED, wrt=nnx.LoRAParam)
    with pytest.raises(ValueError, match="without a variable for its optimizer"):
        fit((model, other), nnx_step, batches, **LENGTH)
    for wrong in (lambda state, x: (metrics, 0.0), lambda state, x: (state[:2], 0.0)):
        with pytest.raises(TypeError, match="must return the objects that it was g"):
            fit(objects(GUARDED), wrong, batches, **LENGTH)


# Equinox and NamedTuples -----------------------------------------------------------


class Training(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def network(tx):
    # Its leaves are arrays, functions, a number and a flag.
    mlp = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    model = eqx.nn.Sequential([mlp, eqx.nn.Dropout(0.5, inference=True)])
    return Training(0, model, tx.init(eqx.filter(model, eqx.is_inexact_array)))


def equinox_step(tx):
    def step(state, x):
        model = state.params
        loss, grads = eqx.filter_value_and_grad(
            lambda m: jnp.mean((jax.vmap(m)(x) - 1) ** 2)
        )(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        extra = {"value": loss} if tx is GUARDED else {}
        updates, opt_state = tx.update(grads, state.opt_state, params, **extra)
        model = eqx.apply_updates(model, updates)
        return Training(state.step + 1, model, opt_state), loss

    return step


def test_run_of_equinox_is_its_own_over_the_good_batches(tmp_path):
    def value(state):
        return jnp.mean((jax.vmap(state.params)(DATA[0]) - 1) ** 2)

    step = equinox_step(GUARDED)
    for num_steps in (4, NUM_STEPS):  # The second resumes.
        result = fit(
            network(GUARDED),
            step,
            batches,
            num_steps=num_steps,
            eval_every=2,
            evaluate=value,
            stopper=PATIENT,
            checkpointer=Checkpointer(tmp_path),
        )
    theirs, their_step = network(PLAIN), eqx.filter_jit(equinox_step(PLAIN))
    evaluated = []
    for i in GOOD:
        theirs, _ = their_step(theirs, DATA[i])
        if i % 2 == 1:
            evaluated.append(eqx.filter(theirs.params, eqx.is_array))
    average = eqx.filter(result.average_params, eqx.is_array)
    same(average, mean_of(evaluated), **CLOSE)
    assert isinstance(result.state, Training)
    ours, arrays = (eqx.filter(x.params, eqx.is_array) for x in (result.state, theirs))
    same(ours, arrays, **CLOSE)
    # The best is a model that can be called.
    best = min(row["value"] for row in result.history)
    np.testing.assert_allclose(
        value(theirs._replace(params=result.best_params)), best, rtol=1e-6
    )


SCALED = optax.chain(optax.sgd(0.5), og.stop.scale_by_plateau())


def plain(tx, start=1.0, dtype=jnp.float32):
    params = {"w": jnp.full(2, start, dtype)}
    return Training(jnp.int32(0), params, tx.init(params))


def plain_step(tx):
    # The gradient is the batch.
    def step(state, x):
        params, opt_state = og.apply_gradients(
            tx,
            state.params,
            state.opt_state,
            grads={"w": x.astype(state.params["w"].dtype)},
        )
        return Training(state.step + 1, params, opt_state), jnp.float32(0)

    return step


def test_named_tuple_goes_back_to_its_best_checkpoint(tmp_path):
    # The first is that before the first step.
    values = iter([3.0, 2.0, 99.0, 1.0])
    with pytest.warns(UserWarning, match="back to the checkpoint of step 1"):
        result = fit(
            plain(SCALED),
            plain_step(SCALED),
            lambda step: np.ones(2, np.float32),
            num_steps=3,
            eval_every=1,
            evaluate=lambda state: next(values),
            stopper=og.early_stopping(og.stop.divergence(50.0)),
            checkpointer=Checkpointer(tmp_path),
            rewind=Rewind(times=1),
        )
    assert [(step, then) for step, then, _ in result.rewinds] == [(2, 1)]
    assert isinstance(result.state, Training)
    assert result.state.step == 3
    # 1 - 0.5 by the first step, and less half of that by the third.
    np.testing.assert_allclose(result.state.params["w"], 0.25)


def test_constant_that_a_step_changes_is_refused():
    def step(state, x):
        mlp, dropout = state.params.layers
        dropout = eqx.nn.Dropout(0.5, inference=not dropout.inference)
        return state._replace(params=eqx.nn.Sequential([mlp, dropout])), 0.0

    with pytest.raises(TypeError, match="A number or flag that changes must be an arr"):
        fit(network(GUARDED), step, batches, **LENGTH)


# Averages --------------------------------------------------------------------------

DECAY = 0.8
PULLS = np.random.default_rng(1).normal(size=(NUM_STEPS, 2)).astype(np.float32)
ACCUMULATED = og.accumulate(optax.sgd(0.5), 2)
EMA_GUARDED = og.guard(optax.sgd(0.5))


def pull(step):
    return jnp.where(jnp.equal(step, BAD_STEP), jnp.nan, jnp.asarray(PULLS)[step])


def averages_of(trajectory):
    """The mean with weights that fall by the decay, after each step."""
    found = []
    for n in range(1, len(trajectory) + 1):
        weights = DECAY ** np.arange(n)[::-1]
        found.append(weights @ trajectory[:n] / weights.sum())
    return found


def averaged_descent():
    w, trajectory = np.ones(2), []
    for i in GOOD:
        w = w - 0.5 * np.float64(PULLS[i])
        trajectory.append(w)
    averages = averages_of(np.array(trajectory))
    # After 2, 4 and 6 steps, of which the third was skipped.
    return w, [averages[1], averages[2], averages[4]]


def test_average_leaves_out_a_skipped_step_and_is_evaluated_and_kept(tmp_path):
    w, wanted = averaged_descent()
    arguments: Any = {
        "evaluate": lambda state: jnp.sum(state.params["w"] ** 2),
        "stopper": PATIENT,
        "ema": DECAY,
        **LENGTH,
    }
    step = plain_step(EMA_GUARDED)
    result = fit(
        plain(EMA_GUARDED), step, pull, checkpointer=Checkpointer(tmp_path), **arguments
    )
    values = [np.sum(x**2) for x in wanted]
    np.testing.assert_allclose(
        [row["value"] for row in result.history], values, rtol=1e-5
    )
    best = wanted[int(np.argmin(values))]
    np.testing.assert_allclose(result.best_params["w"], best, rtol=1e-5)
    np.testing.assert_allclose(load_best(tmp_path)["params"]["w"], best, rtol=1e-5)
    np.testing.assert_allclose(result.ema_params["w"], wanted[-1], rtol=1e-5)
    mean = np.mean(wanted, 0)
    np.testing.assert_allclose(result.average_params["w"], mean, rtol=1e-5)
    np.testing.assert_allclose(result.state.params["w"], w, rtol=1e-5)

    starts = jnp.array([1.0, 1.0])
    many = train_population(
        lambda start: {
            "state": plain(EMA_GUARDED, start),
            "train_step": step,
            "batches": pull,
            **{k: arguments[k] for k in ("evaluate", "stopper", "ema")},
        },
        starts,
        **LENGTH,
    )
    np.testing.assert_allclose(many.ema_params["w"][1], wanted[-1], rtol=1e-5)
    np.testing.assert_allclose(many.average_params["w"][1], mean, rtol=1e-5)
    np.testing.assert_allclose(many.member(0).average_params["w"], mean, rtol=1e-5)
    np.testing.assert_allclose(many.member(0).best_params["w"], best, rtol=1e-5)


def test_average_counts_groups_and_is_wider_than_half_precision():
    # Each group moves by an eighth, so that the parameters are exact in bfloat16.
    result = fit(
        plain(ACCUMULATED, dtype=jnp.bfloat16),
        plain_step(ACCUMULATED),
        lambda step: np.full(2, 0.25, np.float32),
        ema=0.999,
        evaluate=lambda state: state.params["w"][0].astype(jnp.float32),
        num_steps=6,
        eval_every=6,
    )
    weights = 0.999 ** np.arange(3)[::-1]
    wanted = weights @ np.array([0.875, 0.75, 0.625]) / weights.sum()
    assert result.ema_params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        result.ema_params["w"], np.full(2, wanted).astype(jnp.bfloat16)
    )


def test_average_of_a_train_state_with_batch_statistics():
    state = TrainState.create(
        apply_fn=str,
        params=jnp.ones(2),
        tx=EMA_GUARDED,
        batch_stats=jnp.zeros(()),
    )

    def step(state, x):
        return state.apply_gradients(grads=x, batch_stats=state.batch_stats + 1), 0.0

    result = train_on_device(
        state,
        step,
        pull,
        evaluate=lambda state: -state.batch_stats,
        stopper=PATIENT,
        ema=DECAY,
        **LENGTH,
    )
    assert [row["value"] for row in result.history] == [-2, -3, -5]
    assert result.best_batch_stats == 5
    np.testing.assert_array_equal(result.best_params, result.ema_params)
    _, wanted = averaged_descent()
    np.testing.assert_allclose(result.average_params, np.mean(wanted, 0), rtol=1e-5)
