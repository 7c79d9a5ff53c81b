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
        ('{"run": "a", "loss": 1}\n{"run": "b", "loss": 1}', [], 1, "runs: a, b"),
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


def test_page_is_one_file_and_what_comes_from_outside_is_escaped(works, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(works), "--html"]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (works / "report" / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert EVIL in page.text
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
    command = [str(CHROMIUM), *flags, "--window-size=1000,2000", page]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = matplotlib_image.imread(image)[..., :3]
    # The curves of the figure, which the page's policy must let through.
    for color in ("#0072B2", "#E69F00"):
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 0.01).sum() > 500, color


def test_every_figure_for_which_there_is_something_is_in_the_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    history = History(tmp_path / "history.jsonl")
    for i in range(20):
        row = {"grad_norm": 1 + i / 10, "loss": 1.0, "val_loss": 2.0}
        history.append(i, row | {"leaf_norm/a": 1.0})
    main(["report", str(tmp_path), "--html"])
    names = {"history.png", "norms.png", "stopping.png", "leaves.png"}
    out = tmp_path / "report"
    assert {p.name for p in out.iterdir()} == names | {"report.md", "report.html"}
    assert all((out / n).read_bytes().startswith(b"\x89PNG") for n in names)
    assert set(re.findall(r"]\((.*)\)", (out / "report.md").read_text())) == names
    assert Page((out / "report.html").read_text()).tags.count("img") == 4


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


def test_long_table_keeps_the_last_row_and_those_with_findings(tmp_path, capsys):
    losses = [1.0] * 100
    losses[58] = 9.0
    record(tmp_path / "run.jsonl", [1.0] * 100, losses, math.inf)
    main(["report", str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
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
