"""Replay of stop rules on recorded runs, against plain Python."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optax_guard as og
from optax_guard.__main__ import main
from optax_guard._cli.replay import parse_rule
from optax_guard.analysis import History, replay, table
from optax_guard.analysis._noise import least_difference, least_fall, noise_of
from tests.strategies import f32

RNG = np.random.default_rng(0)
STEPS = np.arange(40)
LOSSES = f32(2 * np.exp(-STEPS / 8) + 0.01 * STEPS + 0.05 * RNG.normal(size=40))


# What no type checker would let pass.
LOOSE: Any = 3


def recorded(losses: Any = LOSSES) -> History:
    history = History()
    for i, loss in enumerate(losses):
        history.append(5 * (i + 1), train_loss=float(loss) - 0.1, val_loss=float(loss))
        history.append(5 * (i + 1) + 1, grad_norm=1.0)  # Not an evaluation.
    return history


def after_patience(losses, patience):
    """Index of the evaluation at which it stops, the last if it does not; the best."""
    best, since = 0, 0
    for i, loss in enumerate(losses[1:], 1):
        best, since = (i, 0) if loss < losses[best] else (best, since + 1)
        if since == patience:
            return i, best
    return len(losses) - 1, best


def test_patience_stops_where_a_python_loop_does():
    rules = {str(n): og.stop.patience(n) for n in (1, 2, 3, 5, 8, 100)}
    outcomes = replay(recorded(), rules)
    assert [one.name for one in outcomes] == list(rules)
    for one in outcomes:
        stopped, best = after_patience(LOSSES, int(one.name))
        assert one.stopped_step == 5 * (stopped + 1)
        assert one.best_step == 5 * (best + 1)
        assert one.best_value == LOSSES[best]
        assert one.steps_saved == 5 * (len(LOSSES) - 1 - stopped)
        assert one.loss_given_up == pytest.approx(LOSSES[best] - LOSSES.min(), abs=1e-7)
        has_stopped = stopped < len(LOSSES) - 1
        reason = og.StopReason.PATIENCE if has_stopped else og.StopReason.RUNNING
        assert one.reason == reason
    assert len({one.stopped_step for one in outcomes}) > 3


def test_larger_may_be_better():
    history = [{"step": i, "accuracy": -x} for i, x in enumerate(LOSSES.tolist())]
    rules = {"3": og.stop.patience(3)}
    with pytest.raises(ValueError, match="`mode` must be given for 'accuracy'"):
        replay(history, rules, key="accuracy")
    (one,) = replay(history, rules, key="accuracy", mode="max")
    stopped, best = after_patience(LOSSES, 3)
    assert (one.stopped_step, one.best_step) == (stopped, best)
    assert one.best_value == -LOSSES[best]
    assert one.loss_given_up == pytest.approx(LOSSES[best] - LOSSES.min(), abs=1e-7)


def test_stoppers_are_played_as_they_are():
    losses = [3.0, math.nan, 2.0, 2.5, 2.5, 1.0]
    stoppers = {
        "stops": og.early_stopping(og.stop.patience(2)),
        "waits": og.early_stopping(og.stop.patience(2), nonfinite="wait"),
        "ignores": og.early_stopping(og.stop.patience(3), nonfinite="ignore"),
    }
    stops, waits, ignores = replay(recorded(losses), stoppers)
    assert (stops.reason, stops.stopped_step) == (og.StopReason.NONFINITE, 10)
    assert (waits.reason, waits.stopped_step) == (og.StopReason.PATIENCE, 25)
    assert (ignores.reason, ignores.best_value) == (og.StopReason.RUNNING, 1.0)
    assert (stops.loss_given_up, waits.loss_given_up) == (2.0, 1.0)


def test_rules_find_other_columns():
    monitor = og.stop.monitor("train_loss", og.stop.target(0.5))
    rules = {"gap": og.stop.overfitting(2), "other": monitor}
    _, other = replay(recorded(), rules)
    first = int(np.argmax(LOSSES - np.float32(0.1) <= 0.5))
    assert (other.reason, other.stopped_step) == (og.StopReason.TARGET, 5 * (first + 1))


def test_run_without_a_finite_value():
    (one,) = replay(recorded([math.nan, math.inf]), {"p": og.stop.patience(1)})
    assert (one.best_step, one.stopped_step) == (-1, 5)
    assert math.isnan(one.best_value)
    assert "nan" in table([one])


def test_table_has_a_line_a_rule():
    outcomes = replay(recorded(), {"three": og.stop.patience(3)})
    heading, line = table(outcomes).splitlines()
    assert heading.split()[0] == "rule"
    assert line.split()[:2] == ["three", str(outcomes[0].stopped_step)]


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(ValueError, match="needs seconds, which a history does not"):
        replay(recorded(), {"b": og.stop.budget(seconds=3)})
    with pytest.raises(ValueError, match="must have rows with 'gap'"):
        replay(recorded(), {"p": og.stop.patience(1)}, key="gap")
    with pytest.raises(TypeError, match="`rules\\['p'\\]` must be a rule"):
        replay(recorded(), {"p": LOOSE})
    with pytest.raises(ValueError, match="`rules` must have at least one rule"):
        replay(recorded(), {})
    with pytest.raises(ValueError, match="needs 'train_loss' in every row"):
        replay([{"step": 1, "val_loss": 1.0}], {"g": og.stop.overfitting(2)})


# Noise ----------------------------------------------------------------------------


def test_noise_is_that_of_curves_of_which_it_is_known():
    steps = np.arange(60)
    for trend in (0 * steps, np.exp(-steps / 10), 0.05 * steps, 1.0 * (steps > 30)):
        found = [noise_of(trend + 0.1 * RNG.normal(size=60)) for _ in range(200)]
        assert np.mean(found) == pytest.approx(0.1, rel=0.1)
    assert math.isnan(noise_of(np.array([1.0] * 7 + [np.nan])))
    assert noise_of(np.linspace(0, 1, 9)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("first", "later"), [(3, 1), (10, 10), (20, 60)])
def test_noise_alone_is_taken_for_a_difference_in_at_most_one_of_twenty_runs(
    first, later
):
    """And a true one of twice the least difference is told in most."""
    curves = RNG.normal(size=(2000, first + later))
    least = np.array([least_difference(noise_of(x), later) for x in curves])
    if first + later < 8:
        assert np.isnan(least).all()
        return

    def told(fall):
        values = curves - fall * (np.arange(first + later) >= first)
        lead = values[:, :first].min(1) - values[:, first:].min(1)
        return np.mean(lead > least)

    assert told(0.0) <= 0.05
    assert told(2 * least_difference(1.0, later)) > 0.8


@pytest.mark.parametrize("patience", [1, 2, 5, 12])
def test_least_fall_is_hidden_from_patience_in_about_one_of_twenty_runs(patience):
    n, rng = patience, np.random.default_rng(patience)
    before = rng.normal(size=(20000, n))
    falling = rng.normal(size=(20000, n)) - least_fall(1.0, n) * np.arange(1, n + 1) / n
    assert 0.044 < np.mean(falling.min(1) >= before.min(1)) < 0.056
    assert least_fall(3.0, n) == pytest.approx(3 * least_fall(1.0, n))


def test_outcome_that_noise_explains_is_undecidable():
    noise = 0.1 * np.random.default_rng(5).normal(size=60)
    flat = 1 + np.maximum(0, 1 - np.arange(60) / 10) + noise
    deep = flat - 1.0 * (np.arange(60) > 40)
    rules = {"2": og.stop.patience(2), "100": og.stop.patience(100)}
    for values, is_told in ((flat, False), (deep, True)):
        early, late = replay(recorded(values), rules)
        assert early.loss_given_up > 0
        assert early.undecidable == (not is_told)
        after = 60 - early.stopped_step // 5
        expected = least_difference(noise_of(values), after)
        assert early.least_difference == pytest.approx(expected, rel=1e-4)
        expected = least_fall(noise_of(values), 2)
        assert early.least_fall == pytest.approx(expected, rel=1e-4)
        assert (late.undecidable, late.least_difference) == (False, 0.0)
        assert (", undecidable" in table([early])) == (not is_told)


# Text, command, figure ------------------------------------------------------------


def test_rules_are_read_from_text():
    history = recorded()
    text = "any_of(patience(3, min_delta=-0.0), target(0.4))"
    rule = og.stop.any_of(og.stop.patience(3), og.stop.target(0.4))
    assert replay(history, {"r": parse_rule(text)}) == replay(history, {"r": rule})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patience(5", "`rule` must be a call"),
        ("5", "must be a call of a rule"),
        ("__import__('os').system('true')", "no rule"),
        ("open('x')", "no rule 'open'; there are all_of, any_of, budget"),
        ("patience(*[5])", "without stars"),
        ("patience(0)", "`rule` 'patience\\(0\\)': `n` must be"),
        ("patience(lambda: 3)", "`rule` 'patience"),
        ("ema(0.9)", "no rule 'ema'"),
    ],
)
def test_text_that_is_no_rule(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(text)


def test_command_prints_a_line_a_rule_and_writes_only_where_it_is_told(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "history.jsonl"
    write(path)
    assert main(["replay", str(path), "--rule", "patience(3)"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("patience(3)")
    assert {p.name for p in path.parent.iterdir()} == {"history.jsonl"}
    assert main(["replay", str(path), "--json", "--out", "out"]) == 0
    (found, *_) = json.loads(capsys.readouterr().out)["rules"]
    assert found["stopped_step"] == 5 * (after_patience(LOSSES, 1)[0] + 1)
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert main(["replay", str(path), "--rule", "patience(-1)"]) == 1
    assert "patience(-1)" in capsys.readouterr().err


def write(path: Path) -> None:
    history = History(path)
    for row in recorded():
        history.append(row["step"], row)


def test_figure_names_every_rule():
    plotting = pytest.importorskip("optax_guard.plotting")
    history = recorded([3.0, 2.0, math.nan, 2.5, 1.0])
    outcomes = replay(history, {"a": og.stop.patience(1), "b": og.stop.target(0.1)})
    figure = plotting.plot_replay(history, outcomes)
    _, below = figure.axes
    assert [label.get_text() for label in below.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="`replayed` must hold"):
        plotting.plot_replay(history, [])
