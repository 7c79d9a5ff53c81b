"""Faults in runs of `fit`, each of which the run survives or names.

A fault of `FAULTS` is put into a small run at a random place. It returns the result in
the end: of that run, or, if it ended with an error, of one started again. `EXACT` are
those after which nothing may differ from the run without a fault.
"""

import pathlib
import shutil
import signal
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.flax import Checkpointer, FitResult, Rewind, TrainState, fit
from optax_guard.loops import _fit

NUM_STEPS, EVAL_EVERY, DIM = 48, 12, 8
# The update at which the bad schedule gives NaN.
NAN_AT = 20
WEIGHTS = np.linspace(-1, 1, DIM)
STOPPER = og.early_stopping(og.stop.patience(NUM_STEPS), nonfinite="wait")


def guarded(schedule: Any) -> optax.GradientTransformation:
    spike = og.skip.spike(window=32, min_history=16)
    return og.guard(optax.adam(schedule), clip=1.0, skip=spike, max_consecutive_skips=4)


GOOD = guarded(lambda count: 0.1)
BAD = guarded(lambda count: jnp.where(count == NAN_AT, jnp.nan, 0.1))


def loss_fn(w: Any, batch: Any) -> Any:
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def train_step(state: Any, batch: Any) -> Any:
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads, value=loss), loss


@jax.jit
def evaluate(state: Any) -> Any:
    x = np.random.default_rng(10**6).normal(size=(64, DIM))
    return loss_fn(state.params.astype(jnp.float32), (x, x @ WEIGHTS))


def batch_of(seed: int, step: int, dtype: Any = np.float32) -> Any:
    random = np.random.default_rng([seed, step])
    x = random.normal(size=(16, DIM))
    return x.astype(dtype), (x @ WEIGHTS + 0.1 * random.normal(size=16)).astype(dtype)


class Stream:
    """The batches of a seed, as an iterator with a state."""

    def __init__(self, seed: int, bad_step: int = -1, fault: Any = None):
        self.seed, self.bad_step, self.fault, self.step = seed, bad_step, fault, 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Any:
        batch = batch_of(self.seed, self.step)
        if self.step == self.bad_step:
            batch = self.fault(batch)
        self.step += 1
        return batch

    def get_state(self) -> Any:
        return {"step": self.step}

    def set_state(self, state: Any) -> None:
        self.step = state["step"]


class Run:
    """A run of one seed, in a folder of its own or without checkpoints.

    Attributes:
      random: The place of its fault.
      at: The step of its fault, when the spike rule has seen enough.
    """

    def __init__(self, seed: int, folder: pathlib.Path | None = None):
        self.seed, self.folder = seed, folder
        self.random = np.random.default_rng([seed, 1])
        self.at = int(self.random.integers(EVAL_EVERY + 6, NUM_STEPS - 4))

    def fit(
        self, data: Any = None, dtype: Any = np.float32, **changes: Any
    ) -> FitResult:
        """The run, with what is changed."""
        start = np.random.default_rng([self.seed, 2]).normal(size=DIM)
        tx = changes.pop("tx", GOOD)
        params = jnp.asarray(start, dtype)
        saving: dict[str, Any] = {}
        if self.folder is not None:
            # An iterator leaves no batches out.
            leave_out = 0 if isinstance(data, Stream) else 2
            saving["checkpointer"] = Checkpointer(self.folder)
            saving["rewind"] = Rewind(lr_factor=1.0, max_rise=5.0, leave_out=leave_out)
        return fit(
            TrainState.create(apply_fn=str, params=params, tx=tx),
            train_step,
            data or (lambda step: batch_of(self.seed, step, dtype)),
            **{
                "num_steps": NUM_STEPS,
                "eval_every": EVAL_EVERY,
                "evaluate": evaluate,
                "stopper": STOPPER,
                **saving,
                **changes,
            },
        )

    def with_batch(self, fault: Callable[[Any], Any], **changes: Any) -> FitResult:
        """The run in which one batch goes through a fault."""
        dtype = changes.get("dtype", np.float32)

        def batches(step: int) -> Any:
            batch = batch_of(self.seed, step, dtype)
            return fault(batch) if step == self.at else batch

        return self.fit(batches, **changes)


def burn(*args: Any) -> Any:
    """Anything that the user's code or the machine may raise."""
    raise OSError("disk on fire")


def after(error: Any, match: str, first: Callable[[], Any], again: Any) -> Any:
    """The run that is started again after one that ended with this error."""
    with pytest.raises(error, match=match):
        first()
    return again()


def scaled(factor: float) -> Callable[[Run], FitResult]:
    """One batch times a factor."""

    def fault(run: Run) -> FitResult:
        result = run.with_batch(lambda batch: (batch[0] * np.float32(factor), batch[1]))
        assert result.history[-1]["num_skipped"] == 1
        return result

    return fault


