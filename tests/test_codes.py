"""A state holds finite numbers only; by its name each number is what it was."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._guarding.adoption import in_new_layout, in_old_layout
from optax_guard._norms.statistics import NormStats, init_stats
from optax_guard._rows import replace_entries

SPECIAL = [math.nan, math.inf, -math.inf]


def stats(norm: float, clipped: float = 2.0) -> NormStats:
    state = replace_entries(init_stats(), grad_norm=7.0, clipped_norm=3.0)
    return replace_entries(state, grad_norm=norm, clipped_norm=clipped)


@pytest.mark.parametrize("number", [*SPECIAL, 5.0, -0.5])
def test_number_is_read_as_it_was_and_the_row_holds_the_last_finite_one(number):
    state: Any = stats(number)
    raw = number if math.isfinite(number) else 7.0
    assert state.norm_values.tolist() == [raw, 2.0, 0, 0, 0, 0, 0, 0]
    read = {
        "outside of jit": state,
        "NumPy": jax.device_get(state),
        "jit": jax.jit(lambda s: s.grad_norm)(state),
        "a population": jax.vmap(lambda _: state)(jnp.zeros(2)),
    }
    for way, found in read.items():
        value = getattr(found, "grad_norm", found)
        np.testing.assert_equal(np.unique(value), [np.float32(number)], err_msg=way)
        assert value.dtype == np.float32, way
    assert state.clipped_norm == 2.0


def test_codes_share_a_word_and_none_disturbs_another():
    for first in SPECIAL:
        for second in SPECIAL:
            state = stats(first, second)
            np.testing.assert_equal(float(state.grad_norm), first)
            np.testing.assert_equal(float(state.clipped_norm), second)
            # A later change of another number leaves both as they are.
            later = replace_entries(state, num_updates=3, norm_mean=1.0)
            np.testing.assert_equal(float(later.grad_norm), first)
            np.testing.assert_equal(float(later.clipped_norm), second)
            assert later.norm_values.tolist() == [7.0, 3.0, 0, 1.0, 0, 0, 0, 0]


def test_number_that_is_finite_again_has_no_code():
    state = replace_entries(stats(math.nan), grad_norm=4.0)
    assert state.grad_norm == 4.0
    assert state.norm_counts.tolist() == [0] * 8


@pytest.mark.parametrize("number", SPECIAL)
def test_number_survives_the_layout_of_an_older_version(number):
    old: Any = in_old_layout(stats(number))
    np.testing.assert_equal(float(old.grad_norm), number)
    np.testing.assert_equal(float(in_new_layout(old).grad_norm), number)


def test_reading_a_finite_number_alarms_no_debugger():
    state = stats(5.0)
    with jax.debug_nans(True), jax.debug_infs(True):
        assert state.grad_norm == 5.0
        assert jnp.isfinite(state.clipped_norm)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        _ = stats(math.nan).grad_norm


def test_row_of_the_skip_log_keeps_the_last_finite_numbers_of_its_slot():
    tx: Any = og.guard(optax.sgd(0.1), max_consecutive_skips=99)
    state, bad = tx.init(jnp.zeros(1)), jnp.array([jnp.nan])
    step = jax.jit(lambda state, grads, value: tx.update(grads, state, value=value)[1])
    state = step(state, jnp.ones(1), jnp.nan)
    for _ in range(16):
        state = step(state, bad, 0.25)
    # The seventeenth skipped step took the place of the first, whose norm was 1.
    assert state.skip_log.skipped_values[0].tolist() == [1.0, 0.25, 0, 0, 0, 0, 0, 0]
    rows = og.skipped_steps(state)
    assert all(math.isnan(row.grad_norm) and row.value == 0.25 for row in rows)


def test_mean_of_finite_micro_batches_is_finite():
    tx: Any = og.accumulate(og.guard(optax.sgd(1.0), clip=1.0), 4)
    grads, state = jnp.float32(3e38), tx.init(jnp.zeros(1))
    for sign in (1, -1, -1):
        _, state = tx.update(jnp.array([sign * grads]), state, value=sign * grads)
    np.testing.assert_allclose(state.value_mean, -1e38, rtol=1e-6)
    np.testing.assert_allclose(state.grad_mean, [-1e38], rtol=1e-6)
