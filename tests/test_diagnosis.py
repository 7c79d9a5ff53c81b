"""What histories mean: one that shows each finding, one that must not, and no noise."""

import collections
import functools
import math
from typing import Any, cast

import numpy as np
import pytest

import optax_guard as og
from optax_guard._records.rows import as_rows
from optax_guard.analysis import Diagnosis, FindingCode, History, Severity, diagnose

NAN, INF = math.nan, math.inf
FALLING = [2.3 * 0.9**i for i in range(30)]


def rows(**columns):
    """Rows of columns; a number is the same in every row."""
    n = max(len(c) for c in columns.values() if not isinstance(c, int | float))
    columns = {
        k: [c] * n if isinstance(c, int | float) else c for k, c in columns.items()
    }
    steps = columns.pop("step", range(1, n + 1))
    return [
        {"step": step, **{name: c[i] for name, c in columns.items()}}
        for i, step in enumerate(steps)
    ]


def noisy(line, size, seed):
    return [
        float(x)
        for x in line + size * np.random.default_rng(seed).normal(size=len(line))
    ]


# The last three are worse than the one before by noise alone.
NOISY = noisy(2 - 0.01 * np.arange(40), 0.06, 3)

# Code -> a history that shows it, and one near to it that does not.
CASES = {
    "CLIPPING_WORKS": (
        rows(
            grad_norm=[15.2, 12.7, 20.5, 4.8, 3.2],
            clip_threshold=5.0,
            loss=[2.3, 1.8, 1.2, 0.9, 0.7],
        ),
        rows(grad_norm=[15.2, 12.7, 20.5, 4.8, 3.2], clip_threshold=5.0, loss=2.3),
    ),
    "EXPLODING": (
        rows(grad_norm=[1, 2, 1, 30, 1e3], loss=[2.3, 2.2, 2.5, 8, 100]),
        # Norms that grow as much while the loss falls, and then come back.
        rows(grad_norm=[1, 2, 1, 30, 1e3, 20], loss=FALLING[:6]),
    ),
    "OVER_CLIPPED": (
        rows(
            grad_norm=50.0, clip_threshold=0.5, loss=[2.3 - 0.01 * i for i in range(20)]
        ),
        # Everything clipped, by little: as an adaptive threshold does.
        rows(
            grad_norm=0.6, clip_threshold=0.5, loss=[2.3 - 0.01 * i for i in range(20)]
        ),
    ),
    "NEVER_CLIPPED": (
        rows(grad_norm=0.5, clip_threshold=100.0, loss=FALLING),
        rows(grad_norm=[0.5] * 29 + [60.0], clip_threshold=100.0, loss=FALLING),
    ),
    "VANISHING": (
        rows(grad_norm=[10 * 0.3**i for i in range(12)], loss=2.3),
        # Converging.
        rows(grad_norm=[10 * 0.3**i for i in range(12)], loss=FALLING[:12]),
    ),
    "NONFINITE_LOSS_DESPITE_CLIPPING": (
        rows(grad_norm=100.0, clip_threshold=5.0, loss=[2.3, 2.4, 2.3, 2.4, NAN]),
        # The guard skipped that step.
        rows(
            grad_norm=100.0,
            clip_threshold=5.0,
            num_skipped=[0, 0, 0, 0, 1],
            loss=[2.3, 2.4, 2.3, 2.4, NAN],
        ),
    ),
    "LOSS_SPIKE_WITHOUT_NORM_SPIKE": (
        rows(grad_norm=1.0, loss=[2.3, 2.1, 1.9, 1.8, 9.0, 1.7]),
        rows(grad_norm=[1, 1, 1, 1, 9.0, 1], loss=[2.3, 2.1, 1.9, 1.8, 9.0, 1.7]),
    ),
    "DIRECTION_DISTORTED": (
        rows(update_cosine=0.6, grad_norm=10.0, clipped_norm=3.0, loss=FALLING[:6]),
        rows(update_cosine=0.97, grad_norm=10.0, clipped_norm=9.0, loss=FALLING[:6]),
    ),
    "CLIPPED_TOO_LATE": (
        rows(
            grad_norm=[1, 1.2, 1, 50, 80, 60, 40],
            clip_threshold=[INF] * 4 + [1.0] * 3,
            loss=[2, 1.9, 1.8, 3, 3, 2.9, 2.5],
        ),
        rows(
            grad_norm=[1, 1.2, 1, 1.5, 80, 60, 40],
            clip_threshold=[INF] * 4 + [1.0] * 3,
            loss=[2, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4],
        ),
    ),
    "SKIP_STORM": (
        rows(step=range(10, 70, 10), num_skipped=range(0, 30, 5), loss=2.0),
        rows(step=range(10, 70, 10), num_skipped=range(0, 12, 2), loss=2.0),
    ),
    "REGIME_SHIFT": (
        rows(grad_norm=[1.0] * 12 + [6.0] * 18, loss=FALLING),
        # A larger change, as a drift.
        rows(grad_norm=[100 ** (i / 30) for i in range(30)], loss=FALLING),
    ),
    "OVERFITTING": (
        rows(
            train_loss=[2 * 0.8**i for i in range(10)],
            val_loss=[2, 1.7, 1.5, 1.4, 1.38, 1.45, 1.5, 1.6, 1.65, 1.7],
        ),
        # Training gets worse as well: not overfitting, the run diverges.
        rows(
            train_loss=[1, 0.8, 0.6, 0.5, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
            val_loss=[2, 1.7, 1.5, 1.4, 1.38, 1.45, 1.5, 1.6, 1.65, 1.7],
        ),
    ),
    "SHORT_PATIENCE": (
        rows(val_loss=NOISY, train_loss=[2 * 0.98**i for i in range(40)]),
        # Training has come to its end.
        rows(val_loss=NOISY, train_loss=0.9),
    ),
    "NONFINITE_BATCH": (
        rows(
            grad_norm=[1.0] * 9 + [0.86] + [1.0] * 5,
            nonfinite_rate=[0.0] * 9 + [0.1] + [0.0] * 5,
            step=range(10, 160, 10),
            loss=FALLING[:15],
        ),
        # The norms of the rows before had risen: it is the consequence of that.
        rows(
            grad_norm=[1.0] * 8 + [40.0, 900.0] + [NAN] * 5,
            nonfinite_rate=[0.0] * 9 + [0.1] + [1.0] * 5,
            step=range(10, 160, 10),
            loss=[*FALLING[:8], 3.0, 9.0, *[NAN] * 5],
        ),
    ),
    "STEPS_SKIPPED": (
        rows(step=range(10, 70, 10), num_skipped=[0, 0, 1, 1, 2, 2], loss=2.0),
        rows(step=range(10, 70, 10), num_skipped=0, loss=[2.0] * 6),
    ),
    "ZERO_GRADIENTS": (
        rows(grad_norm=[0.0, 0.1, 0.2, 0.1, 0.3] * 6, loss=0.0),
        rows(grad_norm=[0.0] + [0.1] * 29, loss=0.0),
    ),
    "NONFINITE_PARAMETERS": (
        rows(loss=[2.0, 1.9, NAN, NAN, NAN], grad_norm=[1.0, 1.0, NAN, NAN, NAN]),
        # It has recovered, so that the parameters were never lost.
        rows(loss=[2.0, NAN, NAN, NAN, 1.8], grad_norm=[1.0, NAN, NAN, NAN, 1.0]),
    ),
    "RATE_TOO_HIGH": (
        # Steps of 20 % of the parameters; norms tell nothing.
        rows(
            update_ratio=[0.01, 0.01, 0.01, 0.2, 0.2, 0.15],
            grad_norm=[1.0, 1.1, 1.0, 0.9, 0.8, 0.9],
            loss=[2.3, 2.2, 2.1, 2.4, 2.3, 2.35],
        ),
        rows(
            update_ratio=[0.04, 0.03, 0.02, 0.02, 0.01, 0.01],
            grad_norm=[1.0, 1.1, 1.0, 0.9, 0.8, 0.9],
            loss=FALLING[:6],
        ),
    ),
    "TOO_FEW_ROWS": (rows(loss=FALLING[:4]), rows(loss=FALLING[:5])),
}


def codes(history, **how):
    return {finding.code.name for finding in diagnose(history, **how)}


def test_codes_are_those_that_were_promised():
    assert list(FindingCode) == [code.name for code in FindingCode]
    assert set(CASES) == set(FindingCode)


@pytest.mark.parametrize("code", list(CASES))
def test_each_finding_has_a_history_that_shows_it_and_one_that_does_not(code):
    shows, does_not = CASES[code]
    found = next(f for f in diagnose(shows) if f.code == code)
    assert found.evidence
    assert found.advice
    for value in found.evidence.values():
        assert isinstance(value, str | int | float)
    assert code not in codes(does_not)


def test_five_epochs_read_as_working_and_as_nothing_else():
    (finding,) = diagnose(CASES["CLIPPING_WORKS"][0])
    assert finding.code == FindingCode.CLIPPING_WORKS
    assert finding.severity == Severity.INFO
    assert finding.evidence == {
        "clip_share": 0.6,
        "largest_norm": 20.5,
        "largest_after_clip": 5.0,
        "first_loss": 2.3,
        "loss": 0.7,
    }


def test_lost_loss_under_a_clip_reads_as_not_enough():
    finding = diagnose(CASES["NONFINITE_LOSS_DESPITE_CLIPPING"][0])[0]
    assert finding.severity == Severity.ERROR
    assert "clipping is not enough" in str(finding)
    assert finding.step == 5
    assert finding.evidence["clipped_norm"] == 5.0
    assert finding.as_dict()["evidence"]["loss"] == "NaN"


def test_gradient_that_is_not_finite_is_a_batch_unless_norms_had_risen():
    """One NaN batch at a norm of 0.86 was called EXPLODING, with "typical 20.3"."""
    history = rows(grad_norm=[20.0, 21.0, 20.0, 0.86, INF], loss=2.0)
    (finding,) = diagnose(history)
    assert finding.code == "NONFINITE_BATCH"
    assert (finding.evidence["nonfinite_steps"], finding.step) == (1, 5)
    risen = rows(grad_norm=[1.0, 1.0, 1.0, 30.0, INF], loss=2.0)
    assert "EXPLODING" in codes(risen)
    assert codes([{**row, "skip_rate": 0.1} for row in history]) == {"STEPS_SKIPPED"}


def test_one_skip_is_found_though_the_step_of_a_row_is_an_epoch():
    # 14 updates an epoch; the guard skipped one of the fourth epoch.
    history = [
        {
            "step": epoch,
            "grad_norm": 0.5,
            "num_updates": 14 * epoch,
            "num_skipped": int(epoch >= 4),
            "skip_rate": int(epoch >= 4) / (14 * epoch),
            "val_loss": 1 / epoch,
        }
        for epoch in range(1, 11)
    ]
    (finding,) = [f for f in diagnose(history) if f.code == "STEPS_SKIPPED"]
    assert (finding.evidence["skipped"], finding.evidence["of_steps"]) == (1, 140)
    assert finding.evidence["last_in_row_of_step"] == 4


def test_run_that_one_batch_killed_has_a_cause_and_a_consequence():
    losses = [*FALLING[:12], *[NAN] * 8]
    norms = [*[1.0] * 12, 0.86, *[NAN] * 7]
    history = rows(
        loss=losses,
        val_loss=losses,
        grad_norm=norms,
        nonfinite_rate=[*[0.0] * 12, 0.5, *[1.0] * 7],
        step=range(10, 210, 10),
    )
    found = {f.code: f for f in diagnose(history)}
    assert set(found) == {"NONFINITE_BATCH", "NONFINITE_PARAMETERS"}
    assert found[FindingCode.NONFINITE_PARAMETERS].evidence["since_step"] == 140
    assert found[FindingCode.NONFINITE_BATCH].evidence["nonfinite_steps"] == 5


# As logs have them that are rounded to 4 decimals. The norms of a public GRPO run:
# groups of equal rewards have a gradient of exactly 0.
ZERO_NORMS = [0, 0, 0.0631, 0.0632, 0.0181, 0.0182, 0.0884, 0.0883, 0.2067, 0.2072]
ZERO_NORMS += [0.0805, 0.0795, 0, 0, 0.165, 0.165, *[0.09, 0.2] * 40]
CALM = [0.10, 0.11, 0.12] * 30


@pytest.mark.parametrize(
    "history",
    [
        rows(loss=[0.0] * 11 + [1e-4], grad_norm=CALM[:12]),
        rows(loss=[5e-4, 3e-4, *[2e-4] * 3, *[1e-4] * 7, 2e-4], grad_norm=CALM[:13]),
        rows(loss=0.0, grad_norm=ZERO_NORMS),
    ],
)
def test_rounded_losses_and_zero_norms_are_no_faults(history):
    assert codes(history) == set()


def test_noise_alone_is_no_success_of_clipping():
    def flat(seed):
        losses, norms = (
            noisy(np.full(60, 2.12), 0.12, seed),
            noisy(np.ones(60), 0.15, seed),
        )
        return rows(loss=losses, grad_norm=norms, clip_threshold=1.0)

    assert sum("CLIPPING_WORKS" in codes(flat(seed)) for seed in range(40)) <= 1


def test_tight_clip_is_no_warning_while_the_loss_falls():
    norms = [20.5, 16.3, 28.5, 9.9, 13.0, 8.5, 25.1, 8.0, 13.3, 1.9, 2.7, 4.4, 6.1]
    losses = [0.669, 0.545, 0.41, 0.325, 0.29, 0.254, 0.21, 0.203, 0.166, 0.157]
    history = rows(
        grad_norm=norms, loss=[*losses, 0.136, 0.13, 0.12], clip_threshold=1.0
    )
    (finding,) = [f for f in diagnose(history) if f.code == "OVER_CLIPPED"]
    assert finding.severity == "info"
    assert "Adam" in finding.advice


@pytest.mark.parametrize("size", [1e150, 1e300])
def test_huge_losses_are_diagnosed(size):
    losses = [size * (1 + 0.01 * (i % 3)) for i in range(30)]
    history = rows(loss=losses, val_loss=losses, grad_norm=1.0, clip_threshold=1.0)
    # Float32 does not hold them.
    assert codes(history) == {"NONFINITE_LOSS_DESPITE_CLIPPING"}


def test_loss_before_training_tells_of_a_rate_that_is_too_high():
    history = rows(train_loss=2.4, val_loss=[2.6] * 8, grad_norm=0.3)
    assert codes(history) == set()
    for name in ("initial_value", "baseline"):
        assert codes([{**history[0], name: 2.5}, *history[1:]]) == {"RATE_TOO_HIGH"}
        # Steps this small do not do that.
        small = [{**row, name: 2.5, "update_ratio": 4e-4} for row in history]
        assert codes(small) == set()
    # Of an accuracy it tells nothing.
    gains = rows(train_loss=2.4, value=[0.6] * 8, grad_norm=0.3)
    assert codes([{**gains[0], "initial_value": 0.1}, *gains[1:]]) == set()


def test_validation_that_rises_after_a_change_of_the_data_is_no_overfitting():
    trains = [1 + 0.8**i for i in range(12)]
    vals = [1.4 + 0.7**i for i in range(12)]
    # The training loss leaps by 16 %, and comes back to where it was.
    trains += [1.29 - 0.008 * i for i in range(20)]
    vals += [1.42 + 0.02 * i for i in range(20)]
    assert "OVERFITTING" not in codes(rows(train_loss=trains, val_loss=vals))


def test_spike_of_a_run_that_explodes_is_no_finding_of_its_own():
    losses = [3 - 0.05 * i for i in range(12)]
    calm = rows(loss=[*losses, 4.0, 2.4], grad_norm=1.0, update_ratio=0.001)
    assert codes(calm) == {"LOSS_SPIKE_WITHOUT_NORM_SPIKE"}
    end = rows(loss=5.0, grad_norm=[1.0] * 4, update_ratio=0.3)
    for i, row in enumerate(end):
        row["step"] = calm[-1]["step"] + 1 + i
    assert codes([*calm, *end]) == {"RATE_TOO_HIGH"}


def test_burst_of_the_loss_in_the_first_row_tells_of_a_rate_that_is_too_high():
    ratios, vals = [0.05, 0.016, 0.008, 0.004], [3.9, 3.7, 3.7, 3.6]
    history = rows(train_loss=[11.5, 3.5, 3.4, 3.4], val_loss=vals, update_ratio=ratios)
    history[0]["initial_value"] = 5.8
    (finding,) = [f for f in diagnose(history) if f.code == "RATE_TOO_HIGH"]
    assert (finding.step, finding.evidence["loss"]) == (2, 11.5)
    # Such a training loss holds more than the validation loss does.
    history = [{**row, "train_loss": 11.5 - i} for i, row in enumerate(history)]
    assert "RATE_TOO_HIGH" not in codes(history)


def test_layers_with_tiny_gradients_vanish_though_the_norm_does_not():
    history = rows(leaf_norm_ratio=1e-4, grad_norm=1.0, loss=[2.3] * 20)
    assert codes(history) == {"VANISHING"}
    falling = rows(leaf_norm_ratio=1e-4, grad_norm=1.0, loss=FALLING[:20])
    assert codes(falling) == set()


def test_clipped_steps_count_though_no_norm_of_a_row_tells_of_them():
    history = rows(grad_norm=0.5, clip_threshold=100.0, clip_rate=[0.0] * 29 + [0.1])
    assert codes(history) == set()


def test_spike_of_a_row_is_no_other_level_of_norms():
    history = rows(grad_norm=[1.0] * 29 + [60.0], loss=FALLING)
    assert codes(history) == set()


def test_huge_batches_under_a_clip_are_no_explosion_and_no_tight_threshold():
    norms = [5e3 if i % 8 in (2, 4, 5) else 6.0 for i in range(30)]
    losses = np.where(np.array(norms) > 100, 1e4, FALLING).tolist()
    history = rows(grad_norm=norms, clip_threshold=5.0, loss=losses, val_loss=FALLING)
    assert not {"EXPLODING", "OVER_CLIPPED"} & codes(history)
    rising = [{**row, "val_loss": row["step"]} for row in history]
    assert "EXPLODING" in codes(rising)
    # Of a first loss that is infinite nothing can be worse.
    assert "EXPLODING" in codes([{**rising[0], "val_loss": math.inf}, *rising[1:]])


def test_huge_norm_between_two_rows_of_a_loop_of_ones_own_is_not_lost():
    """A row has the norm of its last step, and `norm_max` that of all steps."""
    history = rows(
        step=[20, 40, 60, 80, 100, 120],
        num_updates=[20, 40, 60, 80, 100, 120],
        grad_norm=[0.9, 0.5, 0.4, 0.35, 0.36, 0.33],
        norm_max=[2.0, 2.0, 2.25e4, 2.25e4, 2.25e4, 2.25e4],
        clip_threshold=1.0,
        clip_rate=[0.5, 0.25, 0.2, 0.15, 0.12, 0.1],
        train_loss=[4.0, 3.0, 2.5, 2.2, 2.0, 1.9],
    )
    full = as_rows(history)
    assert [row["grad_norm"] for row in full] == [0.9, 0.5, 2.25e4, 0.35, 0.36, 0.33]
    assert [row["clipped_norm"] for row in full][2] == 1.0
    (works,) = [f for f in diagnose(history) if f.code == "CLIPPING_WORKS"]
    assert works.evidence["largest_norm"] == 2.25e4


def test_run_that_was_lost_is_not_told_to_train_on():
    shows, _ = CASES["SHORT_PATIENCE"]
    history = [*shows, {"step": 41, "val_loss": NAN, "train_loss": 0.8}]
    assert "SHORT_PATIENCE" not in codes(history)


def test_norms_that_were_calm_again_do_not_make_a_later_nan_an_explosion():
    """One huge batch, then a row of calm norms in which most steps were not finite."""
    norms = {"grad_norm": [2.5, 2.4, 2.4e5, 2.4], "clipped_norm": [1.0, 1.0, 1.0, 1.0]}
    losses = {"train_loss": [3.6, 3.4, 3.3, 3.2], "val_loss": [3.5, 3.4, 3.3, NAN]}
    history = rows(**norms, **losses, nonfinite_rate=[0, 0, 0, 0.7])
    assert "EXPLODING" not in codes(history)
    assert "NONFINITE_BATCH" in codes(history)


def test_loss_that_rises_since_the_best_is_not_told_to_have_patience():
    losses = [3.18, 2.97, 2.86, 2.73, 2.77, 2.89, 2.81, 2.94, 2.94, 3.02]
    train = [3.0 - 0.2 * i for i in range(10)]
    assert "SHORT_PATIENCE" not in codes(rows(val_loss=losses, train_loss=train))


def test_leaf_is_named_if_the_skipped_steps_are_known():
    skipped = og.SkippedStep(3, NAN, NAN, og.SkipReason.NONFINITE, "['head']['w']")
    history = CASES["NONFINITE_LOSS_DESPITE_CLIPPING"][0]
    finding = diagnose(history, skipped_steps=[skipped])[0]
    assert finding.evidence["leaf"] == "['head']['w']"
    storm = CASES["STEPS_SKIPPED"][0]
    (finding,) = diagnose(storm, skipped_steps=[skipped])
    assert finding.evidence["at_steps"] == "3 (NONFINITE)"


def test_lost_loss_at_calm_norms_without_a_clip_is_not_the_gradient():
    history = rows(grad_norm=1.0, loss=[2.3, 2.1, NAN])
    assert codes(history) == {"NONFINITE_BATCH"}


@pytest.mark.parametrize(
    ("norms", "phase", "severity"),
    [
        ([50.0] * 20, "whole run", "warning"),
        ([50.0] * 10 + [0.2] * 10, "warm-up", "info"),
        ([0.2] * 10 + [50.0] * 10, "part of the run", "warning"),
    ],
)
def test_phase_of_clipping_too_much_is_named(norms, phase, severity):
    history = rows(grad_norm=norms, clip_threshold=0.5, loss=2.3)
    finding = next(f for f in diagnose(history) if f.code == "OVER_CLIPPED")
    assert (finding.evidence["phase"], finding.severity) == (phase, severity)


@pytest.mark.parametrize(("after", "is_too_much"), [(1.5, False), (0.1, True)])
def test_a_threshold_of_entries_is_not_compared_with_a_norm(after, is_too_much):
    history = rows(
        grad_norm=2.0,
        clipped_norm=after,
        clip_threshold=0.005,
        clip_rate=1.0,
        loss=[2.3] * 20,
    )
    codes = [finding.code for finding in diagnose(history)]
    assert ("OVER_CLIPPED" in codes) is is_too_much


def test_findings_come_when_they_first_hold_and_are_taken_back(capsys):
    diagnosis = Diagnosis()
    said = []
    for row in rows(
        grad_norm=[8.0] * 6, clip_threshold=5.0, loss=[3, 2.5, 2, 1.8, 1.5, NAN]
    ):
        diagnosis(row["step"], row)
        said.append(capsys.readouterr().out)
    spoken = {i: text.split()[1] for i, text in enumerate(said, start=1) if text}
    assert spoken == {4: "CLIPPING_WORKS", 6: "NONFINITE_LOSS_DESPITE_CLIPPING"}
    left = diagnosis.findings()
    assert [f.code for f in left] == [*list(spoken.values())[1:], "NONFINITE_BATCH"]


def test_rows_of_fit_history_and_dicts_say_the_same():
    plain = CASES["SKIP_STORM"][0]
    history = History()
    for row in plain:
        history(row["step"], row)
    assert list(map(str, diagnose(history))) == list(map(str, diagnose(plain)))
    assert diagnose([]) == []
    assert codes([{"value": 1.0}]) == {"TOO_FEW_ROWS"}
    with pytest.raises(TypeError, match="`history` must be a `History` or rows"):
        diagnose(cast(Any, [1.0]))


def healthy(seed):
    """Rows as `fit` writes them, of a simulated run that learns.

    Losses fall exponentially to a floor, with noise of up to 5 %; norms fall as well,
    with log-normal noise, and are now and then 2 to 30 times as large; four of five
    runs are clipped, at a quantile of their norms between 0.5 and 0.99.
    """
    rng = np.random.default_rng(seed)
    n, every = int(rng.integers(20, 150)), int(rng.integers(1, 200))
    i = np.arange(n)
    time = n * rng.uniform(0.03, 0.15)
    first, last = rng.uniform(2, 10), rng.uniform(0.05, 2)
    curve = last + (first - last) * np.exp(-i / time)
    train = curve * (1 + rng.uniform(0, 0.05) * rng.normal(size=n))
    val = curve * rng.uniform(1, 1.2) * (1 + rng.uniform(0, 0.03) * rng.normal(size=n))
    mean = rng.uniform(0.1, 5) * (1 + rng.uniform(0, 10) * np.exp(-i / time))
    mean *= np.exp(rng.uniform(0.05, 0.5) * rng.normal(size=n))
    norm = mean * (1 + rng.exponential(0.5, n))
    norm *= np.where(rng.random(n) < 0.02, rng.uniform(2, 30, n), 1)
    is_clipped = rng.random() < 0.8
    limit = np.quantile(norm, rng.uniform(0.5, 0.99)) if is_clipped else INF
    share = np.where(norm > limit, np.clip((norm / limit - 0.5) / 2, 0, 1), 0)
    return rows(
        step=every * (i + 1),
        grad_norm=norm,
        grad_norm_mean=mean,
        clipped_norm=np.minimum(norm, limit),
        clip_threshold=float(limit),
        clip_rate=share,
        skip_rate=0.0,
        train_loss=train,
        val_loss=val,
    )


@functools.cache
def false_alarms():
    """Of 300 healthy runs, how many have each finding, by severity and code."""
    counts = collections.Counter()
    for seed in range(300):
        found = [f for f in diagnose(healthy(seed)) if f.code != "CLIPPING_WORKS"]
        counts.update(f.code for f in found)
        counts["warned"] += any(f.severity != Severity.INFO for f in found)
    return counts


def test_healthy_runs_are_hardly_ever_warned_of():
    """Measured: no warning, and 8 infos on how a run ended or norms changed."""
    counts = false_alarms()
    assert counts["warned"] <= 3, counts
    assert sum(counts[code] for code in FindingCode) <= 15, counts


def test_time_a_row_does_not_grow_with_the_run():
    diagnosis = Diagnosis()
    for row in healthy(0) * 4:
        diagnosis.update(row)

    def size(x, seen):
        if id(x) in seen or isinstance(x, type):
            return 0
        seen.add(id(x))
        inner = vars(x).values() if hasattr(x, "__dict__") else ()
        if isinstance(x, dict):
            inner = list(x.values())
        elif isinstance(x, list | tuple | collections.deque):
            inner = list(x)
        return 1 + sum(size(y, seen) for y in inner)

    before = size(diagnosis, set())
    for row in healthy(0) * 20:
        diagnosis.update(row)
    assert size(diagnosis, set()) <= before + 50
