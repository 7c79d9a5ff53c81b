"""Ten loops in the style of public codebases: each with the guard, and without it."""

import jax
import numpy as np
import pytest

import optax_guard as og
from tests.loops.kit import (
    BAD,
    GUARDED,
    LENGTH,
    THEIRS,
    clean,
    load,
    numbers,
    run,
    source,
)
from tests.strategies import same_bits

LOOPS = [
    "linen",
    "linen_pmap",
    "nnx_mesh",
    "multi_steps",
    "ppo",
    "masks",
    "equinox_state",
    "specs",
    "svi",
    "config",
]
by_name = pytest.mark.parametrize("name", LOOPS)


@by_name
def test_guard_changes_at_most_six_lines(name):
    marked = [line for line in source(name) if line.endswith((THEIRS, GUARDED))]
    assert 3 <= len(marked) <= 6, "\n".join(marked)


@by_name
def test_clean_run_is_the_twins(name):
    ours, our_states = clean(name, is_guarded=True)
    theirs, their_states = clean(name, is_guarded=False)
    for mine, other in zip(our_states, their_states, strict=True):
        np.testing.assert_allclose(
            numbers(ours.kept(mine)),
            numbers(theirs.kept(other)),
            rtol=2e-5,
            atol=1e-6,
        )
    # It does train.
    first, last = (numbers(ours.kept(our_states[i])) for i in (0, -1))
    assert np.abs(last - first).max() > 1e-3
    # No fault that was not there.
    for guard in og.find_states(our_states[-1], og.GuardState):
        assert not np.any(guard.num_skipped)


@by_name
def test_bad_batch_leaves_no_trace(name):
    ours, good = clean(name, is_guarded=True)
    for fault in (np.nan, np.inf):
        states = run(ours, good[BAD], range(BAD, LENGTH), fault)
        before, after = states[0], states[1]
        assert same_bits(ours.kept(after), ours.kept(before))
        for old, new in zip(*map(guards_of, (before, after)), strict=True):
            assert same_bits(old.wrapped_state, new.wrapped_state)
        assert np.all(ours.num_bad(after) > 0)
        assert np.isfinite(numbers(ours.kept(states[-1]))).all()
        assert np.any(numbers(ours.kept(states[-1])) != numbers(ours.kept(after)))
    # Without the guard it does.
    theirs, good = clean(name, is_guarded=False)
    states = run(theirs, good[BAD], range(BAD, LENGTH), np.nan)
    assert not np.isfinite(numbers(theirs.kept(states[-1]))).all()


def guards_of(state):
    return og.find_states(state, og.GuardState)


@by_name
def test_huge_batch_does_no_more_than_a_few_good_ones(name):
    ours, good = clean(name, is_guarded=True)
    states = run(ours, good[BAD], range(BAD, LENGTH), 1e4)
    ways = [
        np.linalg.norm(numbers(ours.params(last)) - numbers(ours.params(good[BAD])))
        for last in (states[-1], good[-1])
    ]
    assert ways[0] <= 10 * ways[1], ways
    assert all(np.isfinite(numbers(state)).all() for state in states)


@by_name
def test_run_that_is_saved_and_restored_goes_on_bit_for_bit(name, tmp_path):
    ours, good = clean(name, is_guarded=True)
    saved = ours.save(good[3], tmp_path)
    restored = ours.restore(ours.create(), saved)
    again = run(ours, restored, range(3, LENGTH))[-1]
    assert same_bits(again, good[-1])


# States forward names of the states inside them; to be taken out when they do.
@pytest.mark.parametrize("name", LOOPS)
def test_all_that_the_loop_reads_is_still_there(name):
    ours, our_states = clean(name, is_guarded=True)
    theirs, their_states = clean(name, is_guarded=False)
    mine, other = ours.reads(our_states[-1]), theirs.reads(their_states[-1])
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    np.testing.assert_allclose(numbers(mine), numbers(other), rtol=1e-4, atol=1e-6)


def test_a_loop_without_its_marks_is_seen():
    theirs = vars(load("linen", is_guarded=False))
    assert "og" not in theirs
    assert "og" in vars(load("linen", is_guarded=True))
