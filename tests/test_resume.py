"""Checkpoints: a run that was cut and resumed is the run that was not, bit for bit."""

import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_guard as og
from optax_guard.flax import Checkpointer, TrainState, fit, load_best

HERE = pathlib.Path(__file__)


# A model with all that a checkpoint may miss: dropout by step and by a key in the
# state, batch statistics, Adam, a guard with a bad batch, a plateau.


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        x = nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x))
        x = nn.Dropout(0.2, deterministic=not is_training)(x)
        return nn.Dense(1)(x)[:, 0]


class KeyedState(TrainState):
    key: Any = None


MODEL = Model()
TX = og.guard(
    optax.chain(optax.adam(0.1), og.stop.scale_by_plateau()),
    clip=og.threshold.relative_to_mean(1.5),
)
NUM_STEPS, EVAL_EVERY = 10, 2


def batches(step):
    x = np.random.default_rng(step).normal(size=(8, 2)).astype(np.float32)
    return x * (np.nan if step == 5 else 1), x.sum(1)


def train_step(state, batch):
    x, y = batch
    carried, fresh = jax.random.split(state.key)
    fresh = jax.random.fold_in(fresh, state.step)

    def loss_fn(params):
        prediction, updated = MODEL.apply(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            is_training=True,
            mutable=["batch_stats"],
            rngs={"dropout": fresh},
        )
        return jnp.mean((prediction - y) ** 2), updated["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, value=loss, batch_stats=stats)
    return state.replace(key=carried), loss


@jax.jit
def validate(state):
    x, y = batches(10**6)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jnp.mean((MODEL.apply(variables, x, is_training=False) - y) ** 2)


@functools.cache
def variables():
    return MODEL.init(jax.random.key(0), jnp.ones((1, 2)), is_training=False)


STOPPER = og.early_stopping(
    og.stop.plateau(1, factor=0.5, max_reductions=2), average_last=2
)


def train(directory, data: Any = batches, num_steps=NUM_STEPS, stopper=STOPPER):
    key = jax.random.key(3, impl="rbg")
    return fit(
        KeyedState.create(apply_fn=str, tx=TX, key=key, **variables()),
        train_step,
        data,
        num_steps=num_steps,
        eval_every=EVAL_EVERY,
        evaluate=validate,
        stopper=stopper,
        checkpointer=None if directory is None else Checkpointer(directory),
    )


def cut_at(last, how):
    def data(step):
        if step == last:
            how()
        return batches(step)

    return data


def crash():
    raise OSError("disk on fire")


def bits(tree):
    def as_numpy(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return [
        (x.dtype, x.shape, x.tobytes()) for x in map(as_numpy, jax.tree.leaves(tree))
    ]


def assert_same_run(one, other):
    # By their text, because a row may hold NaN.
    assert repr(one.history) == repr(other.history)
    assert bits(one.state) == bits(other.state)
    assert bits(one.stop) == bits(other.stop)
    assert bits(one.best_params) == bits(other.best_params)
    assert bits(one.best_batch_stats) == bits(other.best_batch_stats)
    assert bits(one.average_params) == bits(other.average_params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, train(directory)


# The last cut is in the middle of an interval.
@pytest.mark.parametrize("cut", [2, 4, 6, 9])
def test_run_that_is_cut_and_resumed_is_the_run_in_one(whole, tmp_path, cut):
    with pytest.raises(OSError, match="disk on fire"):
        train(tmp_path, cut_at(cut, crash))
    assert_same_run(train(tmp_path), whole[1])


def test_checkpoints_change_nothing_but_when_the_stop_comes(whole):
    result = train(None)
    assert result.history == whole[1].history
    assert bits(result.best_params) == bits(whole[1].best_params)
    assert bits(result.best_batch_stats) == bits(whole[1].best_batch_stats)
    assert bits(result.average_params) == bits(whole[1].average_params)
    assert [row["num_skipped"] for row in result.history] == [0, 0, 1, 1, 1]


def test_resumed_run_does_not_repeat_what_was_found_before(tmp_path, capsys):
    tx = og.guard(optax.sgd(0.1), clip=1.0)
    state = TrainState.create(apply_fn=str, params=jnp.array(3.0), tx=tx)

    def step(state, batch):
        del batch
        loss, grads = jax.value_and_grad(jnp.square)(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    def found_until(num_steps, name):
        arguments = state, step, float
        fit(
            *arguments,
            num_steps=num_steps,
            eval_every=1,
            progress=True,
            checkpointer=Checkpointer(tmp_path / name),
        )
        return capsys.readouterr().out.count("CLIPPING_WORKS")

    assert found_until(4, "cut") == 1
    assert found_until(10, "cut") == 0
    assert found_until(10, "whole") == 1


def test_finished_run_is_returned_at_once_and_goes_on_to_more_steps(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    assert_same_run(train(tmp_path, cut_at(NUM_STEPS, crash)), whole[1])
    longer = train(tmp_path, num_steps=12)
    assert [row["step"] for row in longer.history] == [2, 4, 6, 8, 10, 12]


def test_best_loads_in_a_fresh_process_without_the_optimizer(whole):
    directory, result = whole
    code = (
        "from optax_guard.flax import load_best; import numpy as np\n"
        f"best = load_best({str(directory)!r})\n"
        "print(sorted(best), best['params']['Dense_0']['kernel'].tobytes().hex())\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    kernel = np.asarray(result.best_params["Dense_0"]["kernel"])
    assert child.stdout.strip() == (
        f"['batch_stats', 'params'] {kernel.tobytes().hex()}"
    )


def test_best_variables_are_what_apply_takes_and_give_the_best_value(whole):
    directory, result = whole
    best = load_best(directory)
    value = validate(result.state.replace(**best))
    assert value == min(row["value"] for row in result.history)


# A state of one vector, for what depends on numbers alone -------------------------


def small(tx: Any = None, w: Any = (1.0, -1.0)):
    params = {"w": jnp.asarray(w, jnp.float32)}
    return TrainState.create(apply_fn=str, params=params, tx=tx or SGD)


SGD = optax.sgd(0.1)


def small_step(state, x):
    return state.apply_gradients(grads={"w": state.params["w"] - x}), 0.0


def zeros(step):
    return np.zeros(2, np.float32)


def by_step(values):
    """An `evaluate` that depends on the step alone."""
    return lambda state: values[int(state.step)]


def small_fit(checkpointer: Any, state=None, data: Any = zeros, **changes):
    arguments: dict[str, Any] = {
        "num_steps": 6,
        "eval_every": 1,
        "evaluate": by_step([np.nan, 3.0, 1.0, 2.0, 2.0, 0.5, 0.5]),
        "stopper": og.early_stopping(og.stop.patience(2)),
        **changes,
    }
    if isinstance(checkpointer, os.PathLike):
        checkpointer = Checkpointer(checkpointer)
    state = small() if state is None else state
    return fit(state, small_step, data, checkpointer=checkpointer, **arguments)


def explained(result):
    assert result.stop is not None
    return og.explain(result.stop)


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.is_dir())


def test_best_checkpoint_stays_and_of_the_others_the_latest(tmp_path):
    result = small_fit(tmp_path / "one")
    assert explained(result).startswith("stopped at evaluation 4 (PATIENCE)")
    # At its evaluation, and not an interval later.
    assert result.state.step == 4
    assert steps_in(tmp_path / "one") == [2, 3, 4]
    expected = np.array([1.0, -1.0]) * 0.9**2
    for best in (load_best(tmp_path / "one")["params"], result.best_params):
        np.testing.assert_allclose(best["w"], expected, rtol=1e-6)
    assert result.stop is not None
    assert result.stop.best_params is None
    small_fit(Checkpointer(tmp_path / "two", keep=1))
    assert steps_in(tmp_path / "two") == [2, 4]


def test_stopped_run_stays_stopped_and_goes_on_on_purpose(tmp_path):
    def no_data(step):
        raise AssertionError("no step must be taken")

    first = small_fit(tmp_path)
    assert_same_run(small_fit(tmp_path, data=no_data), first)
    again = small_fit(Checkpointer(tmp_path, continue_stopped=True))
    assert [row["step"] for row in again.history] == [1, 2, 3, 4, 5, 6]
    # Patience starts afresh, the best does not.
    assert explained(again) == (
        "running, best 0.5 at evaluation 5 (step 5), 1 without a better one"
    )


def test_without_a_finite_value_there_is_no_best_checkpoint(tmp_path):
    small_fit(tmp_path, evaluate=lambda state: 1.0, num_steps=2, stopper=None)
    with pytest.raises(FileNotFoundError, match="`directory` holds no best checkpoint"):
        load_best(tmp_path)
    with pytest.raises(FileNotFoundError, match="`directory` holds no checkpoint"):
        load_best(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_without_a_stopper_the_latest_is_kept(tmp_path, monkeypatch):
    # Orbax itself takes no relative path.
    monkeypatch.chdir(tmp_path.parent)
    relative = Checkpointer(tmp_path.name)
    result = small_fit(relative, stopper=None, num_steps=2)
    assert result.best_params is result.stop is None
    assert steps_in(tmp_path) == [1, 2]
    longer = small_fit(tmp_path, stopper=None, num_steps=3)
    assert [row["value"] for row in longer.history] == [3.0, 1.0, 2.0]


def test_seconds_of_training_add_up_over_a_restart(tmp_path, monkeypatch):
    now = [100.0]

    def evaluate(state):
        now[0] += 3.0
        return 1.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    options: dict[str, Any] = {"evaluate": evaluate}
    options["stopper"] = og.early_stopping(og.stop.budget(seconds=10.0))
    small_fit(tmp_path, num_steps=2, **options)
    now[0] += 1e6
    result = small_fit(tmp_path, num_steps=9, **options)
    assert result.stop is not None
    assert result.stop.train_seconds == 12.0
    assert explained(result).startswith("stopped at evaluation 4 (BUDGET)")


def test_saved_is_what_was_evaluated_though_it_is_donated_next(tmp_path):
    """And there is one state on the device, beside that which was given."""
    shape = (1 << 20,)
    counts: list[int] = []

    def data(step):
        large = [x for x in jax.live_arrays() if x.shape == shape]
        counts.append(len({x.unsafe_buffer_pointer() for x in large}))
        return np.float32(step)

    state = small(w=np.zeros(shape))
    result = small_fit(tmp_path, state, data, stopper=og.early_stopping(PATIENT))
    w, expected = np.float32(0), {}
    for step in range(6):
        w = w - np.float32(0.1) * (w - np.float32(step))
        expected[step + 1] = w
    best = load_best(tmp_path)["params"]["w"]
    np.testing.assert_allclose(best, np.full(shape, expected[5]), rtol=1e-6)
    np.testing.assert_allclose(result.state.params["w"][0], expected[6], rtol=1e-6)
    assert counts == [2] * 6


PATIENT = og.stop.patience(9)


def test_arrays_come_back_to_where_they_were(tmp_path, mesh):
    """Sharded ones sharded, and free ones free to follow a sharded batch."""
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = small(optax.sgd(0.1, momentum=0.9), np.ones(8))
    params = jax.device_put(state.params, data)
    batch = jax.device_put(jnp.zeros(8), data)
    for num_steps in (1, 2):
        result = small_fit(
            tmp_path,
            state.replace(params=params),
            lambda step: batch,
            num_steps=num_steps,
        )
    for found in (result.state.params, result.best_params):
        assert found["w"].sharding.is_equivalent_to(data, 1)
    assert result.state.step == 2


def test_resumed_step_is_not_traced_again(tmp_path):
    num_traces = 0

    def counted(state, x):
        nonlocal num_traces
        num_traces += 1
        return small_step(state, x)

    for num_steps in (1, 2):
        fit(
            small(),
            counted,
            zeros,
            num_steps=num_steps,
            eval_every=1,
            checkpointer=Checkpointer(tmp_path),
        )
    assert num_traces == 1


def test_sigterm_saves_at_the_next_evaluation_and_the_run_goes_on(whole, tmp_path):
    cut = train(
        tmp_path, cut_at(5, functools.partial(signal.raise_signal, signal.SIGTERM))
    )
    assert cut.preempted
    assert cut.state.step == 6
    assert [row["step"] for row in cut.history] == [2, 4, 6]
    # No reason is latched: it was no decision about the run.
    assert explained(cut).startswith("running")
    resumed = train(tmp_path)
    assert not resumed.preempted
    assert_same_run(resumed, whole[1])


def test_process_that_is_killed_is_resumed(tmp_path):
    """No handler runs, and a checkpoint is being written."""
    directory = tmp_path / "killed"
    code = f"import test_resume; test_resume.fit_until_killed({str(directory)!r})"
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}."},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert_same_run(small_fit(directory), small_fit(tmp_path / "whole"))


def fit_until_killed(directory):
    def data(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return zeros(step)

    small_fit(pathlib.Path(directory), data=data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that stopped at step 4, with its best at step 2."""
    directory = tmp_path_factory.mktemp("saved")
    small_fit(directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"state": small(optax.adam(0.1))},
            ValueError,
            "`state` and `stopper` must be those of the run that is resumed: "
            r"state/opt_state/0/count is int32\[\], in the checkpoint it is not there",
        ),
        (
            {"state": small(w=np.zeros(3))},
            ValueError,
            r"params/w is float32\[3\], in the checkpoint it is float32\[2\] \(.*saved",
        ),
        (
            {"stopper": og.early_stopping(og.stop.target(0.1))},
            ValueError,
            "stop/rule_state/bad_count is not there, in the checkpoint it is int32",
        ),
        (
            {"stopper": None},
            ValueError,
            r"stop/(stop_counts|best_params|is_best) is not there, in the checkpoint",
        ),
        (
            {"data": [np.zeros(2)]},
            ValueError,
            "`batches` must be a function `step -> batch`, or an iterator with `get_st",
        ),
        (
            {"checkpointer": "somewhere"},
            TypeError,
            "`checkpointer` must be a `Checkpointer`, as in `Checkpointer",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused(saved, changes, error, message):
    with pytest.raises(error, match=message):
        small_fit(**{"checkpointer": saved, **changes})


def test_error_without_orbax_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    message = r"needs Orbax: pip install 'optax-guard\[checkpoint\]'"
    for user in (Checkpointer, load_best):
        with pytest.raises(ImportError, match=f"`{user.__name__}` {message}"):
            user(tmp_path)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="`keep` must be a whole number of at least 1"):
        Checkpointer(tmp_path, keep=0)


# The stopper's state by itself -----------------------------------------------------

RULES = {
    "patience": og.stop.patience(3),
    "prechelt": og.stop.progress_quotient(2.0, 2),
    "rises": og.stop.successive_rises(2, 2),
    "lag": og.stop.lag(3),
    "plateau": og.stop.plateau(2),
    "all": og.stop.all_of(
        og.stop.patience(2), og.stop.held_for(og.stop.target(0.1), 2)
    ),
}
VALUES = [3.0, np.nan, 2.0, 2.5, 1.0, 1.5, 1.4, 1.6, 1.7, 1.8]


STOPPERS = {
    name: og.early_stopping(rule, nonfinite="wait", smooth=og.stop.median(3))
    for name, rule in RULES.items()
}


def first_states():
    params = {"w": jnp.zeros(1), "b": jnp.zeros((), jnp.bfloat16)}
    return {name: stopper.init(params) for name, stopper in STOPPERS.items()}


@jax.jit
def told(states, value):
    # Thirds have no end in binary, so that a lost digit shows.
    params = {"w": value[None] / 3, "b": value.astype(jnp.bfloat16)}
    return {
        name: stopper.update(value, states[name], params, train_value=value / 7)
        for name, stopper in STOPPERS.items()
    }


def told_all(states, values):
    for value in values:
        states = told(states, np.float32(value))
    return states


def by_msgpack(states, fresh, directory):
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(states))


def by_orbax(states, fresh, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "states", states)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "states", fresh)


@pytest.mark.parametrize("round_trip", [by_msgpack, by_orbax])
def test_stopper_that_was_saved_judges_as_if_it_had_not_been(tmp_path, round_trip):
    expected = told_all(first_states(), VALUES)
    saved = told_all(first_states(), VALUES[:4])
    saved = round_trip(saved, first_states(), tmp_path)
    assert bits(told_all(saved, VALUES[4:])) == bits(expected)
    assert sum(bool(state.should_stop) for state in expected.values()) >= 2


def test_nnx_optimizer_and_stopper_are_saved_together(tmp_path):
    def made():
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, og.guard(optax.adam(0.1)), wrt=nnx.Param)

    def saved_tree(model, optimizer, stop):
        states = nnx.state(model), nnx.state(optimizer)
        return {"model": states[0], "optimizer": states[1], "stop": stop}

    stopper = og.early_stopping(og.stop.patience(2))
    model, optimizer = made()
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    stop = stopper.init(nnx.state(model))
    stop = stopper.update(1.0, stop, nnx.state(model))
    tree = saved_tree(model, optimizer, stop)

    other_model, other_optimizer = made()
    target = saved_tree(
        other_model, other_optimizer, stopper.init(nnx.state(other_model))
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", tree)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "nnx", target)
    nnx.update(other_model, found["model"])
    nnx.update(other_optimizer, found["optimizer"])
    assert bits(nnx.state(other_optimizer)) == bits(nnx.state(optimizer))
    assert bits(found["stop"]) == bits(stop)
    assert (
        og.find_state(other_optimizer, og.GuardState).clip_state.stats.num_updates == 1
    )
