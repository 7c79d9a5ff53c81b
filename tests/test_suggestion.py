"""The study of suggestions measures what it says, on numbers worked out by hand."""

import math

import numpy as np
import pytest

from benchmarks import stability, suggestion
from benchmarks.suggestion import Watched, judge, measure, suggested, summarize, told
from tests.test_stability import PARABOLA

SETTINGS = stability.Settings(
    seeds=2, steps=40, eval_every=4, watched=40, num_rates=3, max_norms=(1.0,)
)


def by_rate(*rows):
    """Final losses [optimizer, scale, rate, seed] of one optimizer and scale."""
    return np.array(rows, float)[None, None]


def test_measures_are_those_of_the_definitions():
    inf = math.inf
    # Three learning rates: healthy, lost without a clip, lost with any.
    finals = {
        "unclipped": by_rate([1.0, 1.2], [inf, inf], [inf, inf]),
        "1": by_rate([1.3, 1.5], [0.8, 1.0], [2.9, 2.9]),
        "suggested": by_rate([1.1, 1.2], [1.0, 1.4], [2.8, 2.8]),
    }
    is_told = np.array([[[[False, True], [True, True], [True, False]]]])
    watched = Watched(np.ones((1, 1, 3, 2)), np.ones((1, 1, 3, 2)), is_told)
    ((found,),) = measure(watched, finals, 3.0, SETTINGS)
    assert found["trains"] == [True, True, False]
    seen = found["contenders"]["suggested"]
    # At their own best rates: 1.15 of the suggestion, 0.9 of the sweep.
    assert seen["regret"] == pytest.approx(0.25)
    assert seen["regret_at_each_rate"][:2] == pytest.approx([0.05, 0.3])
    # The median over seeds of 0.1 and 0; the other cells are not healthy.
    assert seen["slowdown"][0] == pytest.approx(0.05)
    assert np.isnan(seen["slowdown"][1:]).all()
    shares = told([found])
    assert (shares["told_if_healthy"], shares["told_if_lost"]) == (0.5, 1.0)
    summary = summarize([found])
    assert summary["suggested"]["mean regret at each rate"] == pytest.approx(0.175)
    assert summary["suggested"]["share near best"] == 0.5
    met = {line["goal"]: line["is_met"] for line in judge({"SGD": summary})}
    assert met == {
        "mean regret at most 0.05": False,
        "largest regret at most 0.15": False,
        "largest slowdown at most 0.02": False,
    }


def test_suggestions_are_with_and_without_losses():
    norms, losses = np.linspace(1.0, 2.0, 40), np.linspace(3.0, 2.0, 40)
    assert suggested(norms, losses) == (1.9, 1.9, False)
    assert suggested(norms, losses[::-1]) == (1.9, 0.19, True)
    assert suggested(np.full(40, np.nan), losses) == (math.inf, math.inf, False)


def test_runs_are_made_with_what_was_suggested_of_each(monkeypatch):
    monkeypatch.setattr(suggestion, "FIRST_SEED", 0)
    runs = suggestion.run_all({"parabola": (PARABOLA, (1.0,))}, SETTINGS)
    watched, finals = runs["parabola"]
    assert finals.keys() >= {"1", "suggested", "at lowest", "tenth", "unclipped"}
    # Below the limit of stability the loss falls, and above it grows.
    assert not watched.is_told[0, :, :2].any()
    assert watched.is_told[0, :, 2].all()
    np.testing.assert_array_equal(
        watched.suggested[0, :, :2], watched.norms_alone[0, :, :2]
    )
    np.testing.assert_allclose(
        watched.suggested[0, :, 2], watched.norms_alone[0, :, 2] / 10, rtol=0.06
    )
    is_usual = ~watched.is_told
    np.testing.assert_array_equal(
        finals["suggested"][is_usual], finals["norms alone"][is_usual]
    )
