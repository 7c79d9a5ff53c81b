"""The command `optax-guard`: its words, its options, and `watch`."""

import contextlib
import json
import re
from pathlib import Path

import pytest

import optax_guard as og
from optax_guard.__main__ import main
from optax_guard._cli import watch
from optax_guard._cli.replay import EXAMPLES, parse_rule
from optax_guard._cli.report import own_folder
from optax_guard._records.findings import Finding
from optax_guard.analysis import History, diagnose, replay

ESCAPE = "\x1b]0;evil\x07\x1b[2J"
CALM = [{"step": i, "loss": 2 - i / 50, "grad_norm": 1 + i % 3 / 10} for i in range(30)]
LOST = [{"step": 30 + i, "loss": float("nan"), "grad_norm": "Infinity"} for i in (0, 1)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"optax-guard \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--column", "train_loss=x"], "`--column` must name columns"),
        (["report", "--run", "x"], "`--run` must be left out, for "),
        (["report", "--pattern", "("], "`--pattern` must be a regular expression"),
        (["replay", "--key", "x"], "Name its column with `--key NAME`"),
        (["replay", "--rule", "patience"], "`--rule` must be a call, got 'patience': "),
        (["replay", "--rule", "-" * 100_000 + "1"], "`--rule` must have at most 1000"),
        (
            ["replay", "--rule", "any_of(lag, target(1))"],
            "must be a call: write lag(5)",
        ),
        (["replay", "--rule", "patience(5"], "a call such as patience(5), got"),
        (["replay", "--rule", "lag(x + 1)"], "'x + 1' must be a number, a text or a"),
        (
            ["replay", "--rule", "budget(seconds=3)"],
            "`--rule` 'budget(seconds=3)' needs seconds",
        ),
        (
            ["replay", "--key", "val/top1"],
            "columns that are called 'top1'",
        ),
        (["suggest", "--clip-rate", "2"], "`--clip-rate` must be"),
    ],
)
def test_errors_speak_the_language_of_the_command_line(
    tmp_path, capsys, arguments, message
):
    path = tmp_path / "run.jsonl"
    path.write_text(lines([row | {"val_loss": 1.0} for row in CALM]))
    command, option, value = arguments
    assert main([command, str(path), f"{option}={value}"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not re.search(r"`\w+=|`(columns|key|run|rules?|max_norm|clip_rate)", error)


def test_unknown_columns_are_told_in_the_words_of_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text(lines([{"step": i, "cost_loss": 1.0} for i in range(3)]))
    assert main(["report", str(path), "--json"]) == 1
    path.write_text(lines([{"step": i, "grad_norm": 1.0, "a_loss": 1} for i in (1, 2)]))
    assert main(["report", str(path), "--json"]) == 0
    error = capsys.readouterr().err
    assert "name one with `--column train_loss=NAME`" in error
    assert "Rename them, or read the file with `--column NAME=THEIRS`" in error
    assert "columns=" not in error
    path.write_text(lines([{"step": i, "norm2": 1.0} for i in range(30)]))
    assert main(["suggest", str(path)]) == 1
    assert "column with `--column grad_norm=NAME`." in capsys.readouterr().err


def test_file_in_place_of_the_folder_for_the_report_is_named(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text(lines(CALM))
    assert main(["report", str(path), "--json", "--out", str(path)]) == 1
    assert f"`--out` must be a folder, got the file {path}" in capsys.readouterr().err
    assert path.read_text() == lines(CALM)


def test_every_rule_has_an_example_that_is_one():
    rules = {x for x in og.stop.__all__ if not x.startswith("from_")}
    assert EXAMPLES.keys() <= rules
    for name, example in EXAMPLES.items():
        parse_rule(example)
        with pytest.raises(ValueError, match=re.escape(f"write {example}.")):
            parse_rule(name)


def test_escapes_in_foreign_names_are_shown_and_not_sent(tmp_path, capsys):
    path, nameless = tmp_path / "runs.csv", tmp_path / f"{ESCAPE}.csv"
    nameless.write_text("loss\n1\n2\n")
    head = f"run,step,loss,{ESCAPE}grad_norm2\n"
    path.write_text(head + f"a{ESCAPE},1,2,3\nb,1,2,3\n", newline="")
    for arguments in (
        ["report", "--json", str(path)],
        ["report", "--json", str(path), "--run", f"a{ESCAPE}"],
        ["report", "--json", str(path), "--run", "b", "--column", f"step={ESCAPE}"],
        ["replay", str(path)],
        ["report", "--json", str(nameless)],  # There is no step, which is told.
        ["report", str(tmp_path / f"{ESCAPE}.log")],
    ):
        main(arguments)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\x07" not in shown.out + shown.err
    assert r"a\x1b]0;evil" in shown.err


def test_report_goes_into_a_folder_of_its_own_and_through_no_link(tmp_path, capsys):
    path, mine = tmp_path / "runs" / "run.jsonl", tmp_path / "mine"
    path.parent.mkdir()
    mine.mkdir()
    path.write_text(lines(CALM))
    (path.parent / "report").symlink_to(mine)
    assert main(["report", str(path)]) == 1
    assert "report is a link; name a folder with `--out`" in capsys.readouterr().err
    assert list(mine.iterdir()) == []
    assert own_folder(path) == own_folder(path.parent) == path.parent / "report"
    # In the folder of MLflow's metrics every file is a metric.
    (tmp_path / "metrics").mkdir()
    assert own_folder(tmp_path / "metrics") == tmp_path / "report"


# Beside a running job ------------------------------------------------------------


class Job:
    """Writes to a log while it is watched: a part at each wait, then it interrupts."""

    def __init__(self, path: Path, *parts: str):
        self.path, self.parts, self.waits = path, list(parts), []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        if not self.parts:
            raise KeyboardInterrupt
        part = self.parts.pop(0)
        if part:
            with self.path.open("a") as file:
                file.write(part)


def watched(job: Job) -> list[tuple[str | Finding, int]]:
    """What is said, and how many parts were still to come."""
    said = []
    with contextlib.suppress(KeyboardInterrupt):
        for each in watch.follow(job.path, sleep=job):
            said.append((each, len(job.parts)))
    return said


def test_finding_is_told_once_when_it_first_holds(tmp_path):
    path = tmp_path / "run.jsonl"
    text = lines(CALM)
    # The second part ends within a line, and nothing is said of that.
    job = Job(path, text[:700], text[700:], lines(LOST[:1]), "", lines(LOST[1:]))
    [(waiting, _), *found] = watched(job)
    assert str(waiting).startswith("waiting for a log: There is no file or folder")
    wanted = {(f.code, f.step) for f in diagnose([*CALM, *LOST]) if f.step >= 30}
    assert {(f.code, f.step) for f, _ in found if isinstance(f, Finding)} >= wanted
    assert len(found) == len({str(f) for f, _ in found})
    assert all(isinstance(f, Finding) for f, _ in found)
    # At the row of step 30 two more parts were to come.
    assert all(
        left == 2 for f, left in found if isinstance(f, Finding) and f.step == 30
    )
    assert min(job.waits) >= 2.0


def test_what_cannot_be_read_is_told_when_nothing_more_comes(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("{}\n{\n{}\n")
    [(trouble, left)] = watched(Job(path, "", "", ""))
    assert "line 2: not JSON" in str(trouble)
    assert left == 2


def test_command_watches_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.jsonl"
    path.write_text(lines([*CALM, *LOST]))
    job = Job(path)
    monkeypatch.setattr(watch.time, "sleep", job)
    monkeypatch.setattr(watch.follow, "__kwdefaults__", {"sleep": job})
    assert main(["watch", str(path)]) == 130
    shown = capsys.readouterr()
    assert "(step 30)" in shown.out
    assert "interrupted" in shown.err


# Numbers beyond int32 and float32 ---------------------------------------------------


def test_steps_beyond_int32_are_played():
    rows = [{"step": i * 500_000_000, "val_loss": 3 / (1 + i)} for i in range(12)]
    rows += [{"step": 6 * 10**9 + i, "val_loss": 1.0} for i in range(1, 4)]
    [one] = replay(rows, {"3": og.stop.patience(3)})
    assert (one.reason, one.stopped_step) == (og.StopReason.PATIENCE, 6 * 10**9 + 3)
    assert one.best_step == 5_500_000_000
    assert one.steps_saved == 0
    with pytest.raises(ValueError, match=r"counts steps, which must be below 2\*\*31"):
        replay(rows, {"budget": og.stop.budget(steps=3)})
    [one] = replay(rows[:4], {"budget": og.stop.budget(steps=10**9)})
    assert one.stopped_step == 10**9


def test_column_is_also_known_by_its_name_in_the_file(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(lines([{"step": i, "eval_loss": 1.0} for i in range(5)]))
    rules = {"2": og.stop.patience(2)}
    [one] = replay(History.read(path), rules, key="eval_loss")
    assert one.stopped_step == 2


@pytest.mark.parametrize("size", [1e150, 1e307])
def test_losses_beyond_float32_are_a_finding_and_a_figure(size):
    pytest.importorskip("matplotlib")
    from optax_guard import plotting

    losses = [1.0] * 10 + [size * (1 + i) for i in range(10)]
    rows = [
        {"step": i, "loss": x, "val_loss": x, "grad_norm": 1.0}
        for i, x in enumerate(losses)
    ]
    assert {f.step for f in diagnose(rows)} == {10}
    plotting.plot_history(rows).canvas.draw()
    plotting.plot_early_stopping(rows).canvas.draw()
