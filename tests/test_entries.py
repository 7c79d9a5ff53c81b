"""Which entries a step must not change, and what the smallest leaves tell: by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_guard._guarding.entries import (
    Kept,
    is_any,
    kept_entries,
    told_by,
    with_old_entries,
)

NAN, INF = math.nan, math.inf
T, F = True, False


def as_lists(found: Any) -> Any:
    return [None if x is None else np.asarray(x).tolist() for x in found]


def test_entry_is_kept_with_all_that_belongs_to_it():
    ones = jnp.ones(4)
    # The path of one parameter is the end of another's.
    params = {
        "empty": jnp.zeros((0,)),
        "int": jnp.arange(2),
        "layer": {"w": ones},
        "w": ones.at[2].set(-INF),
    }
    state = {
        "count": jnp.int32(3),
        "keys": {"w": jax.random.wrap_key_data(jnp.zeros((4, 2), jnp.uint32))},
        "mu": params
        | {"int": jnp.array([NAN, 0.0]), "w": ones.at[0].set(NAN)}
        | {"layer": {"w": ones.at[3].set(NAN)}},
        "nu": {"layer": {"w": ones}, "w": ones.at[1].set(INF)},
        "quantised": {"w": jnp.arange(4)},
        "rate": jnp.float32(INF),
        "row": {"w": jnp.array([1.0, NAN])},
        "search": jnp.array([INF, NAN]),
    }
    old: Any = jax.tree.map(jnp.zeros_like, state)
    old["search"] = jnp.array([INF, 0.0])
    kept = kept_entries(params, state, old)
    layer, w = [F, F, F, T], [T, T, T, F]
    assert as_lists(kept.of_params) == [None, None, layer, w]
    mu, nu = [None, [T, F], layer, w], [layer, w]
    alone = [None, True, [F, T], [F, T]]
    assert as_lists(kept.of_state) == [None, None, *mu, *nu, *alone]


def test_parameters_that_are_one_array_own_moments_of_their_shape():
    bad = jnp.array([1.0, INF])
    state = (jnp.int32(1), jnp.ones(2), bad, jnp.ones(3))
    kept = kept_entries(jnp.ones(2), state, state)
    assert as_lists(kept.of_params) == [[F, T]]
    assert as_lists(kept.of_state) == [None, [F, T], [F, T], [F, F, F]]


@pytest.mark.skipif(not hasattr(jax, "memory"), reason="this JAX has no such spaces")
def test_moments_in_the_memory_of_the_host_are_not_looked_at():
    def kept(x: Any) -> Any:
        state = {"w": jax.device_put(x, jax.memory.Space.Host)}
        return kept_entries({"w": x}, state, state)

    found = jax.eval_shape(kept, jnp.ones(2))
    assert found.of_state == [None]
    assert [x.shape for x in found.of_params] == [(2,)]


@pytest.mark.parametrize("is_taken", [True, jnp.array(True), jnp.array(False)])
def test_old_entries_are_chosen_where_they_are_kept(is_taken):
    new, old = {"n": jnp.int32(5), "w": jnp.arange(3)}, {"n": 2, "w": -jnp.arange(3)}
    found = with_old_entries(new, old, [None, jnp.array([F, T, F])], is_taken)
    assert as_lists(found.values()) == (
        [5, [0, -1, 2]] if is_taken else [2, [0, -1, -2]]
    )
    # Without a choice there is no operation.
    assert (found["n"] is new["n"]) == (is_taken is True)


def test_any_entry_is_found_in_any_leaf():
    no, one = jnp.zeros(2, bool), jnp.array([F, T])
    assert not is_any(Kept([None], []))
    assert not is_any(Kept([no, None], [no]))
    assert is_any(Kept([one, no], [None]))
    assert is_any(Kept([no], [no, one]))


# What is told -------------------------------------------------------------------


def told(kept: Any, params: Any) -> tuple[bool, bool, bool]:
    """Is the step lost, is it lost in part, were parameters bad."""
    found = None if kept is None else Kept(kept, [])
    is_lost, is_partial, were_bad = map(bool, told_by(found, params, jnp.ones(())))
    return is_lost, is_partial, were_bad


def test_smallest_leaves_tell_of_a_step():
    good, bad, many = [jnp.ones(2), jnp.ones(())], [jnp.ones(2), jnp.array(NAN)], 9
    no, yes = jnp.zeros(2, bool), jnp.ones(2, bool)
    assert told([no, no[0]], good) == (F, F, F)
    assert told([no.at[1].set(True), yes[0]], good) == (F, T, F)
    assert told([no.at[0].set(True), no[0]], good) == (F, T, F)
    assert told([yes, yes[0]], good) == (T, T, F)
    assert told([yes[0]], None) == (T, T, F)
    assert told([None, no], [jnp.arange(many), jnp.array([1.0, INF])]) == (F, F, T)
    assert told(None, good) == (F, F, F)
    assert told(None, bad) == (F, F, T)
    assert told([None], [jnp.arange(many)]) == (F, F, F)
    assert told([], None) == (F, F, F)


def mask(shape: Any, *at: Any) -> Any:
    found = np.zeros(shape, bool)
    for i in at:
        found[i] = True
    return jnp.asarray(found)


@pytest.mark.parametrize(
    ("shapes", "leaf", "entries", "is_seen"),
    [
        # At most 1024 entries, the smallest leaves first.
        ([512, 512], 1, [511], True),
        ([513, 512], 0, [0], False),
        ([513, 512], 1, [0], True),
        # Or the 1024th part of all: here 2050 entries.
        ([(1024, 2048), 150, 1900], 2, [0], True),
        ([(1024, 2048), 151, 1900], 2, [0], False),
        # If the smallest leaf has more, the first 1024 along its last axis.
        ([1025], 0, [1023], True),
        ([1025], 0, [0], True),
        ([1025], 0, [1024], False),
        ([1100, 1200], 1, [0], False),
        ([(2, 2000)], 0, [(0, 1023)], True),
        ([(2, 2000)], 0, [(0, 1024), (1, 0)], False),
        ([(3, 400)], 0, [(0, 399)], True),
        ([(3, 400)], 0, [(1, 0), (2, 0)], False),
    ],
)
def test_leaves_that_are_looked_at_are_the_stated_ones(shapes, leaf, entries, is_seen):
    kept = [mask(x) for x in shapes]
    kept[leaf] = mask(shapes[leaf], *entries)
    assert told(kept, None) == (False, is_seen, False)
