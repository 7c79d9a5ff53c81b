import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import optax_guard as og
from optax_guard._rows import replace_entries
from optax_guard.analysis import History, diagnose
from optax_guard.plotting import plot_history

NORMS = [8.0, 2e6, math.nan, 1.5, 0.5]
LOSSES = [3.0, 2.0, math.inf, 1.0, 2.5]


def rows(norms=NORMS, losses=LOSSES, threshold=1.0):
    return [
        {
            "step": 10 * (i + 1),
            "grad_norm": norm,
            "grad_norm_mean": norm / 2,
            "clipped_norm": min(norm, threshold),
            "clip_threshold": threshold if math.isfinite(norm) else math.nan,
            "train_loss": 1.0,
            "val_loss": loss,
        }
        for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
    ]


def skipped_step(update, norm, reason):
    return og.SkippedStep(update, norm, 1.0, reason, None)


SKIPPED = [
    skipped_step(13, 2e6, og.SkipReason.NORM_ABOVE),
    skipped_step(24, math.nan, og.SkipReason.NONFINITE),
    skipped_step(26, math.inf, og.SkipReason.NONFINITE),
    skipped_step(33, 1.2, og.SkipReason.SPIKE),
]


@pytest.fixture
def stop():
    """Best at the fourth evaluation, stopped by the budget at the fifth."""
    stopper = og.early_stopping(og.stop.budget(evaluations=5), nonfinite="ignore")
    state = stopper.init()
    for loss in LOSSES:
        state = stopper.update(loss, state)
    return state


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def words(axes):
    return [text.get_text() for text in axes.texts]


def crosses(axes):
    lines = [line for line in axes.lines if line.get_marker() == "X"]
    return [xy for line in lines for xy in line.get_xydata().tolist()]


def test_axes_are_labelled_with_units():
    above, below, last = plot_history(rows(), loss_label="loss [nats]").axes
    assert above.get_yscale() == "log"
    assert "gradient norm" in above.get_ylabel()
    assert "[loss per unit of parameter]" in above.get_ylabel()
    assert below.get_ylabel() == "loss [nats]"
    assert last.get_xlabel() == "steps done"


def test_norms_and_threshold_are_drawn_as_they_are():
    above = plot_history(rows()).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in above.lines}
    np.testing.assert_array_equal(drawn["before clipping"], NORMS)
    np.testing.assert_array_equal(drawn["threshold"], [1, 1, math.nan, 1, 1])


def test_values_that_are_not_finite_are_crosses_at_the_edge():
    above, below, _ = plot_history(rows()).axes
    assert crosses(above) == [[30, 1]]
    assert words(above) == ["NaN (before clipping)"]
    # A little lower than that of the training loss would be.
    assert crosses(below) == [[30, 0.89]]
    assert words(below) == ["Inf (validation)"]


def test_skipped_neighbours_share_their_words():
    row_of_nan = [
        skipped_step(i, math.nan, og.SkipReason.NONFINITE) for i in (20, 21, 40)
    ]
    above = plot_history(rows(), skipped_steps=row_of_nan).axes[0]
    texts: Any = above.texts
    said = [text.xy[0] for text in texts if text.get_text() == "NaN"]
    assert said == [21, 41]
    assert {21, 22, 41} <= {step for step, _ in crosses(above)}


def test_skipped_steps_are_marked():
    above = plot_history(rows(), skipped_steps=SKIPPED).axes[0]
    assert "skipped: 4 steps" in legend(above)
    # Far above the steps that were taken, the norm is written at the edge.
    assert {"2e+06", "NaN", "Inf"} <= set(words(above))
    assert [34, 1.2] in crosses(above)
    for step in (14, 25, 27):
        assert [step, 1] in crosses(above)
    assert above.get_ylim()[1] == pytest.approx(80)


