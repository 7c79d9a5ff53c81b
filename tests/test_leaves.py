"""Columns of leaves against float64 NumPy, and what figures of runs show."""

import io
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard.analysis import History, leaf_columns
from optax_guard.loops import train_population

plotting = pytest.importorskip("optax_guard.plotting")

RNG = np.random.default_rng(0)


def tree(scale=1.0):
    return {
        "layer": {
            "kernel": jnp.asarray(scale * RNG.normal(size=(3, 4)), jnp.float32),
            "bias": jnp.asarray(scale * RNG.normal(size=4), jnp.bfloat16),
        },
        "count": jnp.array(3),
    }


def norm(x):
    return math.sqrt(np.sum(np.asarray(x, np.float64) ** 2))


def test_columns_are_norms_of_leaves_and_ratios_of_updates():
    grads, params, new = tree(3.0), tree(), tree()
    found = jax.jit(leaf_columns)(grads=grads, params=params, new_params=new)
    assert set(found) == {
        f"{prefix}/layer/{leaf}"
        for prefix in ("leaf_norm", "update_ratio")
        for leaf in ("kernel", "bias")
    }
    for leaf in ("kernel", "bias"):
        g, w, v = (
            np.asarray(t["layer"][leaf], np.float64) for t in (grads, params, new)
        )
        assert found[f"leaf_norm/layer/{leaf}"] == pytest.approx(norm(g), rel=1e-6)
        # The difference of bfloat16 is rounded to it.
        tolerance = 1e-6 if leaf == "kernel" else 1e-2
        wanted = pytest.approx(norm(v - w) / norm(w), rel=tolerance)
        assert found[f"update_ratio/layer/{leaf}"] == wanted


def test_parameters_of_zero_have_an_infinite_ratio_or_none():
    old, new = (
        {"a": jnp.zeros(2), "b": jnp.zeros(2)},
        {"a": jnp.ones(2), "b": jnp.zeros(2)},
    )
    found = leaf_columns(params=old, new_params=new)
    assert found["update_ratio/a"] == math.inf
    assert np.isnan(found["update_ratio/b"])


def test_columns_of_a_state_are_its_norms():
    tx = og.guard(optax.sgd(0.1), clip=og.clip_by_leaf_norm(math.inf))
    grads = {"a": jnp.array([3.0, 4.0])}
    _, state = tx.update(grads, tx.init(grads))
    assert leaf_columns(state=state) == {"leaf_norm/a": 5.0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "must be given, got none"),
        ({"params": jnp.ones(1)}, "`params` and `new_params` must be given together"),
        ({"state": 1, "grads": jnp.ones(1)}, "`grads` must be left out"),
    ],
)
def test_columns_of_nothing_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        leaf_columns(**how)


# Leaf by row; the second is of an evaluation in which nothing was recorded.
VALUES = np.array([[1.0, 10.0, math.nan, 0.0], [100.0, 1.0, 5.0, math.inf]])


def recorded(prefix="leaf_norm", **more):
    history = History()
    history.append(15, val_loss=1.0)
    for i, (a, b) in enumerate(VALUES.T):
        history.append(10 * (i + 1) + 10, {f"{prefix}/a": a, f"{prefix}/b": b}, **more)
    return history


def cells(panel):
    return panel.collections[0].get_array()


