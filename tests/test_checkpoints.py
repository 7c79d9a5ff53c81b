"""Checkpoints that are damaged, unfit or saved by hand: nothing is lost or silent."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

import optax_guard as og
from optax_guard.flax import Checkpointer, Rewind, TrainState, fit, load_best
from optax_guard.loops import _store
from optax_guard.loops._intact import damage_of

EVAL_EVERY = 2
PATIENT = og.early_stopping(og.stop.patience(20), nonfinite="wait")
TX = optax.sgd(0.1, momentum=0.5)
# Best at step 4.
VALUES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0, 10: 2.0}


def made(w: Any = (1.0, -1.0)):
    params = {"w": jnp.asarray(w, jnp.float32)}
    return TrainState.create(apply_fn=str, params=params, tx=TX)


def train_step(state, x):
    grads = {"w": state.params["w"] - x}
    return state.apply_gradients(grads=grads), jnp.sum(grads["w"] ** 2)


def batches(step):
    return np.random.default_rng(step).normal(size=2).astype(np.float32)


def run(
    directory, num_steps=8, *, values: Any = VALUES, data: Any = batches, **changes
):
    return fit(
        made(),
        train_step,
        data,
        num_steps=num_steps,
        eval_every=EVAL_EVERY,
        # Before the first step, it is called once more.
        evaluate=lambda state: values.get(int(state.step), 9.0),
        checkpointer=Checkpointer(directory),
        **{"stopper": PATIENT, **changes},
    )


def descend(data, num_steps):
    """The same in float64."""
    w, v = np.array([1.0, -1.0]), np.zeros(2)
    for step in range(num_steps):
        v = (w - data(step)) + 0.5 * v
        w = w - 0.1 * v
    return w


def files_of(checkpoint):
    """All files with a digest."""
    names = "optax_guard_digest.json", "_CHECKPOINT_METADATA"
    top = checkpoint / "commit_success.txt"  # Orbax writes it at the very end.
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return [path for path in files if path.name not in names and path != top]


def flip(path, bit):
    found = bytearray(path.read_bytes())
    found[bit // 8 % len(found)] ^= 1 << bit % 8
    path.write_bytes(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 4, the best, 6 and 8."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    run(directory)
    return directory


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_every_flipped_bit_and_every_loss_is_found(folder):
    path = epath.Path(folder)
    assert damage_of(path, 8) is None
    random = np.random.default_rng(0)
    for file in files_of(folder / "8"):
        before, name = file.read_bytes(), file.relative_to(folder / "8").as_posix()
        for bit in random.integers(0, 8 * len(before), 4):
            flip(file, bit)
            assert damage_of(path, 8) == f"{name} is not as it was saved"
            flip(file, bit)
        file.write_bytes(before[:-1])
        assert damage_of(path, 8) == f"{name} is not as it was saved"
        file.unlink()
        assert damage_of(path, 8) == f"{name} is missing"
        file.write_bytes(before)
    assert damage_of(path, 8) is None
    digest = folder / "8" / "optax_guard_digest.json"
    before = digest.read_bytes()
    for bit in random.integers(0, 8 * len(before), 64):
        flip(digest, bit)
        # A name or a number; what is not read may be anything.
        is_read = json.loads(before)["files"] != _files_read(digest)
        assert (damage_of(path, 8) is not None) == is_read
        flip(digest, bit)
    digest.unlink()
    assert damage_of(path, 8) == "optax_guard_digest.json is missing"


def _files_read(digest):
    try:
        return json.loads(digest.read_text())["files"]
    except (ValueError, KeyError):
        return None


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(saved, folder):
    whole = run(shutil.copytree(saved, folder.parent / "whole"), 10)
    flip(files_of(folder / "8")[-1], 77)
    with pytest.warns(UserWarning, match=r"\(step 8: .* is not as .* from step 6"):
        found = run(folder, 10)
    assert found.history == whole.history
    for mine, other in zip(
        jax.tree.leaves((found.state, found.stop, found.best_params)),
        jax.tree.leaves((whole.state, whole.stop, whole.best_params)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, other)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("4", "8", "10", "damaged-8"),
    }


def test_damaged_best_is_never_silently_another(folder):
    flip(files_of(folder / "4")[-1], 77)
    with pytest.raises(RuntimeError, match=r"of step 4 in .*Those of \[8, 6\] are"):
        load_best(folder)
    with pytest.warns(UserWarning, match="step 4 in .* are those of the last step"):
        found = run(folder, 10)
    np.testing.assert_array_equal(found.best_params["w"], found.state.params["w"])


def test_best_of_before_a_damaged_latest_is_loaded_with_a_warning(folder):
    flip(files_of(folder / "8")[-1], 77)
    with pytest.warns(UserWarning, match=r"are damaged \(step 8: .* of step 4"):
        best = load_best(folder)
    np.testing.assert_allclose(best["params"]["w"], descend(batches, 4), rtol=1e-6)


def test_when_all_are_damaged_nothing_is_touched(folder):
    for step in ("4", "6", "8"):
        flip(files_of(folder / step)[-1], 77)
    before = {path: path.stat().st_mtime for path in folder.rglob("*")}
    for use in (run, load_best):
        with pytest.raises(RuntimeError, match=r"No checkpoint .* step 6: .* step 4: "):
            use(folder)
    before.pop(folder / ".lock", None)
    assert before.items() <= {p: p.stat().st_mtime for p in folder.rglob("*")}.items()


def test_rewind_goes_to_the_latest_that_is_intact(folder):
    flip(files_of(folder / "4")[-1], 77)
    values = {**VALUES, 10: 99.0, 12: 0.5}
    with pytest.warns(UserWarning, match="step") as caught:
        found = run(
            folder,
            12,
            values=values,
            rewind=Rewind(lr_factor=1.0, max_rise=10.0),
        )
    told = [str(each.message) for each in caught]
    assert "step 4: " in told[0]
    assert told[1].startswith("At step 10, back to the checkpoint of step 8, ")
    assert found.rewinds[0][:2] == (10, 8)


def test_later_format_is_refused_and_the_format_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_store, "FORMAT", 3)
    run(tmp_path, 2)
    text = (tmp_path / "2" / "metadata" / "metadata").read_text()
    assert json.loads(text)["format"] == 3
    for use in (run, load_best):
        with pytest.raises(RuntimeError, match=r"has format 3, .* up to 2 .* step 2"):
            use(tmp_path)


def test_two_runs_in_one_directory_are_refused(saved):
    def other(step):
        return run(saved, 12)

    with pytest.raises(RuntimeError, match="`directory` is in use by another run: /"):
        run(saved, 10, data=other)


def test_orbax_v1_reads_the_checkpoints(folder):
    found: Any = ocp.v1.load_checkpointables(
        folder / "4", {"variables": {"params": {"w": np.zeros(2, np.float32)}}}
    )
    expected = descend(batches, 4)
    np.testing.assert_allclose(found["variables"]["params"]["w"], expected, rtol=1e-6)


# What must not be resumed from ------------------------------------------------------


def with_nan(step):
    return batches(step) * (np.nan if step == 4 else 1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": with_nan, "stopper": None}, "not finite in params/w"),
        ({"values": {**VALUES, 6: np.nan, 8: np.inf}}, "a value that is not finite"),
    ],
)
def test_bad_evaluation_is_no_point_to_resume_from(tmp_path, changes, why):
    """And displaces none, though only one is kept."""
    with pytest.warns(UserWarning, match=f"step 6 is not saved, because of .*{why}"):
        run(tmp_path, **changes)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "4"]
    # What was bad is good now, and the run is that without a fault.
    found = run(tmp_path, **{**changes, "data": batches, "values": VALUES})
    np.testing.assert_allclose(found.state.params["w"], descend(batches, 8), rtol=1e-6)
    assert [row["step"] for row in found.history] == [2, 4, 6, 8]


def test_run_that_ends_as_diverged_ends_at_its_last_good_checkpoint(tmp_path):
    stopper = og.early_stopping(og.stop.divergence(ratio=9.0))
    values = {**VALUES, 8: 10.1}
    assert run(tmp_path, 10, values=values, stopper=stopper).state.step == 8
    assert (tmp_path / "6").exists()
    assert not (tmp_path / "8").exists()


# A loop of one's own ----------------------------------------------------------------


def loop(checkpointer, num_steps=8, cut=None, values: Any = VALUES, stopper=PATIENT):
    """A loop as users write it."""
    with checkpointer:
        first = made()
        step, state, stop = checkpointer.restore(
            first, stopper.init(first.params), stopper=stopper
        )
        while step < num_steps and not stop.should_stop:
            if step == cut:
                raise OSError("disk on fire")
            state, _ = train_step(state, batches(step))
            step += 1
            if step % EVAL_EVERY == 0:
                stop = stopper.update(values[step], stop, state.params, step=step)
                checkpointer.save(step, state, stop)
        return state, stop


def test_loop_of_ones_own_that_is_cut_goes_on(tmp_path):
    whole = loop(Checkpointer(tmp_path / "whole"))
    with pytest.raises(OSError, match="disk on fire"):
        loop(Checkpointer(tmp_path / "cut"), cut=7)
    found = loop(Checkpointer(tmp_path / "cut"))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    expected = descend(batches, 4)
    for best in (load_best(tmp_path / "cut")["params"], found[1].best_params):
        np.testing.assert_allclose(best["w"], expected, rtol=1e-6)
    names = [path.name for path in (tmp_path / "cut").iterdir() if path.is_dir()]
    assert sorted(names) == ["4", "6", "8"]


def test_loop_of_ones_own_keeps_the_rules(tmp_path, folder):
    flip(files_of(folder / "8")[-1], 77)
    checkpointer = Checkpointer(folder)
    with pytest.warns(UserWarning, match="step 8: .* from step 6") as caught:
        step, state, stop = checkpointer.restore(made(), PATIENT.init())
    assert caught[0].filename == __file__
    assert step == 6
    np.testing.assert_allclose(state.params["w"], descend(batches, 6), rtol=1e-6)
    with pytest.raises(ValueError, match=r"`step` must be above .* checkpoint, 6, got"):
        checkpointer.save(6, state, stop)
    with pytest.raises(RuntimeError, match="in use by another run"):
        run(folder)
    bad = PATIENT.update(np.nan, stop)
    with pytest.warns(UserWarning, match="step 8 is not saved, because of a value"):
        assert not checkpointer.save(8, state, bad)
    assert checkpointer.save(10, state, stop)
    checkpointer.close()
    assert (folder / "10").exists()
    run(folder, 10)


def test_stopped_loop_of_ones_own_goes_on_on_purpose(tmp_path):
    stopper = og.early_stopping(og.stop.patience(1))
    _, stop = loop(Checkpointer(tmp_path), stopper=stopper)
    assert "continue_stopped=True" in og.explain(stop)
    again = Checkpointer(tmp_path, continue_stopped=True)
    state, stop = loop(again, values={**VALUES, 8: 0.5}, stopper=stopper)
    assert state.step == 8
    assert og.explain(stop) == "running, best 0.5 at evaluation 4 (step 8)"
    stop = stopper.update(2.0, stopper.update(1.0, stopper.init()))
    with Checkpointer(tmp_path / "stopped", continue_stopped=True) as checkpointer:
        checkpointer.save(1, made(), stop)
        with pytest.raises(ValueError, match="`continue_stopped` needs `stopper`"):
            checkpointer.restore(made(), stopper.init())
