"""Loops on the device. Oracles: plain Python loops, float64 NumPy, and `fit`."""

import functools
import gc
import inspect
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optax_guard as og
from optax_guard import stop
from optax_guard.flax import TrainState, fit
from optax_guard.loops import train_on_device, train_population
from optax_guard.loops._device import compiled_run
from optax_guard.loops._inputs import Functions
from tests.hlo import choices_in_loops, computations, copies

# loss = mean((w - x)^2) with w of shape (2,): the gradient is w - x.
DATA = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
START = np.array([1.0, -1.0], np.float32)
PLAIN = optax.sgd(0.1)
GUARDED = og.guard(PLAIN, clip=0.5, max_consecutive_skips=3)


def batch_of(data, step):
    return data[step % len(data)]


def train_step(state, x):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - x) ** 2))(
        state.params
    )
    return state.apply_gradients(grads=grads, value=loss), {"loss": loss}


def evaluate(state):
    return jnp.sum((state.params["w"] - jnp.array([0.5, 0.25])) ** 2)


def made(tx: Any = GUARDED, **fields):
    params = {"w": jnp.array(START)}
    return TrainState.create(apply_fn=str, params=params, tx=tx, **fields)


def batches(data=DATA):
    return Partial(batch_of, jnp.asarray(data))


def assert_equal_trees(a, b, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol, atol)


# Only `fit` looks at the last step before an evaluation, and before the first step.
OF_FIT = {"update_ratio", "leaf_norm_ratio", "initial_value", "stop_reason"}


def assert_equal_rows(got, expected):
    assert len(got) == len(expected)
    for a, row in zip(got, expected, strict=True):
        b = {k: x for k, x in row.items() if k not in OF_FIT}
        assert a == pytest.approx(b, rel=1e-6, nan_ok=True)
        assert {k: type(x) for k, x in a.items()} == {k: type(x) for k, x in b.items()}


# One run -----------------------------------------------------------------------


def test_arguments_are_those_of_fit():
    ours = list(inspect.signature(train_on_device).parameters.values())
    theirs = inspect.signature(fit).parameters
    for mine in ours:
        other = theirs[mine.name]
        assert (mine.kind, mine.default) == (other.kind, other.default)


def test_rows_and_result_are_those_of_fit():
    data = np.concatenate([DATA, np.full((1, 2), np.nan, np.float32)])
    stopper = og.early_stopping(stop.patience(50))
    options: dict[str, Any] = {"num_steps": 11, "eval_every": 3, "evaluate": evaluate}
    ours: Any = train_on_device(
        made(), train_step, batches(data), stopper=stopper, **options
    )
    theirs: Any = fit(made(), train_step, batches(data), stopper=stopper, **options)
    assert [row["step"] for row in ours.history] == [3, 6, 9, 11]
    assert [row["num_skipped"] for row in ours.history] == [0, 0, 1, 1]
    assert_equal_rows(ours.history, theirs.history)
    assert_equal_trees(ours._replace(history=[]), theirs._replace(history=[]))

    w = START.astype(np.float64)
    norms = []
    for x in DATA[:3].astype(np.float64):
        norms.append(np.linalg.norm(w - x))
        w -= 0.1 * (w - x) * min(1, 0.5 / norms[-1])
    assert ours.history[0]["grad_norm"] == pytest.approx(max(norms), rel=1e-6)


VALUES = [5.0, 4.0, 4.5, 3.0, 2.5, 2.6, 2.4, 3.2, 2.9, 3.5, 4.0]
RULES = {
    "patience": (stop.patience(2), 8),
    "lag": (stop.lag(2), 7),
    "budget": (stop.budget(steps=7), 3),
    "gl": (stop.generalization_loss(20.0), 7),
    "of several": (
        stop.any_of(stop.overfitting(5), stop.held_for(stop.target(2.7), 2)),
        5,
    ),
    "storm": (stop.skip_storm(2), 4),
}


