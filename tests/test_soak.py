"""A long run under random faults, against plain Python's account of it.

`make soak` takes ten times as many steps as `make test`.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og

NUM_STEPS = 1_000_000 if os.environ.get("OPTAX_GUARD_SOAK") else 100_000
CALM = 64
# What a fault writes into one leaf (times the gradient, or over it), and the verdict.
FAULTS = {
    "none": og.SkipReason.NONE,
    "zero": og.SkipReason.NONE,
    "NaN": og.SkipReason.NONFINITE,
    "Inf": og.SkipReason.NONFINITE,
    "-Inf": og.SkipReason.NONFINITE,
    "spike": og.SkipReason.SPIKE,
    "huge": og.SkipReason.NORM_ABOVE,
    "overflow": og.SkipReason.NORM_ABOVE,
}
VALUES = jnp.array([0, 0, jnp.nan, jnp.inf, -jnp.inf, 30, 1e6, 3e38], jnp.float32)
SPIKE, OVERFLOW = (list(FAULTS).index(name) for name in ("spike", "overflow"))
PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2)), "c": jnp.zeros(())}
TX = og.guard(
    optax.adamw(1e-3),
    clip=og.threshold.zscore(2.0),
    skip=[
        og.skip.norm_above(100.0, max_consecutive=NUM_STEPS),
        og.skip.spike(window=32, watch="grad_norm", max_consecutive=NUM_STEPS),
    ],
    max_consecutive_skips=NUM_STEPS,
)


def gradients(step, params, kind, leaf):
    """Of norm 1 to 3, and what the fault makes of one leaf of it, or of all."""
    key = jax.random.fold_in(jax.random.key(0), step)
    leaves, structure = jax.tree.flatten(params)
    faulty = []
    for i, p in enumerate(leaves):
        fresh = jax.random.uniform(jax.random.fold_in(key, i), p.shape, minval=0.5)
        # Parameters grow for as long as the run is; the norm must not.
        grad = jnp.where(kind == 1, 0.0, fresh + 1e-3 * jnp.tanh(p))
        bad = jnp.where(kind == SPIKE, grad * VALUES[kind], VALUES[kind])
        faulty.append(jnp.where((kind > 1) & (leaf == i), bad, grad))
    return jax.tree.unflatten(structure, faulty)


@jax.jit
def run(steps, kinds, leaves, num_steps):
    """What is left after these steps, counts of verdicts, and if all was well."""

    def body(i, carry):
        params, state, counts, is_well = carry
        grads = gradients(steps[i], params, kinds[i], leaves[i])
        step: Any = og.apply_gradients(TX, params, state, grads=grads)
        params, state = step
        kept = jax.tree.leaves((params, state.wrapped_state))
        is_well &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in kept]))
        return params, state, counts.at[state.skip_reason].add(1), is_well

    counts = jnp.zeros(len(og.SkipReason), jnp.int32)
    start = PARAMS, TX.init(PARAMS), counts, jnp.array(True)
    return jax.lax.fori_loop(0, num_steps, body, start)


@pytest.fixture(scope="module")
def faults():
    """Calm and storm in turn, of random length; the first steps are always calm."""
    random = np.random.default_rng(0)
    kinds = np.zeros(NUM_STEPS, np.int32)
    at = CALM
    while at < NUM_STEPS:
        length, rate = random.integers(1, 400), random.choice([0.0, 0.05, 0.5, 0.95])
        phase = kinds[at : at + length]
        is_faulty = random.random(len(phase)) < rate
        phase[is_faulty] = random.integers(1, len(FAULTS), is_faulty.sum())
        at += length
    return kinds, random.integers(0, len(PARAMS), NUM_STEPS).astype(np.int32)


def verdicts_of(kinds, leaves):
    """A norm beyond float32 is not finite, though all its entries are."""
    sizes = np.array([x.size for x in jax.tree.leaves(PARAMS)])
    norms = 3e38 * np.sqrt(sizes[leaves])
    is_lost = (kinds == OVERFLOW) & (norms > np.finfo(np.float32).max)
    verdicts = np.array(list(FAULTS.values()))[kinds]
    return np.where(is_lost, og.SkipReason.NONFINITE, verdicts)


@pytest.fixture(scope="module")
def outcome(faults):
    return run(np.arange(NUM_STEPS, dtype=np.int32), *faults, NUM_STEPS)


def test_parameters_and_moments_are_finite_at_every_step(outcome):
    *_, is_well = outcome
    assert is_well


def test_counts_and_log_are_those_of_the_faults(faults, outcome):
    kinds, leaves = faults
    _, state, counts, _ = outcome
    verdicts = verdicts_of(kinds, leaves)
    np.testing.assert_array_equal(counts, np.bincount(verdicts, minlength=len(counts)))
    is_bad = verdicts != og.SkipReason.NONE
    is_nonfinite = verdicts == og.SkipReason.NONFINITE
    stats = state.clip_state.stats
    assert state.num_skipped == is_bad.sum()
    assert stats.num_updates == NUM_STEPS
    assert stats.num_nonfinite == is_nonfinite.sum()
    assert state.skip_streak == NUM_STEPS - 1 - np.flatnonzero(~is_bad)[-1]
    log = og.skipped_steps(state, PARAMS)
    last = np.flatnonzero(is_bad)[-16:]
    names = np.array(list(PARAMS))
    assert [r.update for r in log] == list(last)
    assert [r.reason for r in log] == list(verdicts[last])
    assert [r.leaf for r in log] == [
        str(names[leaves[i]]) if is_nonfinite[i] else None for i in last
    ]


def test_state_is_that_of_the_good_steps_alone_bit_for_bit(faults, outcome):
    kinds, leaves = faults
    verdicts = verdicts_of(kinds, leaves)
    good = np.flatnonzero(verdicts == og.SkipReason.NONE).astype(np.int32)
    assert 0.2 * NUM_STEPS < len(good) < 0.9 * NUM_STEPS
    rest = NUM_STEPS - len(good)
    steps = np.pad(good, (0, rest))
    params, alone, _, _ = run(steps, kinds[steps], leaves[steps], len(good))
    assert alone.num_skipped == 0
    assert alone.clip_state.stats.num_updates == len(good)

    def lasting(params, state):
        learned = state.clip_state.threshold, state.rule_states
        return jax.tree.leaves((params, state.wrapped_state, learned))

    expected, found = lasting(params, alone), lasting(*outcome[:2])
    for x, y in zip(found, expected, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
