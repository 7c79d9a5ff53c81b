"""`optax-guard report`: what it prints, what it writes and where, and its codes."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from optax_guard.__main__ import main
from optax_guard._cli.report import as_text, make_reports
from optax_guard._records.table import thinned
from optax_guard.analysis import History

EVIL = "<img src=x onerror=alert(1)>$&"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def record(path, norms, losses, threshold=5.0):
    history = History(path)
    for i, (norm, loss) in enumerate(zip(norms, losses, strict=True), start=1):
        history.append(i, grad_norm=norm, clip_threshold=threshold, loss=loss)


@pytest.fixture
def works(tmp_path):
    folder = tmp_path / EVIL
    record(
        folder / "history.jsonl",
        [15.2, 12.7, 20.5, 4.8, 3.2],
        [2.3, 1.8, 1.2, 0.9, 0.7],
    )
    return folder


@pytest.fixture
def fails(tmp_path):
    folder = tmp_path / "fails"
    record(folder / "history.jsonl", [100.0] * 3, [2.3, 2.4, math.nan])
    return folder


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_table_and_findings_are_printed_and_files_written(works, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(works)]) == 0
    printed = capsys.readouterr().out
    assert "20.5           5     100.0%         1.2" in printed
    assert "INFO CLIPPING_WORKS (step 5)" in printed
    out = works / "report"
    assert {p.name for p in works.iterdir()} == {"history.jsonl", "report"}
    assert {p.name for p in out.iterdir()} == {"report.md", "history.png"}
    assert (out / "history.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "report.md").read_text()
    assert "| 3 | 20.5 | 5 | 100.0% | 1.2 |" in markdown
    assert "* INFO CLIPPING_WORKS" in markdown


def test_json_is_one_strict_object_and_writes_nothing(fails, capsys):
    assert main(["report", str(fails), "--json"]) == 4
    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    finding = printed["findings"][0]
    assert finding["code"] == "NONFINITE_LOSS_DESPITE_CLIPPING"
    assert finding["severity"] == "error"
    assert finding["evidence"]["loss"] == "NaN"
    assert finding["evidence"]["clipped_norm"] == 5.0
    assert "Lower the threshold" in finding["advice"]
    assert {p.name for p in fails.iterdir()} == {"history.jsonl"}


def test_exit_code_tells_a_warning_from_an_error(tmp_path, capsys):
    record(tmp_path / "run.jsonl", [1.0] * 6, [2.3, 2.1, 1.9, 1.8, 9.0, 1.7], math.inf)
    assert main(["report", str(tmp_path / "run.jsonl"), "--json"]) == 3
    assert "LOSS_SPIKE_WITHOUT_NORM_SPIKE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "code", "message"),
    [
        (None, [], 1, "There is no file or folder"),
        ('{"loss": 1}\n{\n', [], 1, "line 2: not JSON"),
        ("", [], 1, "holds no rows"),
        ('{"cost": 1}\n', [], 1, "must have a loss or a gradient norm"),
        ('{"cost": 1}\n', ["--column", "train_loss=cost"], 0, ""),
        ('{"cost": 1}\n', ["--column", "cost"], 2, "must be NAME=THEIRS"),
        ('{"loss": 1}\n', ["--max-norm", "-1"], 1, "`--max-norm` must be positive"),
        ('{"run": "a", "loss": 1}\n{"run": "b", "loss": 1}', ["--run", "c"], 1, "'c'"),
        ('{"run": "a", "loss": 1}\n{"run": "b", "loss": 1}', ["--run", "b"], 0, ""),
        ('{"loss": 1}\n{"lo', [], 0, "line 2: the last line is unfinished"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(
    tmp_path, capsys, text, arguments, code, message
):
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["report", str(path), "--json", *arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert (shown.out == "") == (code in (1, 2))


class Page(HTMLParser):
    """The elements of a page, those without an end apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.pieces = []  # An innermost element, and its text.
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.pieces.append((self.open[-1] if self.open else "", data))