def scripted(values, state):
    """The value of each second step."""
    return values[state.step // 2 - 1]


@functools.cache
def jitted_step(tx):
    del tx  # One function for each optimizer, as `train_on_device` compiles.
    return jax.jit(train_step)


@pytest.mark.parametrize("name", RULES)
def test_stops_where_a_python_loop_over_the_same_functions_stops(name):
    rule, expected = RULES[name]
    stopper = og.early_stopping(rule)
    tx = GUARDED if name == "storm" else PLAIN
    data = np.where(np.arange(22)[:, None] < 8, np.tile(DATA, (3, 1))[:22], np.nan)
    data = data if name == "storm" else DATA
    state, losses = made(tx), []
    stop = stopper.init(state.params)
    for step in range(1, 23):
        state, found = jitted_step(tx)(state, data[(step - 1) % len(data)])
        losses.append(float(found["loss"]))
        if step % 2:
            continue
        stop = stopper.update(
            VALUES[step // 2 - 1],
            stop,
            state.params,
            step=step,
            train_value=np.mean(losses) if np.isfinite(losses).all() else np.nan,
            opt_state=state.opt_state,
        )
        losses = []
        if stop.should_stop:
            break
    assert stop.stopped_at == expected
    result: Any = train_on_device(
        made(tx),
        train_step,
        batches(data),
        num_steps=22,
        eval_every=2,
        evaluate=Partial(scripted, jnp.array(VALUES)),
        stopper=stopper,
    )
    assert [row["value"] for row in result.history] == [
        pytest.approx(value) for value in VALUES[: expected + 1]
    ]
    assert_equal_trees(result.stop, stop)
    assert_equal_trees(result.state.params, state.params)
    assert_equal_trees(result.best_params, stopper.best(stop, state.params))


def test_plateau_reduces_the_learning_rate_as_in_fit():
    tx = optax.chain(optax.sgd(0.5), stop.scale_by_plateau())
    stopper = og.early_stopping(stop.plateau(1, factor=0.5, max_reductions=2))
    options: dict[str, Any] = {"num_steps": 40, "eval_every": 2, "evaluate": evaluate}
    device: Any = train_on_device(
        made(tx), train_step, batches(), stopper=stopper, **options
    )
    host: Any = fit(made(tx), train_step, batches(), stopper=stopper, **options)
    assert og.StopReason(int(device.stop.stop_reason)).name == "PLATEAU"
    # `fit` stops one interval later: its row and state beyond are its own.
    size = len(device.history)
    assert_equal_rows(device.history, host.history[:size])
    assert_equal_trees(device.stop, host.stop)
    [(_, scale)] = optax.tree.get_all_with_path(device.state.opt_state, "lr_scale")
    assert scale == 0.25


def test_exhausted_guard_ends_the_loop_and_raises():
    data = np.where(np.arange(8)[:, None] < 3, DATA, np.nan)
    calls = []

    def counted(state):
        jax.debug.callback(lambda: calls.append(1))
        return evaluate(state)

    with pytest.raises(og.GuardExhaustedError, match=r"Skipped last:\n  update 3: NON"):
        train_on_device(
            made(),
            train_step,
            batches(data),
            num_steps=80,
            eval_every=3,
            evaluate=counted,
        )
    jax.effects_barrier()
    assert len(calls) == 2


class PlainState(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def test_traced_once_for_other_data_states_and_starts():
    tx = optax.sgd(0.1)
    traces = []

    def step_fn(state, x):
        traces.append("step")
        grads = jax.tree.map(lambda w: w - x, state.params)
        updates, opt_state = tx.update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return PlainState(state.step + 1, params, opt_state), jnp.sum(x)

    def evaluated(state):
        traces.append("evaluate")
        return {"norm": optax.tree.norm(state.params)}

    def drawn(data, step):
        traces.append("batches")
        return batch_of(data, step)

    stopper = og.early_stopping(stop.patience(9), key="norm")

    def run(params, data, step):
        state = PlainState(jnp.int32(step), params, tx.init(params))
        return train_on_device(
            state,
            step_fn,
            Partial(drawn, jnp.asarray(data)),
            num_steps=8,
            eval_every=3,
            evaluate=evaluated,
            stopper=stopper,
        )

    first: Any = run({"w": jnp.array(START)}, DATA, 0)
    assert [row["step"] for row in first.history] == [3, 6, 8]
    before = len(traces)
    assert traces.count("step") == traces.count("evaluate") == 1
    second: Any = run({"w": jnp.array(2 * START)}, 3 * DATA, 4)
    assert [row["step"] for row in second.history] == [6, 8]
    assert len(traces) == before
    w = 2 * START.astype(np.float64)
    for x in 3 * DATA[4:8].astype(np.float64):
        w -= 0.1 * (w - x)
    np.testing.assert_allclose(second.state.params["w"], w, rtol=1e-5, atol=1e-6)


def test_state_that_was_given_stays_usable():
    state = made(PLAIN)
    kwargs: dict[str, Any] = {"num_steps": 3, "eval_every": 3}
    once: Any = train_on_device(state, train_step, batches(), **kwargs)
    again: Any = train_on_device(state, train_step, batches(), **kwargs)
    assert_equal_trees(once, again, rtol=0, atol=0)
    assert once.stop is once.best_params is None


def test_what_the_device_cannot_do_is_refused_before_anything_is_traced():
    def never(*args):
        raise AssertionError

    def loop(state=None, batches=never, num_steps=4, evaluate=never, stopper=None):
        train_on_device(
            made(PLAIN) if state is None else state,
            never,
            batches,
            num_steps=num_steps,
            eval_every=2,
            evaluate=evaluate,
            stopper=stopper,
        )

    for rule in (
        stop.budget(seconds=60.0),
        stop.any_of(stop.patience(3), stop.not_before(stop.target(0.0), seconds=1.0)),
    ):
        with pytest.raises(ValueError, match=r"`stopper` has a rule .*\['seconds'\]"):
            loop(stopper=og.early_stopping(rule))
    with pytest.raises(TypeError, match="`batches` must be a function of the step"):
        loop(batches=[1, 2])
    with pytest.raises(ValueError, match="`num_steps` must be above the steps done, 4"):
        loop(state=made(PLAIN).replace(step=4))
    with pytest.raises(ValueError, match="`stopper` needs `evaluate`"):
        loop(evaluate=None, stopper=og.early_stopping(stop.patience(3)))
    with pytest.raises(ValueError, match="`num_steps` must be a whole number"):
        loop(num_steps=0)


# Populations ----------------------------------------------------------------------


def test_members_stop_at_their_own_time_and_come_back_in_order():
    traces = []

    def walk(state, rate):
        traces.append(rate)
        params = {"w": state.params["w"] + rate}
        return PlainState(state.step + 1, params, state.opt_state), 0.0

    def build(member) -> Any:
        return {
            "state": PlainState(0, {"w": jnp.zeros(2)}, ()),
            "train_step": walk,
            "batches": lambda step: member["rate"],
            # Best at evaluation `bottom`, counted from 1.
            "evaluate": lambda state: abs(state.step / 2 - member["bottom"]),
            "stopper": og.early_stopping(stop.patience(member["patience"])),
        }

    def run(bottoms) -> Any:
        n = len(bottoms)
        members = {
            "rate": np.arange(1, n + 1, dtype=np.float32),
            "bottom": np.array(bottoms),
            "patience": np.arange(n) % 3 + 1,
        }
        result: Any = train_population(build, members, num_steps=101, eval_every=2)
        stops_at = bottoms + members["patience"]
        rows = np.minimum(stops_at, 51)
        np.testing.assert_array_equal(result.num_rows, rows)
        np.testing.assert_array_equal(result.stop.should_stop, stops_at <= 51)
        np.testing.assert_array_equal(result.stop.best_eval, bottoms - 1)
        steps = np.minimum(2 * rows, 101)
        np.testing.assert_array_equal(result.state.step, steps)
        np.testing.assert_array_equal(
            result.state.params["w"][:, 0], members["rate"] * steps
        )
        np.testing.assert_array_equal(
            result.best_params["w"][:, 1],
            members["rate"] * np.minimum(2 * bottoms, 101),
        )
        for i, size in enumerate(rows):
            steps = [*range(2, 2 * size, 2), min(2 * size, 101)]
            table = result.history
            np.testing.assert_array_equal(table["step"][i, :size], steps)
            np.testing.assert_array_equal(
                table["value"][i, :size], np.abs(np.array(steps) / 2 - bottoms[i])
            )
            assert np.isnan(table["value"][i, size:]).all()
        return result

    rng = np.random.default_rng(0)
    # A start, then batches of 9, 4, 2 and 1; one trains to the end.
    first: Any = run(rng.permutation(np.r_[rng.integers(1, 8, 5), 12, 20, 30, 51]))
    assert len(traces) == 5
    # The same but for the last size: two go on until it is too late to pack.
    run(rng.permutation(np.r_[rng.integers(1, 9, 5), 10, 11, 46, 47]))
    assert len(traces) == 5
    # As `argmin` of a column gives it.
    one = first.member(jnp.asarray(3))
    assert len(one.history) == first.num_rows[3]
    assert one.history[-1]["step"] == one.state.step
    assert one.stop.best_eval.shape == ()
    with pytest.raises(IndexError, match="`i` must be below the number of members, 9"):
        first.member(9)


def statistics_step(state, batch):
    x, poison = batch
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - x) ** 2))(
        state.params
    )
    grads = jax.tree.map(lambda g: g * jnp.where(poison, jnp.nan, 1.0), grads)
    stats = {"mean": 0.9 * state.batch_stats["mean"] + 0.1 * x}
    return state.apply_gradients(grads=grads, value=loss, batch_stats=stats), loss