def test_norm_of_a_row_that_counts_a_skip_does_not_flatten_the_others():
    counted = [row | {"num_skipped": int(i > 0)} for i, row in enumerate(rows())]
    above = plot_history(counted).axes[0]
    assert above.get_ylim()[1] == pytest.approx(80)
    assert "2e+06" in words(above)
    assert [20, 1] in crosses(above)
    assert legend(above).count("row of a skipped step") == 1
    # Without a new skip it is the run that explodes, whatever the rate of all steps.
    counted = [row | {"num_skipped": 1, "skip_rate": 0.1} for row in rows()]
    counted[0] |= {"num_skipped": 0, "skip_rate": 0.0}
    counted = [counted[0], counted[4] | {"step": 15}, *counted[1:]]
    assert plot_history(counted).axes[0].get_ylim()[1] > 2e6
    assert plot_history(rows()).axes[0].get_ylim()[1] > 2e6


def test_best_and_stop_are_marked(stop):
    above, below, _ = plot_history(rows(), stop=stop).axes
    assert "best: 1 at step 40" in legend(below)
    for axes in (above, below):
        assert "stop: BUDGET at step 50" in legend(axes)


def test_stop_of_a_loop_with_a_row_a_step_is_at_its_evaluation(stop):
    # `stop` was updated at steps 10 to 50; these are the same evaluations.
    every = [{"step": i, "train_loss": 2.0} for i in range(1, 51)]
    for row in rows():
        every[row["step"] - 1]["val_loss"] = row["val_loss"]
    losses = legend(plot_history(every, stop=stop).axes[-1])
    assert {"best: 1 at step 40", "stop: BUDGET at step 50"} <= set(losses)


def test_run_that_goes_on_has_no_stop(stop):
    running = replace_entries(stop, stop_reason=0, stopped_at=-1)
    running = running._replace(should_stop=False)
    below = plot_history(rows(), stop=running).axes[1]
    assert "best: 1 at step 40" in legend(below)
    assert "stop" not in " ".join(legend(below))


def test_run_without_a_clip_has_no_threshold():
    above = plot_history(rows(threshold=math.inf)).axes[0]
    assert legend(above) == ["before clipping", "before clipping, mean"]


def test_threshold_of_entries_is_not_drawn_among_norms():
    by_value = [row | {"clipped_norm": 3.0, "clip_threshold": 0.1} for row in rows()]
    above = plot_history(by_value).axes[0]
    assert "threshold" not in legend(above)
    assert "after clipping" in legend(above)
    assert "threshold" in legend(plot_history(rows()).axes[0])


def test_history_read_from_json_is_the_same():
    strings = [
        {k: {"nan": "NaN", "inf": "Infinity"}.get(str(v), v) for k, v in row.items()}
        for row in rows()
    ]
    assert crosses(plot_history(strings).axes[1]) == [[30, 0.89]]


def test_runs_are_told_apart_and_cut_off_where_asked():
    figure = plot_history({"a": rows(), "b": rows(losses=[1e9] * 5)}, max_loss=10)
    below = figure.axes[1]
    assert legend(below) == ["a", "b"]
    assert below.get_ylim()[1] == 10
    assert words(below) == ["Inf (a)"]
    first, cross, second, hollow = below.lines
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()
    assert cross.get_marker() == "X"
    np.testing.assert_array_equal(hollow.get_xdata(), [10, 20, 30, 40, 50])


def test_runs_without_norms_or_evaluations_are_compared_by_what_they_have():
    losses = [{"step": i, "train_loss": 2.0 - i} for i in (0, 1)]
    short = [{"step": 0, "train_loss": 3.0}]
    [panel] = plot_history({"a": losses, "b": short}).axes
    drawn = [np.asarray(line.get_ydata()).tolist() for line in panel.lines]
    assert drawn == [[2, 1], [3]]
    assert panel.get_ylabel() == "loss"
    # One and the other end of the step, and the numbers on a short logarithmic scale.
    assert panel.get_xlim() == pytest.approx((-0.05, 1.05))
    assert {"1", "2"} <= {tick.get_text() for tick in panel.get_yticklabels()}
    with pytest.raises(ValueError, match="row with a norm or a loss, got 1 runs"):
        plot_history({"a": [{"step": 1, "epoch": 2}]})


def test_notebooks_show_figures_without_pyplot():
    figure: Any = plot_history(rows())
    picture = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_figures_can_be_saved_without_a_warning(stop, tmp_path):
    figure = plot_history(rows(), skipped_steps=SKIPPED, stop=stop, title="A run")
    figure.savefig(tmp_path / "norms.png")
    plot_history({"all lost": rows([math.nan] * 5, [math.nan] * 5)}).savefig(
        tmp_path / "runs.pdf"
    )
    assert (tmp_path / "runs.pdf").read_bytes().startswith(b"%PDF")