def test_page_is_one_file_and_what_comes_from_outside_is_escaped(works, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(works), "--html"]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (works / "report" / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert EVIL in page.text
    assert ("h1", EVIL) in page.pieces
    assert ("title", EVIL) in page.pieces
    assert "`" not in page.text
    assert page.tags.count("img") == 1
    assert page.tags.count("tr") == 6
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    (source,) = [value for name, value in page.attributes if name == "src"]
    image = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert image == (works / "report" / "history.png").read_bytes()
    assert not re.search(r"https?://", html)


@pytest.mark.skipif(CHROMIUM is None, reason=f"none of {BROWSERS} is in the PATH")
def test_page_is_shown_by_a_browser(works, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    main(["report", str(works), "--html", "--out", str(tmp_path / "out")])
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--user-data-dir={tmp_path / 'profile'} --timeout=20000 --dump-dom"
    ).split()
    page = (tmp_path / "out" / "report.html").as_uri()
    shown = subprocess.run(
        [str(CHROMIUM), *flags, page],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "CLIPPING_WORKS, step 5" in shown
    assert shown.count("<tr>") == 6
    image = tmp_path / "page.png"
    flags[-1] = f"--screenshot={image}"
    # 0 is dark.
    dark = ["--window-size=1000,2000", "--blink-settings=preferredColorScheme=0"]
    command = [str(CHROMIUM), *flags, *dark, page]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = matplotlib_image.imread(image)[..., :3]
    assert 255 * pixels[0, 0] == pytest.approx([0x16, 0x18, 0x1D], abs=1)
    # The figure, which the page's policy must let through, is dark, too.
    assert (pixels.min(-1) > 0.9).mean() < 0.05
    red, green, blue = (pixels[..., i] for i in range(3))
    assert ((blue > 0.9) & (red < 0.5)).sum() > 500  # The blue curve, and the orange.
    assert ((red > 0.6) & (green > 0.3) & (blue < 0.3)).sum() > 500


def test_every_figure_for_which_there_is_something_is_in_the_report_once(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures = []

    def save(figure, *arguments, of=Figure.savefig, **how):
        figures.append(figure)
        return of(figure, *arguments, **how)

    monkeypatch.setattr(Figure, "savefig", save)
    history = History(tmp_path / "history.jsonl")
    for i in range(20):
        row = {"grad_norm": 1 + i / 10, "loss": 1 / (1 + i), "leaf_norm/a": 1.0}
        history.append(i, row | ({"val_loss": 2.0 + i} if i % 3 == 0 else {}))
    history.append(19, val_loss=9.0)  # The eighth.
    main(["report", str(tmp_path), "--html"])
    names = {"history.png", "norms.png", "stopping.png", "leaves.png"}
    out = tmp_path / "report"
    assert {p.name for p in out.iterdir()} == names | {"report.md", "report.html"}
    assert all((out / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert set(re.findall(r"]\((.*)\)", (out / "report.md").read_text())) == names
    html = (out / "report.html").read_text()
    assert Page(html).tags.count("img") == 4
    assert "validation and training loss, and where other rules would have" in html
    panels = [panel for figure in figures for panel in figure.axes]
    drawn = [line.get_ydata() for panel in panels for line in panel.lines]
    for losses in (history.column("train_loss"), history.column("val_loss")):
        wanted = losses[losses == losses].tolist()
        assert [list(line) for line in drawn].count(wanted) == 1
    # Patience ends a run in which every evaluation after the first is worse.
    bars = [panel for panel in panels if panel.patches and panel.yaxis_inverted()]
    (names,) = [[tick.get_text() for tick in x.get_yticklabels()] for x in bars]
    assert names == ["patience(3)", "patience(5)"]
    assert [bar.get_width() for bar in bars[0].patches] == [9, 15]


# Several runs ---------------------------------------------------------------------


@pytest.fixture
def several(tmp_path):
    """A file with two runs, one of which ends in a NaN."""
    path = tmp_path / "demo" / "history.jsonl"
    path.parent.mkdir()
    rows = [
        {
            "run": run,
            "step": 10 * i,
            "loss": loss,
            "val_loss": loss + 1,
            "num_skipped": i,
        }
        for run, losses in {EVIL: [3.0, 1.0, 2.0], "b": [3.0, math.nan]}.items()
        for i, loss in enumerate(losses, start=1)
    ]
    rows[-1] |= {"stop_reason": 4}
    rows[-1].pop("num_skipped")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def test_runs_are_side_by_side(several, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(several), "--html"]) == 3
    printed = capsys.readouterr().out
    heading, first, second = printed.partition("\n\n")[0].splitlines()
    assert re.split(r"\s{2,}", heading)[:5] == [
        *("run", "steps", "rows", "best val loss", "stopped by"),
    ]
    assert re.split(r"\s{2,}", first)[:4] == [EVIL, "30", "3", "2 at step 20"]
    assert re.split(r"\s{2,}", second)[:5] == [
        *("b", "20", "2", "4 at step 10", "NONFINITE at step 20"),
    ]
    assert f"\n\n{EVIL}\n----" in printed
    out = several / "report"
    figures = {"runs.png", "1-history.png", "1-stopping.png"}
    figures |= {"2-history.png", "2-stopping.png"}
    assert {p.name for p in out.iterdir()} == figures | {"report.md", "report.html"}
    html = (out / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert ("title", "demo") in page.pieces
    assert page.tags.count("img") == len(figures)
    names = [text for tag, text in page.pieces if tag in ("a", "h2")]
    assert names == [EVIL, "b", EVIL, "b"]
    links = [value for name, value in page.attributes if name == "href"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert links == [f"#{x}" for x in ids]
    markdown = (out / "report.md").read_text()
    assert "| b | 20 | 2 | 4 at step 10 | NONFINITE at step 20 |" in markdown
    assert "<img" not in markdown


def test_json_of_several_runs_has_an_object_for_each(several, capsys):
    assert main(["report", str(several), "--json"]) == 3
    runs = json.loads(capsys.readouterr().out, parse_constant=refuse)["runs"]
    assert [(run["run"], run["num_rows"]) for run in runs] == [(EVIL, 3), ("b", 2)]
    assert main(["report", str(several), "--json", "--run", EVIL]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == EVIL


def test_folders_and_files_of_a_folder_are_runs(several, tmp_path, capsys):
    record(tmp_path / "other" / "history.jsonl", [1.0] * 3, [3.0, 2.0, 1.0])
    (tmp_path / "empty").mkdir()
    names = [f"demo/{EVIL}", "demo/b", "other"]
    assert [one.name for one in make_reports(tmp_path)] == names
    assert [one.name for one in make_reports(tmp_path, run="other")] == ["other"]
    with pytest.raises(ValueError, match=r"`run` must be one of .*'demo/b', 'other'\]"):
        make_reports(tmp_path, run="b")
    for name in ("x.jsonl", "y.jsonl"):
        record(tmp_path / name, [1.0] * 3, [3.0, 2.0, 1.0])
    (tmp_path / "z.csv").write_text("no\n")
    with pytest.warns(UserWarning, match=r"left out: .*z\.csv: no log was recognised"):
        assert [one.name for one in make_reports(tmp_path)] == ["x.jsonl", "y.jsonl"]


def test_runs_of_one_row_have_a_line_and_no_figure(tmp_path, capsys):
    rows = "".join(f"run_{i},finished,5000,{2 - i / 64}\n" for i in range(64))
    (tmp_path / "runs.csv").write_text(f"Name,State,iter,val/loss\n{rows}")
    main(["report", str(tmp_path)])
    _, *lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == [f"run_{i}" for i in range(64)]
    assert "1.5 at step 5000" in lines[32]
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["report.md"]


def test_run_that_cannot_be_judged_is_left_out_with_a_word(several, capsys):
    with (several / "history.jsonl").open("a") as file:
        file.write('{"run": "memory", "step": 1, "bytes": 5}\n')
    with pytest.warns(UserWarning, match="the run memory is left out: `history` must"):
        assert [one.name for one in make_reports(several)] == [EVIL, "b"]


def test_table_hides_no_evaluation_and_no_skipped_step():
    rows = [{"step": i, "train_loss": 1.0, "num_skipped": 0} for i in range(1000)]
    skipped = [5, 6, 123, 777]
    for row in rows:
        row["num_skipped"] = sum(step <= row["step"] for step in skipped)
    evaluated = list(range(7, 1000, 11))
    for step in evaluated:
        rows[step]["eval/accuracy"] = 0.5
    shown = [row["step"] for row in thinned(rows, {501}, 40)]
    assert {*skipped, *evaluated, 501, 999} <= set(shown)
    assert shown == sorted(set(shown))
    assert len(shown) <= len(skipped) + len(evaluated) + 1 + 40


def test_nothing_is_written_outside_of_the_folder(works, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "mine.md"
    outside.write_text("mine")
    out.mkdir()
    (out / "report.md").symlink_to(outside)
    before = {p for p in tmp_path.rglob("*") if out not in p.parents}
    main(["report", str(works), "--out", str(out)])
    assert outside.read_text() == "mine"
    assert (out / "report.md").read_text().startswith("# Report on")
    assert {p for p in tmp_path.rglob("*") if out not in p.parents} == before


def test_long_table_keeps_the_last_row_and_those_with_findings(tmp_path):
    losses = [1.0] * 100
    losses[58] = 9.0
    record(tmp_path / "run.jsonl", [1.0] * 100, losses, math.inf)
    printed = as_text(make_reports(tmp_path / "run.jsonl"))
    lines = printed.partition("\n\n")[0].splitlines()[2:]
    steps = [int(line.split()[0]) for line in lines]
    assert len(steps) <= 41
    assert {59, 100} <= set(steps)
    assert f"100 rows, {len(steps)} of them in the table" in printed


def test_one_skip_is_one_row_of_a_long_table():
    # As `metrics` gives them: both count all steps so far.
    rows = [
        {"step": i, "num_skipped": int(i >= 9), "skip_rate": int(i >= 9) / i}
        for i in range(1, 101)
    ]
    assert {row["step"] for row in thinned(rows, (), 10)} == {9, *range(10, 101, 10)}


def test_without_matplotlib_there_is_no_plot_and_a_word_about_it(fails):
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from optax_guard.__main__ import main\n"
        f"sys.exit(main(['report', {str(fails)!r}, '--html']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 4
    assert "pip install 'optax-guard[plot]'" in result.stderr
    names = {p.name for p in (fails / "report").iterdir()}
    assert names == {"report.md", "report.html"}