def test_heat_map_has_a_line_a_leaf_below_the_global_norm():
    figure = plotting.plot_leaves(recorded(grad_norm=7.0))
    panel = figure.axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["all (global norm)", "a", "b"]
    shown = cells(panel)
    np.testing.assert_array_equal(shown[0], [7.0] * 4)
    assert np.ma.getmaskarray(shown[1:]).tolist() == [
        [False, False, True, False],
        [False, False, False, True],
    ]
    # On a logarithmic scale a zero has the colour of the smallest value.
    assert shown[1, 3] == 1.0
    assert type(panel.collections[0].norm).__name__ == "LogNorm"
    marked = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert marked["NaN"] == [[40, 1]]
    assert marked["infinite"] == [[50, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "NaN",
        "infinite",
    ]


def test_few_huge_norms_do_not_change_the_colours_of_the_others():
    rows = [{"step": i, "leaf_norm/a": 1.0 + i} for i in range(100)]
    rows[50]["leaf_norm/a"] = 1e9
    figure = plotting.plot_leaves(rows)
    scale = figure.axes[0].collections[0].norm
    assert (scale.vmin, scale.vmax) == (1, 100)
    # A run of which many norms are huge has them on its scale.
    for row in rows[90:]:
        row["leaf_norm/a"] = 1e9
    assert plotting.plot_leaves(rows).axes[0].collections[0].norm.vmax == 1e9


def test_runs_stand_side_by_side_on_one_scale_and_ratios_below_norms():
    other = History()
    for i in range(3):
        other.append(i, {"train_leaf_norm/c": 1e-3, "train_update_ratio/c": 1e-3})
    figure = plotting.plot_leaves({"global": recorded(), "leaf": other})
    left, right, ratios, more_ratios = figure.axes[:4]
    assert (left.get_title(), right.get_title()) == ("global", "leaf")
    assert left.collections[0].norm is right.collections[0].norm
    assert left.collections[0].norm.vmin == 1e-3
    assert np.ma.getmaskarray(cells(right)).tolist() == [[True] * 3] * 2 + [[False] * 3]
    # Of the first run no ratio is known.
    assert [text.get_text() for text in ratios.texts] == ["not recorded"]
    np.testing.assert_allclose(cells(more_ratios), 1e-3)
    figure.savefig(io.BytesIO())
    with pytest.raises(
        ValueError, match="`history` must have columns leaf_norm/<path>"
    ):
        plotting.plot_leaves([{"step": 1, "loss": 1.0}])


def legend(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_distribution_counts_what_each_threshold_clips():
    norms = [*range(1, 101), math.nan, math.nan, math.inf, 0.0]
    rows = [{"step": i, "grad_norm": float(x)} for i, x in enumerate(norms)]
    above, below = plotting.plot_norm_distribution(rows, max_norms=[25, 100]).axes
    assert "not shown: 2 NaN, 1 infinite, 1 0" in above.get_title(loc="right")
    assert legend(above) == [
        "first half of the run, 50 norms",
        "second half, 50 norms",
        "50% are below 50.5",
        "90% are below 90.1",
        "99% are below 99",
    ]
    assert sum(sum(patch.get_data().values) for patch in above.patches) == 100
    assert legend(below)[1:] == ["threshold 25 clips 75.0%", "threshold 100 clips 0.0%"]
    xs, ys = below.lines[0].get_data()
    assert dict(zip(xs, ys, strict=True))[90] == pytest.approx(0.1)
    assert above.get_xscale() == "log"
    suggested = plotting.plot_norm_distribution(rows).axes[1]
    assert len(legend(suggested)) == 3
    with pytest.raises(ValueError, match="`history` must have a row with a finite"):
        plotting.plot_norm_distribution([{"step": 1, "grad_norm": math.nan}])
    with pytest.raises(ValueError, match=r"`max_norms\[0\]` must be positive"):
        plotting.plot_norm_distribution(rows, max_norms=[-1.0])


def test_gap_is_validation_minus_training():
    losses = [3.0, 2.0, 1.0, 1.5, math.nan]
    rows: list[dict[str, Any]] = [
        {"step": i, "train_loss": 0.5, "val_loss": x} for i, x in enumerate(losses)
    ]
    stopper = og.early_stopping(og.stop.budget(evaluations=5), nonfinite="ignore")
    stop = stopper.init()
    for loss in losses:
        stop = stopper.update(loss, stop)
    above, below = plotting.plot_early_stopping(rows, stop=stop).axes
    gap = next(x for x in below.lines if x.get_label() == "validation minus training")
    np.testing.assert_array_equal(gap.get_ydata(), [2.5, 1.5, 0.5, 1.0, math.nan])
    assert {"best: 1 at step 2", "stop: BUDGET at step 4"} <= set(legend(above))
    assert "stop: BUDGET at step 4" in legend(below)
    crosses = [line for line in below.lines if line.get_marker() == "X"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[4, 1]]]
    (only,) = plotting.plot_early_stopping([{"step": 1, "value": 2.0}]).axes
    assert "best: 2 at step 1" in legend(only)
    history = plotting.plot_history(rows, stop=stop)
    assert "stop: BUDGET at step 4" in legend(history.axes[0])


def population(num_members):
    """Members that are done after 1, 2, ... evaluations; the second with a NaN."""
    steps = np.tile(10 * np.arange(1, num_members + 1), (num_members, 1))
    values = np.add.outer(np.arange(num_members), 1.0 / np.arange(1, num_members + 1))
    values[1, 1] = math.nan
    history = {"step": jnp.asarray(steps), "value": jnp.asarray(values)}
    return values, {"history": history, "num_rows": jnp.arange(1, num_members + 1)}


@pytest.mark.parametrize("num_members", [3, 12])
def test_population_shows_every_member_until_it_stops(num_members):
    from optax_guard.loops._population import PopulationResult

    values, found = population(num_members)
    result = PopulationResult(state=None, best_params=None, stop=None, **found)
    names = [f"run {i}" for i in range(num_members)]
    above, below = plotting.plot_population(result, labels=names).axes
    curves = [x for x in above.lines if x.get_marker() != "X" and len(x.get_xdata())]
    for i in range(num_members):
        wanted = np.asarray(values[i, : i + 1], np.float32)
        assert any(np.array_equal(x.get_ydata(), wanted, True) for x in curves), i
    crosses = [x for x in above.lines if x.get_marker() == "X"]
    assert [x.get_xdata()[0] for x in crosses] == [20]
    (ends,) = (x for x in above.lines if x.get_label() == "stopped")
    # The last member ends with the run, and the second at the cross.
    assert len(ends.get_xdata()) == num_members - 2
    running = below.lines[0].get_ydata()
    np.testing.assert_array_equal(running, np.arange(num_members, 0, -1))
    if num_members > 5:
        assert "lowest: run 0" in legend(above)
        median = next(x for x in above.lines if "median" in x.get_label())
        first = values[:, 0].copy()
        assert median.get_ydata()[0] == pytest.approx(np.median(first))
    else:
        assert set(names) <= set(legend(above))
    with pytest.raises(ValueError, match="`labels` must name each of"):
        plotting.plot_population(result, labels=["one"])
    with pytest.raises(ValueError, match="`key` must be a column"):
        plotting.plot_population(result, key="loss")


def test_population_as_it_is_trained_can_be_drawn():
    pytest.importorskip("flax")
    from optax_guard.flax import TrainState

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: p**2)(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    def build(member):
        tx = og.guard(optax.sgd(member["rate"]), clip=1.0)
        return {
            "state": TrainState.create(apply_fn=str, params=jnp.array(2.0), tx=tx),
            "train_step": train_step,
            "batches": lambda step: None,
            "evaluate": lambda state: state.params**2,
        }

    members = {"rate": jnp.array([0.1, 0.4])}
    result = train_population(build, members, num_steps=4, eval_every=2)
    figure = plotting.plot_population(result)
    drawn = figure.axes[0].lines[0].get_ydata()
    # From 2 on, by 0.1 a step.
    np.testing.assert_allclose(drawn, [1.8**2, 1.6**2], rtol=1e-5)
