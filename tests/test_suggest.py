"""Choosing a threshold, against plain NumPy."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from optax_guard.__main__ import main
from optax_guard._records.step_shares import step_norms
from optax_guard.analysis import History, suggest_max_norm

RNG = np.random.default_rng(0)
NORMS = np.exp(RNG.normal(size=400))


def rows(norms):
    return [{"step": i + 1, "grad_norm": float(x)} for i, x in enumerate(norms)]


@pytest.mark.parametrize("clip_rate", [0.5, 0.1, 0.01])
def test_share_above_it_is_the_one_asked_for(clip_rate):
    suggestion = suggest_max_norm(rows(NORMS), clip_rate=clip_rate)
    late = np.sort(NORMS[200:])
    # Two digits are right to 5 % at worst.
    wanted = late[int((1 - clip_rate) * 199)]
    assert suggestion.max_norm == pytest.approx(wanted, rel=0.05)
    assert suggestion.clip_rate == np.mean(suggestion.max_norm < NORMS)
    assert suggestion.num_norms == 400
    middle = np.quantile(NORMS, 0.5, method="inverted_cdf")
    assert suggestion.quantiles[0.5] == pytest.approx(middle, rel=1e-9)
    assert suggestion.quantiles[1.0] == NORMS.max()


def test_start_of_a_run_does_not_count():
    norms = np.concatenate([50 * NORMS[:100], NORMS[100:]])
    assert (
        suggest_max_norm(rows(norms)).max_norm == suggest_max_norm(rows(NORMS)).max_norm
    )


def said(norms) -> str:
    return str(suggest_max_norm(rows(norms)))


def test_reasons_say_what_was_seen():
    calm = 1 + 0.1 * RNG.random(100)
    assert "no step stands out" in said(calm)
    spiky = calm.copy()
    spiky[70] = 500
    assert "500 at step 71" in said(spiky)
    assert "is for such steps" in said(spiky)
    assert "cannot be told: 0 rows have a finite `train_loss`" in said(calm)
    assert "changed by a factor" not in said(calm)
    assert "changed by a factor of 8" in said(np.repeat([1.0, 8.0], 50))
    assert "not finite" not in said(calm)
    assert "2 norms were 0 or not finite" in said([*calm, np.nan, 0.0])


def test_many_clipped_steps_and_no_step_that_stands_out_are_never_said_together():
    growing = np.geomspace(1, 4, 200) * (1 + 0.1 * RNG.random(200))
    falling = growing[::-1]
    for norms in (NORMS, growing, falling, np.repeat([4.0, 1.0], 100)):
        for clip_rate in (0.01, 0.1, 0.5, 0.9):
            found = suggest_max_norm(rows(norms), clip_rate=clip_rate)
            share = np.mean(found.max_norm < norms)
            assert found.clip_rate == pytest.approx(share)
            assert (share > 0.2) != ("will rarely matter" in str(found))


# Rows of intervals, of which the norms of all steps are known here -----------------


def intervals(norms, length):
    """Rows such as `fit` writes."""
    parts = np.asarray(norms).reshape(-1, length)
    return [
        {
            "step": length * (i + 1),
            "grad_norm": float(part.max()),
            "grad_norm_mean": float(part.mean()),
        }
        for i, part in enumerate(parts)
    ]


def norms_of(kind, rng):
    steps = np.arange(4000)
    return {
        "log-normal": np.exp(0.4 * rng.normal(size=4000)),
        "wide": np.exp(1.0 * rng.normal(size=4000)),
        "uniform": 1 + rng.random(4000),
        "drifting": np.exp(0.2 * rng.normal(size=4000)) * np.geomspace(3, 1, 4000),
        "rare": np.where(steps % 250 == 7, 30.0, 1.0)
        * np.exp(0.3 * rng.normal(size=4000)),
    }[kind]


@pytest.mark.parametrize("kind", ["log-normal", "wide", "uniform", "drifting", "rare"])
@pytest.mark.parametrize("length", [5, 20, 100])
def test_tenth_of_steps_is_a_tenth_of_steps_for_rows_of_intervals(kind, length):
    """A tenth of row maxima would be 0.1 / length of the steps, or little more."""
    norms = norms_of(kind, np.random.default_rng(3))
    found = suggest_max_norm(intervals(norms, length))
    true_share = np.mean(found.max_norm < norms[2000:])
    of_all = np.mean(found.max_norm < norms)
    if (kind, length) != ("uniform", 100):  # Their tail is no log-normal one.
        assert 0.08 < true_share < 0.13
        assert found.clip_rate == pytest.approx(of_all, abs=0.025)
    bounds = re.search(r"certain ([\d.]+) to ([\d.]+) %", str(found))
    assert bounds is not None
    low, high = (float(percent) / 100 for percent in bounds.groups())
    assert 0.99 * low <= of_all <= 1.01 * high
    assert found.quantiles[1.0] == pytest.approx(norms.max())


def test_bounds_on_a_share_are_those_that_mean_and_largest_allow():
    """By hand: of 4 steps with mean 2 and largest 5, the others add up to 3."""
    row = {"step": 4, "grad_norm": 5.0, "grad_norm_mean": 2.0}
    norms = step_norms([row])
    for x, (least, most) in {
        6.0: (0, 0),
        4.0: (1, 1),
        2.0: (1, 2),
        1.4: (1, 3),
        0.9: (1, 4),
        0.1: (1, 4),
    }.items():
        assert norms.bounds_above(x) == (least / 4, most / 4)
        assert least / 4 <= norms.share_above(x) <= most / 4
    # Steps without a finite norm do not count, nor does a mean make a step of two.
    half = {**row, "nonfinite_rate": 0.5}
    assert step_norms([half]).num_steps.tolist() == [2]
    assert step_norms([{"step": 9, "grad_norm": 5.0}]).num_steps.tolist() == [1]


def test_norms_of_single_steps_are_counted_one_by_one():
    found = suggest_max_norm(rows(NORMS))
    assert "for certain" not in str(found)
    assert "Of all 400 steps, " in str(found)


# Are all norms too large? ----------------------------------------------------------

FALLING = 3 * np.exp(-np.arange(40) / 60) + 0.05 * RNG.normal(size=40)
FLAT = 3 + 0.05 * np.cos(2 * np.arange(40))


def with_losses(losses, norms=NORMS[:40], **columns):
    return [
        {**row, "train_loss": float(loss), **columns}
        for row, loss in zip(rows(norms), losses, strict=True)
    ]


def has_fallen(losses):
    """The rule in plain Python, for 40 losses: of the first 5 and of the last 10."""
    changes = sorted(abs(b - a) for a, b in pairwise(losses))
    noise = changes[19] / (0.6745 * 2**0.5)
    error = noise * (1 / 5 + 1 / 10) ** 0.5
    return sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 2 * error


def test_losses_tell_whether_all_norms_are_too_large():
    usual = suggest_max_norm(rows(NORMS[:40])).max_norm
    verdicts = []
    for _ in range(40):
        slope = 0.1 * RNG.random()
        losses = 3 - slope * np.arange(40) / 10 + 0.1 * RNG.normal(size=40)
        found = suggest_max_norm(with_losses(losses))
        assert found.are_all_too_large == (not has_fallen(losses.tolist()))
        factor = 0.1 if found.are_all_too_large else 1.0
        assert found.max_norm == pytest.approx(factor * usual, rel=0.06)
        verdicts.append(found.are_all_too_large)
    assert 5 < sum(verdicts) < 35
    assert re.search(
        r"fell from 2\.\d* to 1\.[67]\d*, by more",
        str(suggest_max_norm(with_losses(FALLING))),
    )
    lost = np.where(np.arange(40) < 25, FALLING, np.nan)
    assert "are not finite. All norms" in str(suggest_max_norm(with_losses(lost)))


def test_single_bad_batch_does_not_make_all_norms_too_large():
    for bad in (np.nan, np.inf):
        losses = FALLING.copy()
        losses[[12, 38]] = bad
        assert suggest_max_norm(with_losses(losses)).are_all_too_large is False


def test_what_cannot_be_told_is_said():
    clipped = suggest_max_norm(with_losses(FLAT, clip_rate=0.8))
    assert clipped.are_all_too_large is None
    assert "was itself clipped, in 80 % of its steps" in str(clipped)
    assert suggest_max_norm(with_losses(FLAT, clip_rate=0.1)).are_all_too_large is True
    few = with_losses(FLAT)
    for row in few[15:]:
        del row["train_loss"]
    assert "15 rows have a finite `train_loss`" in str(suggest_max_norm(few))


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"must have 20 rows.* got 19"):
        suggest_max_norm(rows([*NORMS[:19], np.inf, np.nan, 0.0]))
    for clip_rate in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`clip_rate` must be"):
            suggest_max_norm(rows(NORMS), clip_rate=clip_rate)


def test_command(tmp_path, capsys):
    history = History(tmp_path / "history.jsonl")
    for row in rows(NORMS):
        history.append(row["step"], row)
    assert main(["suggest", str(tmp_path)]) == 0
    wanted = suggest_max_norm(rows(NORMS))
    assert capsys.readouterr().out.startswith(f"max_norm {wanted.max_norm:g}\n")
    assert main(["suggest", str(tmp_path), "--json", "--clip-rate", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clip_rate"] == pytest.approx(0.5, abs=0.05)
    assert main(["suggest", str(tmp_path), "--clip-rate", "2"]) == 1
    assert "`--clip-rate` must be" in capsys.readouterr().err