def with_iterator(fault: Any, error: Any, match: str) -> Callable[[Run], FitResult]:
    """One batch of an iterator with a state is spoilt, or does not come."""

    def faulty(run: Run) -> FitResult:
        data, good = Stream(run.seed, run.at, fault), Stream(run.seed)
        return after(error, match, lambda: run.fit(data), lambda: run.fit(good))

    return faulty


def of_wrong_shape(batch: Any) -> Any:
    return batch[0][:, 1:], batch[1]


def raising_evaluate(run: Run) -> FitResult:
    def faulty(state: Any) -> Any:
        return burn() if int(state.step) > run.at else evaluate(state)

    return after(OSError, "on fire", lambda: run.fit(evaluate=faulty), run.fit)


def raising_logger(run: Run) -> FitResult:
    def log(step: int, row: Any) -> None:
        if step > run.at:
            burn()

    return after(OSError, "on fire", lambda: run.fit(loggers=[log]), run.fit)


def preemption(run: Run) -> FitResult:
    def terminate(batch: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return batch

    # In the last interval the run comes to its end all the same.
    is_before = run.at < NUM_STEPS - EVAL_EVERY
    assert run.with_batch(terminate).preempted == is_before
    return run.fit()


def damage(run: Run, harm: Callable[[bytearray], Any]) -> FitResult:
    """A file of the latest checkpoint is harmed. It is named, one before is used."""
    assert run.folder is not None
    run.fit(num_steps=NUM_STEPS - EVAL_EVERY)
    checkpoint = run.folder / str(NUM_STEPS - EVAL_EVERY)
    files = [
        path
        for path in sorted(checkpoint.rglob("*"))
        # Orbax writes and reads these two beside the data.
        if path.is_file()
        and path.name != "_CHECKPOINT_METADATA"
        and path != checkpoint / "commit_success.txt"
    ]
    path = files[run.random.integers(len(files))]
    found = bytearray(path.read_bytes())
    path.write_bytes(harm(found) or found)
    with pytest.warns(UserWarning, match=rf"Damaged .* \(step {checkpoint.name}: "):
        return run.fit()


def bit_flip(run: Run) -> FitResult:
    def flip(found: bytearray) -> None:
        found[run.random.integers(len(found))] ^= 1 << int(run.random.integers(8))

    return damage(run, flip)


def truncation(run: Run) -> FitResult:
    return damage(run, lambda found: found[: run.random.integers(1, len(found))])


def nan_schedule(run: Run) -> FitResult:
    try:
        return run.fit(tx=BAD)
    except og.GuardExhaustedError:  # It names the schedule.
        return run.fit()


def float16_underflow(run: Run) -> FitResult:
    """A gradient far below 6e-8 is zero, so that the step does nothing."""
    tiny = np.float16(1e-7)
    return run.with_batch(lambda b: (b[0] * tiny, b[1] * tiny), dtype=np.float16)


def two_runs_in_one_folder(run: Run) -> FitResult:
    def other(batch: Any) -> Any:
        with pytest.raises(RuntimeError, match="in use by another run"):
            run.fit()
        return batch

    return run.with_batch(other)


def silent_corruption(run: Run) -> FitResult:
    """A device flips a bit of a result."""
    compiled, calls = _fit.compiled_step, iter(range(10**6))
    wrong, bit = 2 * run.at + int(run.random.integers(2)), int(run.random.integers(32))

    def on_bad_device(step: Any) -> Any:
        honest = compiled(step)

        def run_step(*args: Any) -> Any:
            state, interval = honest.run_step(*args)
            if next(calls) == wrong:
                w = np.array(state.params)
                w.view(np.uint32)[0] ^= np.uint32(1) << bit
                state = state.replace(params=jnp.asarray(w))
            return state, interval

        return honest._replace(run_step=run_step)

    def audited() -> Any:
        with mock.patch.object(_fit, "compiled_step", on_bad_device):
            run.fit(audit_every=1)

    return after(RuntimeError, f"corruption at step {run.at}: ", audited, run.fit)


FAULTS: dict[str, Callable[[Run], FitResult]] = {
    "NaN batch": scaled(np.nan),
    "infinite batch": scaled(np.inf),
    "huge batch": scaled(1e6),
    "poisoned iterator": with_iterator(of_wrong_shape, TypeError, "dot_general"),
    "raising iterator": with_iterator(burn, OSError, "on fire"),
    "raising evaluate": raising_evaluate,
    "raising logger": raising_logger,
    "SIGTERM": preemption,
    "bit flip": bit_flip,
    "truncation": truncation,
    "NaN schedule": nan_schedule,
    "float16 underflow": float16_underflow,
    "two runs in one folder": two_runs_in_one_folder,
    "silent data corruption": silent_corruption,
}
EXACT = set(FAULTS) - {
    *("NaN batch", "infinite batch", "huge batch", "NaN schedule", "float16 underflow")
}


def outcome(name: str, seed: int, folder: pathlib.Path) -> FitResult:
    """The result of a run with this fault, in a folder that is removed."""
    try:
        with warnings.catch_warnings():
            # `fit` grows no warning that is not asked for above.
            warnings.simplefilter("error")
            return FAULTS[name](Run(seed, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
