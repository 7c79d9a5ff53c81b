"""The benchmark's own arithmetic, and what it has recorded."""

import json
import math

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from benchmarks.accelerators import GUARDED, RESULTS, Cost
from benchmarks.scale_out import (
    AXES,
    LARGE,
    Case,
    abstract_state,
    collectives,
    guard_share,
)

OPTAX_CLIP = "chain(optax.clip_by_global_norm, adamw)"


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


def recorded():
    return json.loads((RESULTS / "scale_out.json").read_text())


@pytest.mark.parametrize("platform", ["v5e", "h100"])
def test_recorded_guard_adds_nothing_to_a_train_step_but_a_norm(platform):
    costs = {
        row["step"]: Cost(*(row[field] for field in Cost._fields))
        for row in recorded()["compiled"]
        if row["platform"] == platform
    }
    plain, clip, guarded = (costs[name] for name in ("adamw", OPTAX_CLIP, GUARDED))
    assert guarded.passes <= clip.passes * 1.001
    assert guarded.conditionals == plain.conditionals
    assert guarded.host_transfers == 0
    assert collectives(guarded) == collectives(clip)
    # On v5e one for each order in which leaves are split over the two axes.
    more = {"v5e": 2, "h100": 1}[platform]
    assert collectives(guarded) == collectives(plain) + more
    assert guard_share(guarded, plain) < 0.01


def test_recorded_losses_of_a_clean_run_are_the_same_to_rounding():
    plain, guarded = recorded()["clean_run"]["losses"].values()
    np.testing.assert_allclose(guarded, plain, rtol=1e-6)
    assert plain[-1] < plain[0]
