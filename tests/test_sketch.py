"""The quantile sketch, and quantiles of the norms that a run has seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._norms.readout import norm_quantile
from optax_guard._norms.sketch import (
    sketch_add,
    sketch_init,
    sketch_quantile,
)
from tests.strategies import types_of

RNG = np.random.default_rng(0)
QUANTILES = np.array([0.0, 0.001, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0])
SAMPLES = {
    "lognormal": np.exp(RNG.normal(size=3000)),
    "heavy": RNG.pareto(0.5, 3000) + 1e-3,
    "constant": np.full(50, 0.3),
    "single": np.array([7.0]),
    "pair": np.array([1e-3, 1e3]),
    "whole range": np.exp(RNG.uniform(np.log(1.1e-12), np.log(9e11), 3000)),
}


def start(tx, params) -> Any:
    """The initial state; as `Any`, because what optax declares has no fields."""
    return tx.init(params)


def update(tx, *args, **extra) -> Any:
    """One update, as `Any` for the same reason."""
    return tx.update(*args, **extra)


def filled(values, relative_error=0.01, dtype=jnp.int32, decay=None):
    start = sketch_init((), relative_error, dtype)
    values = jnp.asarray(np.asarray(values), jnp.float32)

    def add(sketch, x):
        return sketch_add(sketch, x, decay), None

    return jax.jit(lambda v: jax.lax.scan(add, start, v)[0])(values)


@pytest.mark.parametrize("relative_error", [0.002, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("name", SAMPLES)
def test_quantiles_are_exact_to_the_stated_relative_error(name, relative_error):
    values = np.asarray(SAMPLES[name], np.float32).astype(np.float64)
    found = sketch_quantile(filled(values, relative_error), QUANTILES)
    np.testing.assert_allclose(found, np.quantile(values, QUANTILES), relative_error)


def test_nonfinite_values_change_nothing():
    bad = [np.nan, np.inf, -np.inf]
    np.testing.assert_array_equal(filled([1.0, *bad, 2.0]), filled([1.0, 2.0]))
    old = filled([1.0, 2.0], dtype=jnp.float32)
    for value in bad:
        np.testing.assert_array_equal(sketch_add(old, jnp.float32(value), 0.5), old)


def test_values_outside_of_the_range_count_as_its_ends():
    sketch = filled([0.0, 1e-30, 1e-12, 1.0, 1e13, 1e30, 3e38])
    assert sketch.sum() == 7
    assert sketch_quantile(sketch, 0.0) == 0
    assert sketch_quantile(sketch, 2 / 6) == 0
    np.testing.assert_allclose(sketch_quantile(sketch, 3 / 6), 1, 0.01)
    np.testing.assert_allclose(sketch_quantile(sketch, 1.0), 1e12, 0.01)


def test_empty_sketch_has_no_quantile():
    assert np.isnan(sketch_quantile(sketch_init((), 0.02), 0.5))


def test_counts_saturate():
    largest = np.iinfo(np.int32).max
    full = jnp.where(filled([1.0]) > 0, largest, 0).astype(jnp.int32)
    assert sketch_add(full, jnp.float32(1.0)).max() == largest
    both = full + filled([8.0])
    np.testing.assert_allclose(sketch_quantile(both, 0.5), 1.0, 0.01)


def test_decay_weighs_recent_values():
    values = [1.0] * 500 + [5.0] * 13
    sketch = filled(values, dtype=jnp.float32, decay=0.99)
    # 1 - 0.99**13 is well above a tenth, so the ninth decile has moved.
    np.testing.assert_allclose(sketch_quantile(sketch, 0.9), 5.0, 0.01)
    np.testing.assert_allclose(sketch_quantile(sketch, 0.8), 1.0, 0.01)
    np.testing.assert_allclose(sketch.sum(), (1 - 0.99**513) / 0.01, 1e-4)


def test_sketches_of_an_array_are_those_of_its_entries():
    values = jnp.asarray(RNG.lognormal(size=(40, 2, 3)), jnp.float32)
    sketch = sketch_init((2, 3), 0.05)
    for value in values:
        sketch = sketch_add(sketch, value)
    exact = np.quantile(np.asarray(values, np.float64), 0.7, axis=0)
    np.testing.assert_allclose(sketch_quantile(sketch, 0.7), exact, 0.05)


def test_types_are_fixed_under_x64(x64):
    del x64
    for dtype, decay in [(jnp.int32, None), (jnp.float32, 0.9), (jnp.float32, None)]:
        sketch = sketch_init((2,), 0.05, dtype)
        new = sketch_add(sketch, jnp.ones(2, jnp.float32), decay)
        assert types_of(new) == types_of(sketch)
        assert sketch_quantile(new, 0.5).dtype == jnp.float32


# In the state of every clip -------------------------------------------------------


def after(tx, norms):
    def step(state, norm):
        return update(tx, norm[None], state)[1], None

    norms = jnp.asarray(np.asarray(norms), jnp.float32)
    return jax.jit(lambda x: jax.lax.scan(step, start(tx, jnp.zeros(1)), x)[0])(norms)


@pytest.mark.parametrize(
    "tx",
    [
        og.record_norm(),
        og.clip_by_global_norm(0.5),
        og.guard(optax.adam(0.1)),
        optax.chain(optax.identity(), og.record_norm()),
    ],
)
def test_norm_quantile_is_of_all_raw_finite_norms(tx):
    norms = np.asarray(SAMPLES["lognormal"][:400], np.float32)
    state = after(tx, [*norms[:200], np.nan, *norms[200:], np.inf])
    for q in (0.1, 0.5, 0.99):
        exact = np.quantile(norms.astype(np.float64), q)
        np.testing.assert_allclose(norm_quantile(state, q), exact, 0.02)
        np.testing.assert_allclose(jax.jit(norm_quantile)(state, q), exact, 0.02)
    exact = np.quantile(norms.astype(np.float64), QUANTILES)
    np.testing.assert_allclose(norm_quantile(state, QUANTILES), exact, 0.02)


def test_sketch_in_the_state_is_as_small_as_it_says():
    sketch = start(og.record_norm(), jnp.zeros(1)).stats.norm_sketch
    assert sketch.shape == (1408,)
    assert sketch.dtype == jnp.int32
    assert sketch.nbytes == 5632


def test_norm_quantile_of_nothing():
    tx = og.record_norm()
    assert np.isnan(norm_quantile(start(tx, jnp.zeros(1)), 0.5))
    with pytest.raises(ValueError, match="`state` holds no norms"):
        norm_quantile(start(optax.adam(0.1), jnp.zeros(1)), 0.5)
    with pytest.raises(ValueError, match=r"`q` must be in \[0, 1\], got 90"):
        norm_quantile(start(tx, jnp.zeros(1)), 90)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_quantiles_stay_right_beyond_what_float32_counts(q):
    # As after 2**30 updates: norms of 1, 2 and 3, equally often.
    state = sketch_init((), 0.01)
    for norm in (1.0, 2.0, 3.0):
        state = sketch_add(state, jnp.float32(norm))
    state = state * 2**28
    expected = np.quantile([1.0, 2.0, 3.0], q, method="nearest")
    assert sketch_quantile(state, q) == pytest.approx(expected, rel=0.01, abs=0)
