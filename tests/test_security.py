"""Files of others run no code, and what is written stays where it was asked for."""

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from optax_guard.__main__ import main
from optax_guard._cli import report_html as _report_html
from optax_guard._cli.report_figures import Drawn
from optax_guard._records import findings as _findings
from optax_guard.analysis import History, diagnose, table
from tests.public import PACKAGE

# No code in data ---------------------------------------------------------------

# What unpickles, or runs a text or a program.
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
MODULES |= {"_pickle", "code", "ctypes", "os.system", "runpy", "subprocess"}
CALLS = {"eval", "exec", "compile", "__import__", "load", "loadtxt", "system", "popen"}


def dangerous(source: str) -> Iterator[str]:
    """Imports and calls by which data could become code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            yield from names & MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {str(node.module).partition(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", None) or getattr(function, "id", "")
            # A pattern is no program.
            is_pattern = ast.unparse(function) == "re.compile"
            yield from set() if is_pattern else {name} & CALLS
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def test_no_source_unpickles_or_runs_a_text():
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = {p.name: list(dangerous(p.read_text(encoding="utf-8"))) for p in files}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "np.load(f)", "f(allow_pickle=True)"],
)
def test_what_unpickles_is_found(source):
    assert list(dangerous(source))


UNPICKLED: list[Any] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    # The event of every unpickler that is about to fetch what it will call.
    if event == "pickle.find_class":
        UNPICKLED.append(arguments)


@pytest.fixture
def nothing_unpickled() -> Iterator[None]:
    if not UNPICKLED:
        sys.addaudithook(_watch)
    UNPICKLED.clear()
    yield
    assert UNPICKLED == []


def tried(call: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, Any]:
    """The result and no error, or no result and an error of these."""
    try:
        return call(), None
    except errors as error:
        return None, error


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_the_payload_works(tmp_path):
    sys.addaudithook(_watch)
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").exists()
    assert UNPICKLED


def as_npy(payload: Any, path: Path) -> bytes:
    with path.open("wb") as file:
        np.save(file, np.array([payload], object), allow_pickle=True)
    return path.read_bytes()


DEEP = b"[" * 100_000
HISTORIES: dict[str, bytes | None] = {
    "a pickle": None,
    "an array of objects": None,
    "an object that names a class": b'{"py/reduce": ["os.system", "touch made"]}\n',
    "a text of code": b"{\"step\": \"__import__('os').system('touch made')\"}\n",
    "a list": b"[1, 2]\n",
    "too deep": b'{"loss": ' + DEEP + b"\n",
    "too deep a dict": b'{"a":' * 100_000 + b"\n",
    "a number too long": b'{"loss": 1' + 5000 * b"0" + b"}\n",
    "a number too large": b'{"loss": 1' + 400 * b"0" + b"}\n",
    "no text": b"\xff\xfe\x00\x01\n",
    "zeros": bytes(100) + b"\n",
    "a name too long": b'{"' + 10**6 * b"a" + b'": 1}\n',
    "a cell too long": b"loss\n" + 10**6 * b"1" + b"\n",
    "an open quote": b'loss,b\n1,"' + 10**6 * b"1\n",
}


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".npy", ".pkl"])
@pytest.mark.parametrize("kind", HISTORIES)
def test_hostile_histories_are_read_or_refused_with_their_name(
    tmp_path, kind, suffix, recwarn
):
    path = tmp_path / f"history{suffix}"
    payload = Payload(tmp_path / "made")
    content = HISTORIES[kind]
    if content is None:
        is_array = kind == "an array of objects"
        content = as_npy(payload, path) if is_array else pickle.dumps(payload)
    path.write_bytes(content)
    history, error = tried(lambda: History.read(path), ValueError)
    if error is not None:
        assert str(path) in str(error)
        assert len(str(error)) < 10_000
    else:
        assert all(isinstance(x, int | float) for row in history for x in row.values())
        table(history)
        tried(lambda: diagnose(history), ValueError)
    assert not (tmp_path / "made").exists()
    recwarn.clear()  # Of a line without an end, which is left out.


def hostile_rules() -> list[str]:
    return [
        "__import__('os').system('touch made')",
        "patience(__import__('os'))",
        "patience.__globals__",
        "patience(n=(lambda: 3)())",
        "patience(*[3])",
        "patience(**{'n': 3})",
        "stop.patience(3)",
        "inspect(3)",
        "patience(" * 200 + "3" + ")" * 200,
        "patience(10**10**10)",
        "patience(3) if 1 else 2",
        "",
        "\0",
    ]


@pytest.mark.parametrize("rule", hostile_rules())
def test_hostile_rules_are_refused(tmp_path, monkeypatch, capsys, rule):
    monkeypatch.chdir(tmp_path)
    Path("history.jsonl").write_text('{"val_loss": 1}\n' * 3)
    assert main(["replay", ".", "--rule", rule]) == 1
    assert "optax-guard replay: " in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What `fit` saves, of the smallest state."""
    pytest.importorskip("orbax.checkpoint")
    from optax_guard.loops import _orbax

    args = _orbax.import_orbax("").args
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    with _orbax.open_manager(str(path), create=True) as manager:
        items = {
            _orbax.VARIABLES: args.PyTreeSave({"params": {"w": jnp.ones(2)}}),
            _orbax.TRAINING: args.PyTreeSave({"step": jnp.zeros(())}),
            _orbax.METADATA: args.JsonSave({"best_step": 1}),
        }
        manager.save(1, args=args.Composite(**items))
    return path


