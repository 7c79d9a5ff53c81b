import contextlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import optax_guard as og
from optax_guard.__main__ import main
from optax_guard._cli import demo as _demo
from optax_guard._cli import demo_report as _demo_report
from optax_guard._cli.words import own_command
from optax_guard._rows import replace_entries

TINY = _demo.Recipe(
    num_steps=30,
    eval_every=5,
    patience=2,
    min_delta=100.0,  # Nothing counts but the first evaluation, so the third stops.
    corrupt={7: 1e6, **dict.fromkeys((9, 11, 12, 13), math.nan)},
    max_errors=2,
    width=16,
    batch_size=4,
    window=8,
    sample_length=40,
)


class Ran(NamedTuple):
    code: int
    results: dict[str, Any]
    out: Path
    printed: str
    rows: dict[str, list[dict[str, Any]]]


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """A tiny demo, run by the command."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    results = {}

    def run(recipe, seed, out, run=_demo.run):
        assert recipe is TINY
        results.update(run(recipe, seed, out))
        return results

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(_demo, "QUICK", TINY)
        patch.setattr(_demo, "run", run)
        code = main(["demo", "--quick", "--seed", "3", "--out", str(out)])
    rows = {}
    for line in (out / "history.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=refuse)
        rows.setdefault(row.pop("run"), []).append(row)
    return Ran(code, results, out, printed.getvalue(), rows)


def test_demo_succeeds_and_writes_its_files(ran):
    assert ran.code == 0
    assert {p.name for p in ran.out.iterdir()} == {
        "history.jsonl",
        "norms.png",
        "runs.png",
    }
    for plot in ran.out.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_history_is_strict_json_of_all_rows(ran):
    assert list(ran.rows) == list(ran.results)
    for name, result in ran.results.items():
        for read, row in zip(ran.rows[name], result.history, strict=True):
            if name != "guarded":
                # Optax's clip keeps no record.
                row = {k: v for k, v in row.items() if not k.startswith("clip")}
            assert {k: float(v) for k, v in read.items()} == pytest.approx(
                row, nan_ok=True
            )
    assert ran.rows["Optax's clip"][-1]["val_loss"] == "NaN"


def test_runs_share_model_and_data_until_a_batch_is_corrupt(ran):
    clipped, guarded = ran.rows["Optax's clip"][0], ran.rows["guarded"][0]
    assert clipped["val_loss"] == pytest.approx(guarded["val_loss"], rel=1e-4)
    assert clipped["grad_norm"] == pytest.approx(guarded["grad_norm"], rel=1e-4)


def test_guard_skips_the_corrupt_batches_and_no_others(ran):
    state = ran.results["guarded"].state
    assert int(og.find_state(state, og.GuardState).num_skipped) == 5
    skipped = {r.update: r.reason for r in og.skipped_steps(state)}
    assert skipped.pop(7) == og.SkipReason.NORM_ABOVE
    assert skipped == dict.fromkeys((9, 11, 12, 13), og.SkipReason.NONFINITE)
    assert [row["num_skipped"] for row in ran.rows["guarded"]] == [0, 2, 5]


def test_only_the_guarded_run_stays_finite(ran):
    last = {name: float(rows[-1]["val_loss"]) for name, rows in ran.rows.items()}
    assert {name: math.isfinite(value) for name, value in last.items()} == {
        "unguarded": False,
        "Optax's clip": False,
        "apply_if_finite": False,
        "guarded": True,
    }


def test_apply_if_finite_survives_one_bad_batch_and_dies_of_a_row_of_them(ran):
    steps = {name: [row["step"] for row in rows] for name, rows in ran.rows.items()}
    assert steps["Optax's clip"] == [5, 10]
    assert steps["apply_if_finite"] == [5, 10, 15]
    # It refuses steps 9, 11 and 12, and applies step 13, which is one too many.
    params = ran.results["apply_if_finite"].state.params
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(params))


def test_run_that_died_says_so(ran):
    words = "died: at step {} the validation loss is nan"
    for name, end in [
        ("unguarded", words.format(10)),
        ("apply_if_finite", words.format(15)),
        ("guarded", "stopped at step 15: PATIENCE"),
    ]:
        table = ran.printed.partition(f"\n{name}\n")[2].partition("\n\n")[0]
        assert table.splitlines()[-1] == end


def test_skipped_batches_do_not_count_as_training_loss(ran):
    assert all(row["train_loss"] < 10 for row in ran.rows["guarded"])


def test_table_has_a_row_an_evaluation_under_the_headings(ran):
    table = ran.printed.partition("\nguarded\n")[2].splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == [
        "step",
        "grad norm",
        "after clip",
        "clipped",
        "skipped",
        "train loss",
        "val loss",
    ]
    rows = ran.rows["guarded"]
    for line, row in zip(table[1 : len(rows) + 1], rows, strict=True):
        cells = line.split()
        assert float(cells[1]) == pytest.approx(row["grad_norm"], rel=1e-3)
        assert float(cells[-1]) == pytest.approx(row["val_loss"], rel=1e-3)
    before_files = ran.printed.partition("Files in")[0]
    assert max(map(len, before_files.splitlines())) <= 80


def test_end_tells_why_it_stopped_and_what_was_restored(ran):
    printed = " ".join(ran.printed.split())
    stop = ran.results["guarded"].stop
    assert "The guarded run: stopped at evaluation 3 (PATIENCE), best" in printed
    again = re.search(r"computed again, is ([\d.]+)\.", printed)
    assert again is not None
    assert float(again[1]) == pytest.approx(float(stop.best_value), abs=1e-4)
    assert "skipped 5 steps; corrupt batches came at steps 7, 9, 11 to 13." in printed
    assert ", NORM_ABOVE steps 9, 11 to 13: norm nan, NONFINITE: NaN in " in printed


def test_end_compares_the_runs(ran):
    table = re.search(r"\nrun  .*\n((?:.+\n)+)\n", ran.printed)
    assert table is not None
    cells = [re.split(r"\s{2,}", line) for line in table[1].splitlines()]
    assert [row[0] for row in cells] == list(ran.results)
    assert [row[2] for row in cells] == 3 * ["NONFINITE"] + ["PATIENCE"]
    assert [row[5] for row in cells] == ["0", "0", "3", "5"]
    assert [row[-1] for row in cells[:3]] == 3 * ["nan"]
    assert cells[3][-1] == cells[3][-2]


def test_last_line_is_a_command_that_is_there(ran, monkeypatch):
    program, *arguments = shlex.split(ran.printed.splitlines()[-1])
    assert arguments[-2:] == ["report", str(ran.out)]
    assert shutil.which(program)
    # As in an environment that is not activated, and in one that is.
    monkeypatch.setenv("PATH", "")
    assert shutil.which(shlex.split(own_command("report", "runs/demo"))[0])
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    if shutil.which("optax-guard"):
        assert own_command("report", "my runs") == "optax-guard report 'my runs'"


def test_short_version_has_a_folder_of_its_own(monkeypatch):
    folders = []
    monkeypatch.setattr(_demo, "run", lambda recipe, seed, out: folders.append(out))
    main(["demo"])
    main(["demo", "--quick"])
    assert folders == [Path("runs/demo"), Path("runs/demo-quick")]


def test_words_stay_true_if_nothing_stops_the_guarded_run(ran, capsys):
    guarded = ran.results["guarded"]
    running = replace_entries(guarded.stop, stop_reason=0, stopped_at=-1)
    running = running._replace(should_stop=False)
    results = {**ran.results, "guarded": guarded._replace(stop=running)}
    _demo_report.conclude(TINY, results, 1.0, "Text.")
    printed = " ".join(capsys.readouterr().out.split())
    assert "The guarded run: took all of its 15 steps, best" in printed
    assert "last step" in printed
    assert "PATIENCE" not in printed


def test_interrupted_demo_exits_with_130(monkeypatch, tmp_path):
    monkeypatch.setattr(_demo, "run", lambda *arguments: None)
    assert main(["demo", "--out", str(tmp_path)]) == 130


@pytest.mark.parametrize("seed", ["-1", "1.5", str(2**32)])
def test_bad_seed_is_an_error_of_usage(seed, capsys):
    assert main(["demo", f"--seed={seed}"]) == 2
    assert "whole number of at least 0" in capsys.readouterr().err


def test_missing_command_is_an_error_of_usage(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_file_in_place_of_the_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert "taken" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flax", "matplotlib", "rich"])
def test_missing_extra_is_named(name):
    program = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from optax_guard.__main__ import main\n"
        "sys.exit(main(['demo']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"{name} is missing: pip install 'optax-guard[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_module_and_command_are_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "optax_guard", "demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: optax-guard demo" in result.stdout
