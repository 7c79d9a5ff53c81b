"""The landscape, against quadratics in closed form and plain float64 NumPy."""

import io
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from optax_guard.analysis import landscape
from optax_guard.analysis._directions import random_direction
from optax_guard.analysis._landscape import _compute_points

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32),
    "dense": {
        "kernel": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=3), jnp.float32),
    },
    "half": jnp.asarray(RNG.normal(size=(2, 2)), jnp.bfloat16),
    "count": jnp.array(7),
}
CURVATURE = {"conv": 1.0, "kernel": 3.0, "bias": 2.0}


def quadratic(params):
    """Half the sum of curvature times square: its gradient is that, times entry."""
    assert params["count"].dtype == jnp.int32
    total = CURVATURE["conv"] * jnp.sum(params["conv"] ** 2)
    for name in ("kernel", "bias"):
        total += CURVATURE[name] * jnp.sum(params["dense"][name] ** 2)
    return total / 2


def of_numpy(params, directions, alpha, beta):
    """Loss and gradient norm of the quadratic, in float64."""
    loss = square = 0.0
    for name in CURVATURE:
        w, a, b = (
            np.asarray(t["conv"] if name == "conv" else t["dense"][name], np.float64)
            for t in (params, *directions)
        )
        here = w + alpha * a + beta * b
        loss += CURVATURE[name] * np.sum(here**2) / 2
        square += np.sum((CURVATURE[name] * here) ** 2)
    return loss, math.sqrt(square)


@pytest.fixture(scope="module")
def found():
    return landscape(
        quadratic, PARAMS, key=jax.random.key(3), num_points=5, span=0.5, batch_size=3
    )


def test_loss_and_gradient_norm_are_those_of_every_point(found):
    np.testing.assert_array_equal(found.alphas, [-0.5, -0.25, 0, 0.25, 0.5])
    for i, beta in enumerate(found.betas):
        for j, alpha in enumerate(found.alphas):
            loss, norm = of_numpy(PARAMS, found.directions, alpha, beta)
            assert found.loss[i, j] == pytest.approx(loss, rel=1e-5)
            assert found.grad_norm[i, j] == pytest.approx(norm, rel=1e-5)
    assert found.path is None
    assert not found.is_unstable.any()
    typical = np.exp(np.mean(np.log(found.grad_norm)))
    assert found.max_norm == pytest.approx(10 * typical)


draw_direction = jax.jit(random_direction)


def test_units_of_a_random_direction_are_as_long_as_those_of_the_parameters():
    params = {**PARAMS, "conv": PARAMS["conv"].at[..., 1].set(0)}
    found = draw_direction(params, jax.random.key(1))
    for output in range(4):
        unit, like = found["conv"][..., output], params["conv"][..., output]
        length, wanted = (
            math.sqrt(sum(float(x) ** 2 for x in np.ravel(y))) for y in (unit, like)
        )
        assert length == pytest.approx(wanted, rel=1e-5)
    for output in range(3):
        unit, like = (t["dense"]["kernel"][:, output] for t in (found, params))
        length, wanted = (
            math.sqrt(sum(float(x) ** 2 for x in y)) for y in (unit, like)
        )
        assert length == pytest.approx(wanted, rel=1e-5)
    # Biases and what is not floating stay where they are, a unit of zeros as well.
    for still in (found["dense"]["bias"], found["count"], found["conv"][..., 1]):
        assert not np.any(still)
    assert len(np.unique(found["conv"])) == 1 + 3 * 3 * 2 * 3


def test_excluded_leaves_are_those_that_are_named():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    draw = jax.random.key(0)
    swapped = random_direction(params, draw, exclude=lambda path: path == "kernel")
    assert not np.any(swapped["kernel"])
    assert np.linalg.norm(swapped["bias"]) == pytest.approx(math.sqrt(2))
    # Of nothing but vectors, they are all there is to move.
    alone = random_direction({"w": jnp.array([3.0, 4.0])}, draw)
    assert np.linalg.norm(alone["w"]) == pytest.approx(5)
    with pytest.raises(ValueError, match="a floating leaf that is not excluded"):
        random_direction(params, draw, exclude=True)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_path_is_projected_by_least_squares(share):
    w = jnp.zeros(4)
    # Neither orthogonal nor of length 1.
    plane = jnp.array([2.0, 0, 0, 0]), jnp.array([1.0, 3, 0, 0])
    wanted = np.array([[1.0, 2.0], [-0.5, 0.25], [0, 0]])
    inside = wanted @ np.array(plane, np.float64)
    outside = np.zeros((3, 4))
    if share < 1:
        outside[:, 2] = np.linalg.norm(inside, axis=1)
    path = [jnp.asarray(x, jnp.float32) for x in inside + outside]
    found = landscape(
        lambda w: jnp.sum(w**2), w, directions=plane, num_points=2, path=path
    )
    assert found.path is not None
    np.testing.assert_allclose(found.path, wanted, atol=1e-6)
    assert found.path_share == pytest.approx(share)