def recorded(**more):
    history = History()
    for row in rows():
        history.append(row["step"], row, **more)
    return history


def test_history_has_a_panel_for_each_thing_that_is_known():
    figure = plot_history(recorded(clip_rate=0.5, skip_rate=0.0, learning_rate=0.1))
    labels = [axes.get_ylabel().partition("\n")[0] for axes in figure.axes]
    assert labels == ["gradient norm", "loss", "share of steps", "learning rate"]
    assert figure.axes[0].get_yscale() == "log"
    assert legend(figure.axes[1])[-1] == "best: 1 at step 40"
    # No step was skipped: a line at zero would say nothing.
    assert legend(figure.axes[2]) == ["clipped"]
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(drawn["after clipping"], [1, 1, math.nan, 1, 0.5])
    (only,) = plot_history([{"step": 1, "loss": 1.0}]).axes
    assert only.get_ylabel() == "loss"
    with pytest.raises(ValueError, match="`history` must hold at least one row"):
        plot_history([{"step": 1, "accuracy": 1.0}])


def test_history_shows_where_a_finding_first_held_and_what_is_not_finite():
    losses = [3.0, 2.0, math.nan, math.nan, math.inf]
    history = rows(norms=[8.0] * 5, losses=losses)
    figure = plot_history(history, findings=diagnose(history), title="A run")
    above, below = figure.axes[:2]
    assert "NONFINITE_LOSS_DESPITE_CLIPPING" in words(above)
    assert [30, 30] in [np.asarray(line.get_xdata()).tolist() for line in below.lines]
    # All of them are marked, and each kind is named once.
    assert crosses(below) == [[30, 0.89], [40, 0.89], [50, 0.89]]
    assert words(below) == ["NaN (validation)", "Inf (validation)"]


def test_evaluations_need_not_be_in_every_row():
    history = [{"step": i, "loss": 1.0} for i in range(1, 9)]
    history[3] |= {"val_loss": 2.0}
    history[7] |= {"val_loss": math.nan, "grad_norm": 1.0}
    below = next(x for x in plot_history(history).axes if x.get_ylabel() == "loss")
    drawn = {line.get_label(): np.asarray(line.get_xydata()) for line in below.lines}
    assert drawn["validation"].tolist()[0] == [4, 2]
    # One was not finite; the other six were not made.
    assert [xy[0] for xy in crosses(below)] == [8]


def test_losses_of_a_run_are_cut_off_where_asked():
    below = plot_history(rows(losses=[3.0, 9.0, 1.0, 2.0, 3.0]), max_loss=5).axes[1]
    assert below.get_ylim()[1] == 5
    hollow = [x for x in below.lines if x.get_markerfacecolor() == "white"]
    assert [np.asarray(x.get_xdata()).tolist() for x in hollow] == [[20]]


def test_marks_of_one_run_are_refused_for_several():
    with pytest.raises(ValueError, match="`skipped_steps` must be left out where"):
        plot_history({"a": rows()}, skipped_steps=SKIPPED)


def test_skipped_steps_are_shown_though_no_norm_was_recorded():
    above, below = plot_history([{"step": 9, "loss": 1.0}], skipped_steps=SKIPPED).axes
    assert legend(above) == ["skipped: 4 steps"]
    assert legend(below) == ["training"]


def test_losses_over_decades_have_a_logarithmic_scale():
    history = [{"step": i, "loss": 10.0**i} for i in range(4)]
    assert plot_history(history).axes[0].get_yscale() == "log"
    assert plot_history(rows()).axes[1].get_yscale() == "linear"


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="`history` must hold at least one row"):
        plot_history([])
    with pytest.raises(ValueError, match="`history` must hold at least one row"):
        plot_history({"a": []})


def test_missing_matplotlib_is_an_error_that_names_the_extra():
    program = (
        "import sys; sys.modules['matplotlib'] = None; import optax_guard.plotting"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "pip install 'optax-guard[plot]'" in result.stderr
