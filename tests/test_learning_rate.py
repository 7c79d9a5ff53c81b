"""The learning rate in a history, against the schedule in plain Python."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

import optax_guard as og
from optax_guard.analysis import Diagnosis, History, table
from optax_guard.flax import TrainState, fit
from optax_guard.loops import train_on_device


def schedule(count):
    return 0.1 / (1.0 + count)


def train_step(state, x):
    loss, grads = jax.value_and_grad(lambda p: (p * x) ** 2)(state.params)
    return state.apply_gradients(grads=grads, value=loss), loss


def made(tx):
    return TrainState.create(apply_fn=str, params=jnp.array(3.0), tx=tx)


INJECTED = og.guard(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
LENGTH: dict[str, Any] = {"num_steps": 6, "eval_every": 2}
# Steps 2 and 3 of 6, from 0, are skipped.
BAD = jnp.array([1.0, 1.0, jnp.nan, jnp.nan, 1.0, 1.0])
# The last update before steps 2, 4 and 6 was the second, that one still, the fourth.
RATES = [schedule(1), schedule(1), schedule(3)]


def test_rate_is_that_of_the_last_update_that_was_not_skipped():
    injected = fit(made(INJECTED), train_step, lambda step: BAD[step], **LENGTH)
    given = fit(
        made(og.guard(optax.sgd(schedule))),
        train_step,
        lambda step: BAD[step],
        learning_rate=schedule,
        **LENGTH,
    )
    for result in (injected, given):
        rates = [row["learning_rate"] for row in result.history]
        np.testing.assert_allclose(rates, RATES, rtol=1e-6)
    assert "learning rate" in table(given.history).splitlines()[0]


def test_loop_on_the_device_records_it_too():
    result = train_on_device(
        made(INJECTED), train_step, lambda step: BAD[step], **LENGTH
    )
    rates = [row["learning_rate"] for row in result.history]
    np.testing.assert_allclose(rates, RATES, rtol=1e-6)


def test_plateau_scales_it_and_a_value_of_ones_own_is_kept():
    tx = optax.chain(optax.sgd(0.1), og.stop.scale_by_plateau())
    stopper = og.early_stopping(og.stop.plateau(1, factor=0.5, max_reductions=1))
    how: dict[str, Any] = {
        "train_step": train_step,
        "batches": lambda step: 1.0,
        **LENGTH,
    }
    result = fit(
        made(og.guard(tx)),
        evaluate=lambda state: 1.0,
        stopper=stopper,
        learning_rate=lambda count: 0.1,
        **how,
    )
    # The first evaluation is the best, the second halves the rate of the third.
    rates = [row["learning_rate"] for row in result.history]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.05], rtol=1e-6)
    own = fit(made(INJECTED), evaluate=lambda state: {"learning_rate": 7.0}, **how)
    assert [row["learning_rate"] for row in own.history] == [7.0] * 3
    plain = fit(made(og.guard(tx)), **how)
    assert "learning_rate" not in plain.history[0]


def test_progress_prints_a_finding_below_the_row_at_which_it_first_holds(capsys):
    pytest.importorskip("rich")
    how: dict[str, Any] = {"train_step": train_step, "batches": lambda step: 1.0}
    how |= {"num_steps": 6, "eval_every": 1}
    tx = og.guard(optax.sgd(0.1), clip=1.0)
    fit(made(tx), progress=True, **how)
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines]
    assert words == ["step", "1", "2", "3", "4", "INFO", "5", "6"]
    assert "CLIPPING_WORKS (step 4)" in lines[5]
    # One of one's own is enough; and a history needs no words.
    fit(made(tx), progress=True, loggers=[Diagnosis(), History()], **how)
    assert capsys.readouterr().out.count("CLIPPING_WORKS") == 1