def build_guarded(data, member):
    tx = og.guard(
        optax.adamw(member["rate"], weight_decay=member["decay"]),
        clip=member["max_norm"],
        max_consecutive_skips=4,
    )

    def drawn(step):
        key = jax.random.fold_in(jax.random.key(member["seed"]), step)
        x = data[jax.random.randint(key, (), 0, len(data))]
        return x, member["poisoned"] & (step >= 5)

    return {
        "state": made(tx, batch_stats={"mean": jnp.zeros(2)}),
        "train_step": statistics_step,
        "batches": drawn,
        "evaluate": lambda state: {"val_loss": evaluate(state)},
        "stopper": og.early_stopping(stop.patience(member["patience"]), key="val_loss"),
    }


def test_member_alone_is_the_member_among_others_and_none_touches_another():
    n = 3
    members = {
        "rate": np.geomspace(0.01, 0.3, n).astype(np.float32),
        "decay": np.linspace(0, 0.3, n).astype(np.float32),
        "max_norm": np.array([0.1, 1.0, 3.0], np.float32),
        "seed": np.array([3, 1, 4]),
        "patience": np.array([50, 3, 9]),
        "poisoned": np.arange(n) == 2,
    }
    build = Partial(build_guarded, jnp.asarray(DATA))
    options: dict[str, Any] = {"num_steps": 41, "eval_every": 2}
    result: Any = train_population(build, members, **options)
    assert len(set(result.num_rows.tolist())) == 3

    alone = jax.tree.map(lambda leaf: leaf[1], members)
    expected: Any = train_on_device(**build(alone), **options)
    got = result.member(1)
    assert_equal_rows(got.history, expected.history)
    for name in ("best_params", "best_batch_stats", "stop"):
        assert_equal_trees(getattr(got, name), getattr(expected, name))
    assert_equal_trees(jax.tree.leaves(got.state), jax.tree.leaves(expected.state))
    # The best is not the last, so that a mix-up of the two would show.
    assert got.stop.best_step < got.state.step

    # The one whose guard is exhausted has ended, after steps 5 to 8.
    exhausted = og.metrics(result.state)["guard_exhausted"]
    np.testing.assert_array_equal(exhausted, members["poisoned"])
    assert result.num_rows[2] == 5
    assert not result.stop.should_stop[2]
    healthy: Any = train_population(
        build, members | {"poisoned": np.zeros(n, bool)}, **options
    )
    others = np.array([0, 1])
    for a, b in zip(
        jax.tree.leaves((result.best_params, result.stop, result.history)),
        jax.tree.leaves((healthy.best_params, healthy.stop, healthy.history)),
        strict=True,
    ):
        np.testing.assert_array_equal(a[others], b[others])
    assert healthy.num_rows[2] > 5


