"""Averages of the parameters at the last evaluations, against lists of all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_guard import early_stopping, stop

NAN, INF = np.nan, np.inf
# The value of each evaluation, and whether its parameters enter: not in the warm-up, if
# it is not finite, at the one that diverges, and after that.
VALUES = np.array(
    [9, 5, 4, NAN, 3, 3, INF, 4, 2, 2, 3, -INF, 1, 1, 2, 1, 99, 1], np.float32
)
ENTERS = np.array([0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0], bool)
BLOCKS = [1, 2, 3, 5, 30]
# Of a few whole numbers and a half, exact in bfloat16, whose means are not.
FLOATS = np.random.default_rng(0).integers(-200, 200, (len(VALUES), 3)) / 2


def expected(rows: np.ndarray, k: int) -> np.ndarray | None:
    """The mean over the last full block of k, and those since then."""
    full = len(rows) // k * k
    return rows[max(full - k, 0) :].mean(0) if len(rows) else None


@functools.cache
def averages() -> Any:
    """The average after each evaluation, [size of block, evaluation]; k is traced."""

    def one(k: jax.Array) -> Any:
        stopper = early_stopping(
            stop.divergence(50.0), nonfinite="ignore", warmup=1, average_last=k
        )

        def judge(state: Any, seen: Any) -> Any:
            value, params = seen
            state = stopper.update(value, state, params)
            return state, stopper.average(state, params)

        first = jax.tree.map(lambda x: x[0], rows)
        return jax.lax.scan(judge, stopper.init(first), (VALUES, rows))[1]

    rows = {
        "float": jnp.asarray(FLOATS, jnp.float32),
        "half": jnp.asarray(FLOATS, jnp.bfloat16),
        "complex": jnp.asarray(FLOATS * 1j, jnp.complex64),
        "whole": jnp.arange(len(VALUES)),
        "huge": jnp.full(len(VALUES), -3e38).at[::2].set(3e38),
        "masked": jnp.full(len(VALUES), -INF),
    }
    return jax.device_get(jax.jit(jax.vmap(one))(jnp.array(BLOCKS)))


@pytest.mark.parametrize("k", BLOCKS)
def test_average_is_the_mean_over_the_last_evaluations(k):
    found = jax.tree.map(lambda x: x[BLOCKS.index(k)], averages())
    for i in range(len(VALUES)):
        entered = np.flatnonzero(ENTERS[: i + 1])
        mean = expected(FLOATS[entered], k)
        # Until one has entered, the parameters that were given.
        mean = FLOATS[i] if mean is None else mean
        np.testing.assert_allclose(found["float"][i], mean, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found["complex"][i], mean * 1j, rtol=1e-5, atol=1e-4)
        # Summed in float32, and rounded once.
        np.testing.assert_allclose(
            found["half"][i].astype(float), mean, rtol=2**-8, atol=1e-4
        )
        # A whole number is the newest.
        assert found["whole"][i] == (entered[-1] if len(entered) else i)
    assert np.isfinite(found["huge"]).all()
    assert (found["masked"] == -INF).all()


AVERAGING = early_stopping(stop.patience(99), average_last=2)


def average_over(rows: Any, state: Any = None) -> tuple[Any, np.ndarray]:
    """The state after evaluations of these parameters, and the average then."""
    state = AVERAGING.init(jnp.zeros(2)) if state is None else state
    for row in np.asarray(rows, np.float32):
        state = AVERAGING.update(1.0, state, row)
    return state, np.asarray(AVERAGING.average(state, np.full(2, 9.0, np.float32)))


def test_equal_parameters_are_their_own_average_to_the_last_bit():
    row = np.array([0.1, 1e30], np.float32)
    for n in (1, 2, 3, 8):
        np.testing.assert_array_equal(average_over([row] * n)[1], row)


def test_entries_that_are_not_finite_do_not_enter():
    # One that does not enter has the mean of its block, or none.
    _, average = average_over([[1.0, 2.0], [NAN, 4.0], [3.0, INF]])
    np.testing.assert_allclose(average, [(1 + 1 + 3) / 3, 3.0], rtol=1e-6)
    _, average = average_over([[1.0, NAN], [2.0, -INF], [3.0, 5.0]])
    np.testing.assert_allclose(average, [2.0, 5.0], rtol=1e-6)


def test_reset_keeps_the_average_or_forgets_it():
    state, average = average_over([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])
    assert average.tolist() == [3.0, 3.0]
    assert average_over([], AVERAGING.reset(state))[1].tolist() == [3.0, 3.0]
    forgotten = AVERAGING.reset(state, keep_best=False)
    assert average_over([], forgotten)[1].tolist() == [9.0, 9.0]
    assert average_over([[5.0, 6.0]], forgotten)[1].tolist() == [5.0, 6.0]


def test_states_and_parameters_that_do_not_fit_are_refused():
    plain = early_stopping(stop.patience(2))
    averaging = early_stopping(stop.patience(2), average_last=2)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"`average` finds no .* average_last=5.*init"):
        plain.average(plain.init(params), params)
    with pytest.raises(ValueError, match=r"another stopper: .* without `average_last`"):
        averaging.update(1.0, plain.init(params), params)
    with pytest.raises(ValueError, match=r"another stopper: .* with `average_last`"):
        plain.update(1.0, averaging.init(params), params)
    state = averaging.init(params)
    with pytest.raises(
        ValueError, match=r"`default` of `average` must be like .*, got float32\[4"
    ):
        averaging.average(state, {"w": jnp.ones(4)})
    # A loop whose best are on disk.
    state = state._replace(best_params=None)
    with pytest.raises(ValueError, match="`params` of `update` are missing"):
        averaging.update(1.0, state)
    assert averaging.update(1.0, state, params).best_params is None
    # Without parameters it stops as ever, as `analysis.replay` plays it.
    assert averaging.update(1.0, averaging.init()).recent_params == ()


def test_a_state_without_an_average_is_saved_as_before_there_were_any():
    pytest.importorskip("orbax.checkpoint")
    from optax_guard.loops._orbax import savable

    fields = "should_stop is_best is_significant stop_counts stop_values best_params"
    fields = [*fields.split(), "rule_state", "smooth_state"]
    plain = early_stopping(stop.patience(2)).init(jnp.ones(2))
    assert list(savable([plain])[0]._fields) == fields
    assert list(savable([AVERAGING.init(jnp.ones(2))])[0]._fields) == [
        *fields,
        "recent_params",
    ]