def test_plane_of_a_path_is_that_of_its_singular_vectors():
    steps = RNG.normal(size=(6, 8)) * [5, 3, *[0.3] * 6]
    w = jnp.ones(8)
    path = [w + jnp.asarray(x, jnp.float32) for x in steps]
    found = landscape(
        lambda w: jnp.sum(w**2), w, directions="path", num_points=2, path=path
    )
    _, sizes, vectors = np.linalg.svd(steps)
    for got, vector in zip(found.directions, vectors[:2], strict=True):
        assert abs(np.dot(got, vector)) == pytest.approx(1, abs=1e-4)
    assert found.path_share == pytest.approx(np.sum(sizes[:2] ** 2) / np.sum(sizes**2))
    # The grid holds all of the path and the parameters.
    assert found.path is not None
    for line, track in zip((found.alphas, found.betas), found.path.T, strict=True):
        assert line[0] < min(0, track.min()) <= max(0, track.max()) < line[-1]
    with pytest.raises(ValueError, match="`path` must turn off the straight line"):
        landscape(jnp.sum, w, directions="path", path=[w, w + 1, w + 2])


def test_points_are_unstable_above_the_threshold_or_not_finite():
    def loss(w):
        return jnp.where(w[0] > 1.6, jnp.nan, w[0] ** 2 + jnp.log(w[1]))

    plane = jnp.array([1.0, 0]), jnp.array([0, 1.0])
    found = landscape(
        loss, jnp.array([1.0, 1.0]), directions=plane, num_points=5, max_norm=2.5
    )
    for i, beta in enumerate(found.betas):
        for j, alpha in enumerate(found.alphas):
            x, y = 1 + alpha, 1 + beta
            is_bad = x > 1.6 or y == 0 or math.hypot(2 * x, 1 / y) > 2.5
            assert found.is_unstable[i, j] == is_bad, (x, y)
    assert np.isnan(found.loss[:, -1]).all()
    assert found.loss[0, 0] == -math.inf


def test_memory_does_not_grow_with_the_grid():
    w = jnp.ones((64, 64))

    def temporaries(num_batches):
        points = np.zeros((num_batches, 2, 2), np.float32)
        lowered = _compute_points.lower(
            Partial(lambda w: jnp.sum(jnp.tanh(w) ** 2)), w, (w, w), points
        )
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many = temporaries(2), temporaries(400)
    # Two numbers a point, and no more.
    assert many - few < 50 * 400
    assert many < 10 * w.nbytes


def test_progress_counts_every_point_and_changes_nothing(found):
    calls: list[int] = []
    display: Any = SimpleNamespace(advance=calls.append, row=None)
    again = landscape(
        quadratic,
        PARAMS,
        key=jax.random.key(3),
        num_points=5,
        span=0.5,
        progress=display,
    )
    assert sum(calls) == 25
    assert len(calls) > 5
    np.testing.assert_allclose(again.loss, found.loss, rtol=1e-6)
    np.testing.assert_allclose(again.grad_norm, found.grad_norm, rtol=1e-6)


W = jnp.ones((2, 2))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"params": jnp.array(1)}, "`params` must have a floating leaf"),
        ({"num_points": 1}, "`num_points` must be a whole number of at least 2"),
        ({"span": -1.0}, "`span` must be positive"),
        ({"max_norm": 0.0}, "`max_norm` must be positive"),
        ({"directions": "pca"}, "`directions` must be None, 'path' or two trees"),
        ({"directions": (W,)}, "`directions` must be two trees, got 1"),
        ({"directions": (W, W[0])}, r"`directions\[1\]` must be a tree like"),
        ({"path": [W, {"w": W}]}, r"`path\[1\]` must be a tree like `params`"),
        ({"directions": "path"}, "`path` must turn off"),
        ({"loss_fn": lambda w: w}, "`loss_fn` must return a scalar, got shape"),
    ],
)
def test_bad_input_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        landscape(**{"loss_fn": jnp.sum, "params": W, **how})


def test_figure_marks_what_is_unstable_and_what_is_not_finite():
    plotting = pytest.importorskip("optax_guard.plotting")

    def loss(w):
        return jnp.where(w[0] > 1.6, jnp.nan, jnp.sum(w**4))

    plane = jnp.array([1.0, 0]), jnp.array([0, 1.0])
    w = jnp.array([1.0, 1.0])
    path = [w + 0.5, w]
    found = landscape(loss, w, directions=plane, num_points=5, max_norm=20.0, path=path)
    figure = plotting.plot_landscape(found, title="A plane")
    losses, _ = figure.axes[:2]
    shown = losses.collections[0].get_array()
    assert np.ma.getmaskarray(shown).sum() == np.isnan(found.loss).sum() == 5
    (crosses,) = [line for line in losses.lines if line.get_marker() == "x"]
    assert len(crosses.get_xdata()) == 5
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "not finite" in words
    assert any(word.startswith("unstable: norm above 20") for word in words)
    assert any(word.startswith("training path") for word in words)
    figure.savefig(io.BytesIO())