def test_progress_is_shown_from_the_host(capsys):
    def build(member) -> Any:
        return {
            "state": PlainState(0, {"w": member}, ()),
            "train_step": lambda state, x: (state._replace(step=state.step + 1), x),
            "batches": lambda step: 0.0,
            "evaluate": lambda state: state.params["w"],
            "stopper": og.early_stopping(stop.target(2.0)),
        }

    members = np.array([1.0, 4.0, 3.0])
    train_population(build, members, num_steps=100, eval_every=25, progress=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["step", "running", "lowest", "best", "highest", "best"],
        ["25", "2", "1", "4"],
        ["50", "2", "1", "4"],
        ["75", "2", "1", "4"],
        ["100", "2", "1", "4"],
    ]


@pytest.mark.parametrize(
    ("changes", "members", "error", "message"),
    [
        (
            {},
            np.float32(1.0),
            ValueError,
            r"`members` must be .* got the shapes \[\(\)\]",
        ),
        ({}, {"a": np.ones(2), "b": np.ones(3)}, ValueError, "common leading axis"),
        ({}, np.ones(0), ValueError, "common leading axis"),
        ({"step": 7}, np.ones(2), TypeError, "`build` must return a dict with"),
        ({"state": 7}, np.ones(2), TypeError, "`state` must have `step`"),
        ({"batches": [1]}, np.ones(2), TypeError, "`batches` must be a function"),
        (
            {"stopper": og.early_stopping(stop.budget(seconds=1.0))},
            np.ones(2),
            ValueError,
            "which a loop on the device cannot tell",
        ),
        (
            {"state": lambda member: PlainState(member, {}, ())},
            np.arange(2),
            ValueError,
            r"`state` of every member must start at the same step, got steps \[0, 1\]",
        ),
        (
            {"state": PlainState(9, {}, ())},
            np.ones(2),
            ValueError,
            "`num_steps` must be above the steps done, 9, got 4",
        ),
    ],
)
def test_bad_population_is_refused(changes, members, error, message):
    def build(member):
        arguments = {
            "state": PlainState(0, {}, ()),
            "train_step": lambda state, x: (state, 0.0),
            "batches": lambda step: 0.0,
            "evaluate": lambda state: 0.0,
        } | changes
        if callable(arguments["state"]):
            arguments["state"] = arguments["state"](member)
        return arguments

    with pytest.raises(error, match=message):
        train_population(build, members, num_steps=4, eval_every=2)