@pytest.mark.usefixtures("nothing_unpickled")
def test_a_checkpoint_with_pickles_in_place_of_its_files_runs_nothing(
    checkpoint, tmp_path
):
    from optax_guard.flax import load_best

    np.testing.assert_array_equal(load_best(checkpoint)["params"]["w"], np.ones(2))
    made = tmp_path / "made"
    files = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*"))
    files = [p for p in files if (checkpoint / p).is_file()]
    assert len(files) > 5
    payload = pickle.dumps(Payload(made))
    for i, name in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(checkpoint, copy)
        (copy / name).write_bytes(payload)
        (copy / name.parent / "more.pkl").write_bytes(payload)
        errors = RuntimeError, FileNotFoundError
        found, error = tried(lambda copy=copy: load_best(copy), *errors)
        if error is not None:
            assert str(copy) in str(error)
        else:
            assert found["params"]["w"].dtype == np.float32
        assert not made.exists(), name


# What is shown -----------------------------------------------------------------

EVIL = '<script>alert("1")</script>\'><img src=x onerror=alert(1)>&amp;'


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def is_harmless(page: Page) -> bool:
    names = {name for name, _ in page.attributes}
    # Links go to the runs of the page itself.
    links = {value for name, value in page.attributes if name == "href"}
    sources = {value for name, value in page.attributes if name == "src"}
    return (
        not page.tags & {"script", "iframe", "object", "form", "svg", "base"}
        and not any(name.startswith("on") for name in names)
        and links <= {"#run0", "#run1"}
        and all(str(source).startswith("data:image/png;base64,") for source in sources)
    )


def test_page_escapes_title_note_finding_and_alternative_text():
    finding = _findings.Finding(
        _findings.FindingCode.EXPLODING,
        _findings.Severity.ERROR,
        {f"phase {EVIL}": EVIL, "norm": 1.0},
        EVIL,
        3,
    )
    drawn = [Drawn(EVIL, b"png")]
    part = _report_html.Part(
        EVIL, EVIL, {"steps": EVIL}, [finding], [{"step": 1}], drawn
    )
    page = Page(_report_html.page(EVIL, [part], []))
    assert is_harmless(page)
    # Title, heading, note, summary, caption; of the finding name, value, advice.
    assert page.text.count(EVIL) == 8
    assert ("alt", EVIL) in page.attributes
    html = _report_html.page(EVIL, [part, part._replace(name=f"{EVIL} 2")], drawn)
    page = Page(html)
    assert is_harmless(page)
    # Title, heading, caption; of each run two in the comparison, its name, those above.
    assert page.text.count(EVIL) == 3 + 2 * (2 + 1 + 6)
    assert not is_harmless(Page(html.replace("&lt;", "<").replace("&gt;", ">")))


# Where it is written -----------------------------------------------------------


def snapshot(folder: Path, without: Path) -> dict[Path, Any]:
    """Everything below a folder, except what is in another one."""
    return {
        p: (p.readlink() if p.is_symlink() else p.is_file() and p.read_bytes())
        for p in folder.rglob("*")
        if without != p and without not in p.parents
    }


# For each command its options, and what it writes.
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "report": (
        ["--html", "--max-norm", "1.5"],
        {"report.md", "report.html", "history.png", "leaves.png"},
    ),
    "replay": (["--rule", "target(1.0)"], {"replay.txt", "replay.png"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_write_into_their_folder_only(tmp_path, monkeypatch, capsys, command):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    name = f"..{EVIL}".replace("/", "\u2215")
    source = tmp_path / "runs" / f"{name}.jsonl"
    source.parent.mkdir()
    rows = [
        {"run": run, "step": i, "grad_norm": 1.0 + i, "val_loss": 2.0 - i, EVIL: 1.0}
        | {f"leaf_norm/../../{EVIL}": 1.0}
        for run in ("../../evil", "other")
        for i in range(3)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Links at all places where something is written, to a file and to none.
    options, names = COMMANDS[command]
    (tmp_path / "mine").write_text("mine")
    out.mkdir()
    for i, each in enumerate(sorted(names)):
        (out / each).symlink_to(tmp_path / ("mine", "nowhere")[i % 2])
    before = snapshot(tmp_path, out)
    arguments = [str(source), "--run", "../../evil", "--out", str(out), *options]
    assert main([command, *arguments]) in (0, 3, 4)
    assert snapshot(tmp_path, out) == before
    assert {p.name for p in out.iterdir() if not p.is_symlink()} == names
    if command == "report":
        page = Page((out / "report.html").read_text(encoding="utf-8"))
        assert is_harmless(page)
        assert name in page.text
        assert "<script" not in (out / "report.md").read_text(encoding="utf-8")
