"""Sums and means in two words. The oracle is float64 NumPy."""

import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optax_guard as og
from optax_guard._norms.two_words import (
    add_in_two_words,
    mean_of,
    no_values,
    with_value,
)
from optax_guard.flax import TrainState, fit
from optax_guard.loops import train_on_device, train_population

N = 500_000
RNG = np.random.default_rng(0)
# A plain float32 mean of most of these is wrong by 1e-5 to 1e-2, or infinite.
SERIES = {
    "constant": np.full(N, 0.1),
    "uniform": RNG.uniform(0, 1, N),
    "falling": np.exp(-np.arange(N) / 5e4),
    "rising": np.arange(N) / N,
    "heavy": RNG.lognormal(0, 3, N),
    "tiny": 1e-25 * RNG.uniform(0.5, 1, N),
    "huge": 3e38 * RNG.uniform(0.5, 1, N),
    "of both signs": 3e38 * RNG.choice([-1, 1, 1], N),
    "one size, then another": np.repeat([1e4, 1.0], N // 2),
    "with bad values": np.where(np.arange(N) % 7, 0.1, np.resize([np.nan, np.inf], N)),
}


def mean_by_scan(values: jax.Array) -> Any:
    """The mean, and its two words."""

    def add(mean: Any, value: jax.Array) -> tuple[Any, None]:
        return with_value(mean, value), None

    mean, _ = jax.lax.scan(add, no_values(), values)
    return mean_of(mean), mean.words


@pytest.fixture(scope="module")
def means() -> Any:
    values = np.stack([x.astype(np.float32) for x in SERIES.values()])
    found, words = jax.jit(jax.vmap(mean_by_scan))(values)
    return dict(zip(SERIES, zip(values, found, words, strict=True), strict=True))


@pytest.mark.parametrize("name", SERIES)
def test_mean_of_many_values_is_right(name, means):
    values, found, _ = means[name]
    finite = values[np.isfinite(values)].astype(np.float64)
    assert float(found) == pytest.approx(finite.mean(), rel=2e-7)


def test_rest_is_not_simplified_away(means):
    # Compiled, alone and in a batch, XLA keeps the order of additions.
    values, _, words = means["uniform"]
    assert float(words[1]) != 0
    alone = jax.jit(mean_by_scan)(jnp.asarray(values))[1]
    eager = no_values()
    for value in values[:200]:
        eager = with_value(eager, jnp.float32(value))
    compiled = jax.jit(mean_by_scan)(jnp.asarray(values[:200]))[1]
    exact = [np.sum(np.asarray(w, np.float64)) for w in (words, alone)]
    assert exact[0] == pytest.approx(exact[1], rel=1e-9)
    exact = [np.sum(np.asarray(w, np.float64)) for w in (eager.words, compiled)]
    assert exact[0] == pytest.approx(exact[1], rel=1e-9)


def test_sum_of_two_words_is_exact():
    number = rest = jnp.float32(0)
    values = RNG.normal(size=400).astype(np.float32) * 10.0 ** RNG.integers(-6, 6, 400)
    exact = Fraction(0)
    add = jax.jit(add_in_two_words)
    for value in values.astype(np.float32):
        number, rest = add(number, rest, value)
        exact += Fraction(float(value))
    found = Fraction(float(number)) + Fraction(float(rest))
    assert abs(found / exact - 1) < 1e-12
    assert np.float32(float(exact)) == number


# Rows of a history -----------------------------------------------------------------


def train_step(loss: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    del batch
    return state.apply_gradients(grads=jnp.full((1,), 0.1)), loss


def row_of(loop: str, loss: np.float32, num_steps: int) -> dict[str, float]:
    tx = og.guard(optax.sgd(0.0), clip=1.0)

    def build(loss: Any) -> dict[str, Any]:
        params = jnp.ones(1)
        return {
            "state": TrainState.create(apply_fn=str, params=params, tx=tx),
            "train_step": Partial(train_step, loss),
            "batches": lambda step: np.float32(0),
        }

    lengths: Any = {"num_steps": num_steps, "eval_every": num_steps}
    if loop == "population":
        result = train_population(build, jnp.array([loss, 1.0]), **lengths)
        return result.member(0).history[-1]
    run: Any = {"device": train_on_device, "host": fit}[loop]
    return run(**build(jnp.float32(loss)), **lengths).history[-1]


@pytest.mark.parametrize("loop", ["host", "device", "population"])
def test_means_of_a_row_do_not_lose_what_a_sum_does(loop):
    loss = np.float32(0.1)
    naive = functools.reduce(np.add, np.full(10_000, loss)) / 10_000
    assert naive != pytest.approx(float(loss), rel=1e-5)
    row = row_of(loop, loss, 10_000)
    assert row["train_loss"] == pytest.approx(float(loss), rel=1e-7)
    assert row["grad_norm_mean"] == pytest.approx(float(loss), rel=1e-7)


@pytest.mark.parametrize("loop", ["host", "device", "population"])
def test_mean_of_huge_losses_is_finite(loop):
    huge = np.float32(3e38)
    assert row_of(loop, huge, 10)["train_loss"] == float(huge)