def test_build_that_returns_no_dict_is_refused():
    seven: Any = 7

    def named(member) -> Any:
        return "state"

    with pytest.raises(TypeError, match="`build` must be a function of a member"):
        train_population(seven, np.ones(2), num_steps=4, eval_every=2)
    with pytest.raises(TypeError, match=r"`build` must return a dict .* got 'state'"):
        train_population(named, np.ones(2), num_steps=4, eval_every=2)


# What the compiler makes of it ----------------------------------------------------


def compiled_text(size, stopper) -> str:
    state = PlainState(jnp.int32(0), {"w": jnp.zeros(size)}, ())

    def shrink(state, x):
        return PlainState(state.step + 1, {"w": 0.9 * state.params["w"]}, ()), x

    def evaluate(state):
        return state.params["w"][0]

    run, given = compiled_run(Functions(shrink, jnp.float32, evaluate, stopper))
    lowered = run.lower(state, np.int32(0), num_steps=8, eval_every=2, **given)
    return lowered.compile().as_text() or ""


def test_best_parameters_that_do_not_improve_move_nothing():
    size = 54_321
    stopper = og.early_stopping(stop.patience(3))
    # Keep is the first branch.
    [(around, [keep, take])] = choices_in_loops(compiled_text(size, stopper), size)
    assert (around, keep, take) == (0, 0, 1)

    def update(value, state, params=None, **facts):
        new = stopper.update(value, state, params, **facts)
        best = jax.tree.map(
            lambda p, b: jnp.where(new.is_best, p, b), params, state.best_params
        )
        return new._replace(best_params=best)

    # The control: a `where` writes the best at every evaluation.
    text = compiled_text(size, stopper._replace(update=update))
    bodies = [b for b in computations(text).values() if not b.startswith("ENTRY")]
    assert choices_in_loops(text, size) == []
    assert sum(copies(body, size) for body in bodies) > 0


# Memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["host", "device", "population"])
def test_what_the_users_functions_hold_is_released_with_them(loop):
    class Dataset:
        x = 1.0

    def train() -> Any:
        data = Dataset()

        def step(state, batch):
            return state.apply_gradients(grads=state.params - data.x), batch

        def build(params):
            return {"state": state_of(params), "train_step": step, "batches": float_}

        length: dict[str, Any] = {"num_steps": 2, "eval_every": 2}
        if loop == "population":
            train_population(build, jnp.zeros(2), **length)
        else:
            run = {"host": fit, "device": train_on_device}[loop]
            run(state_of(jnp.zeros(())), step, float_, **length)
        return weakref.ref(data)

    sgd = optax.sgd(0.1)
    float_ = jnp.float32

    def state_of(params):
        return TrainState.create(apply_fn=str, params=params, tx=sgd)

    alive = [train() for _ in range(2)]
    gc.collect()
    assert [data() for data in alive] == [None, None]
