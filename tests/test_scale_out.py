"""The benchmark's own arithmetic."""

import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from benchmarks.accelerators import Cost
from benchmarks.scale_out import (
    AXES,
    LARGE,
    Case,
    abstract_state,
    collectives,
    guard_share,
)


@pytest.fixture
def case():
    return Case("h100", Mesh(np.array(jax.devices()[:8]).reshape(4, 2), AXES), LARGE)


def test_large_model_has_over_a_hundred_million_parameters(case):
    width, layers, vocabulary = LARGE[:3]
    matrices = vocabulary * width + layers * 12 * width**2
    norms = (2 * layers + 1) * width
    assert case.num_params == matrices + norms >= 100e6
    assert case.array_bytes == 4 * case.num_params / 8


def test_matrices_and_their_moments_are_split_over_both_axes(case):
    state = case.place(abstract_state(case, optax.adamw(1e-3)))
    for tree in (state.params, state.opt_state):
        for leaf in jax.tree.leaves(tree):
            shard = leaf.sharding.shard_shape(leaf.shape)
            parts = math.prod(leaf.shape) / math.prod(shard)
            assert parts == (8 if len(leaf.shape) == 2 else 1)


def test_batch_grows_with_the_devices(case):
    smaller = case._replace(mesh=Mesh(case.mesh.devices[:2], AXES))
    assert case.tokens().shape[0] == 2 * smaller.tokens().shape[0]


def test_share_is_the_difference_over_the_whole():
    plain = Cost(300.0, 20, 5, 0, 0, 0, 0, 0, 0.0)
    guarded = plain._replace(passes=301.0, all_reduces=21)
    assert guard_share(guarded, plain) == pytest.approx(1 / 301)
    assert collectives(guarded) - collectives(plain) == 1
