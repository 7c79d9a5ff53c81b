"""`fit(on_skip="explain")`: the operation behind a skipped step."""

from typing import Any

import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from optax_guard.flax import TrainState, fit
from optax_guard.loops import Checkpointer, Rewind

GUARDED = og.guard(optax.sgd(0.1), max_consecutive_skips=3)


def made(tx: Any = GUARDED) -> TrainState:
    return TrainState.create(apply_fn=str, params=jnp.ones(2), tx=tx)


def loss_fn(params, x):
    return jnp.mean((params - jnp.log(x)) ** 2)  # the bad line


def train_step(state, x):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
    return state.apply_gradients(grads=grads, value=loss), loss


def with_zeros(*bad: int):
    """Batches of ones, but of these steps with a zero in the second entry."""
    return lambda step: np.array([1.0, 0.0 if step in bad else 1.0], np.float32)


LENGTH: Any = {"num_steps": 9, "eval_every": 3, "on_skip": "explain"}


def test_first_bad_batch_of_an_interval_is_explained(capsys):
    result = fit(made(), train_step, with_zeros(4, 5, 8), **LENGTH)

    assert [row["num_skipped"] for row in result.history] == [0, 2, 3]
    assert [step for step, _ in result.origins] == [4, 8]
    for _, origin in result.origins:
        assert origin is not None
        assert (origin.kind, origin.primitive) == ("inf", "log")
        assert origin.source.endswith("# the bad line")
        assert origin.first_bad == (1,)
    printed = capsys.readouterr().out
    assert "Step 4 was skipped. Inf from `log` in the forward pass at" in printed
    gradients = [line for line in printed.splitlines() if "Its gradients" in line]
    assert gradients == ["  Its gradients: Inf in the only leaf."] * 2


def test_steps_are_counted_from_those_of_the_state_that_was_given():
    first = fit(made(), train_step, with_zeros(1), num_steps=3, eval_every=3)
    assert first.origins == ()
    result = fit(first.state, train_step, with_zeros(1, 7), **LENGTH)
    assert [step for step, _ in result.origins] == [7]


def test_step_that_was_bad_by_its_state_does_not_recur(capsys):
    def step(state, x):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x)
        loss = jnp.where(state.step == 1, jnp.nan, loss)
        return state.apply_gradients(grads=grads, value=loss), loss

    result = fit(made(), step, with_zeros(), **LENGTH)
    assert result.origins == ((1, None),)
    assert "does not recur" in capsys.readouterr().out


def test_cause_is_told_before_an_exhausted_guard_raises(capsys):
    with pytest.raises(og.GuardExhaustedError):
        fit(made(), train_step, with_zeros(*range(9)), **LENGTH)
    assert "Step 0 was skipped. Inf from `log`" in capsys.readouterr().out


def test_cause_is_told_before_a_rewind(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    store: Any = {
        "checkpointer": Checkpointer(tmp_path),
        "rewind": Rewind(times=1, lr_factor=1.0),
        "evaluate": lambda state: jnp.sum(state.params**2),
        "stopper": og.early_stopping(og.stop.patience(9)),
    }
    with pytest.warns(UserWarning, match="back to the checkpoint of step 3"):
        result = fit(made(), train_step, with_zeros(3, 4, 5), **store, **LENGTH)
    assert result.history[-1]["rewinds"] == 1
    assert result.origins[0][0] == 3


def test_run_without_skips_costs_nothing_more(monkeypatch):
    counts = {"trace": 0, "get": 0}
    device_get = jax.device_get

    def counted_get(x):
        counts["get"] += 1
        return device_get(x)

    def counted_step(state, x):
        counts["trace"] += 1
        return train_step(state, x)

    monkeypatch.setattr(jax, "device_get", counted_get)
    seen = []
    for on_skip in (None, "explain"):
        counts.update(trace=0, get=0)
        length = {**LENGTH, "on_skip": on_skip}
        # A function of its own for each run: both are traced.
        result = fit(made(), lambda *args: counted_step(*args), with_zeros(), **length)
        assert result.origins == ()
        seen.append(dict(counts))
    assert seen[0] == seen[1]
    assert seen[0]["trace"] == 1


def test_what_cannot_be_explained_is_refused():
    fails: list[tuple[str, Any, Any, Any]] = [
        ('must be "explain" or `None`, got True', made(), with_zeros(), True),
        ("needs a guard", made(optax.sgd(0.1)), with_zeros(), "explain"),
        ("must be a function `step -> batch`", made(), [np.ones(2)], "explain"),
        ("this optimizer accumulates", made(og.accumulate(GUARDED, 2)), str, "explain"),
    ]
    for text, state, batches, on_skip in fails:
        with pytest.raises(ValueError, match=f"`on_skip` .*{text}"):
            fit(state, train_step, batches, **{**LENGTH, "on_skip": on_skip})
