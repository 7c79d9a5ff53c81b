"""The pages of docs/: their blocks run and print their text, and no name is missing."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from optax_guard.analysis import FindingCode
from tests import pages
from tests.public import public_names

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = {"api", "notebooks", "_static"}
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.relative_to(DOCS).parts[0] not in GENERATED
)
needs_docs = pytest.mark.skipif(not PAGES, reason="docs/ is not beside the tests")


def blocks_of(path: Path) -> list[pages.Block]:
    return pages.runnable_blocks(path.read_text(encoding="utf-8"))


def api_pages():
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if blocks_of(path)],
    ids=lambda path: path.relative_to(DOCS).with_suffix("").as_posix(),
)
def test_blocks_run_and_print_their_text(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pages.run(path.read_text(encoding="utf-8"), str(path)) > 0


@needs_docs
def test_every_public_name_has_a_page_of_its_own():
    written = api_pages().pages()
    for name, value in public_names().items():
        text = written[name]
        kind = "class" if inspect.isclass(value) else "function"
        kind = kind if inspect.isroutine(value) or inspect.isclass(value) else "data"
        home = f"optax_guard.{name}"
        assert re.search(rf"^\.\. auto{kind}:: {re.escape(home)}$", text, re.MULTILINE)


@needs_docs
def test_docstrings_link_names_but_not_arguments_or_other_text():
    module = api_pages()
    found = {"GuardState": "optax_guard.GuardState", "skip.spike": "optax_guard.x"}
    line = "A ``GuardState`` of `skip.spike`, ``patience``, `Text <https://a.b>`_."
    assert module.linked(line, found) == (
        "A :py:obj:`GuardState <optax_guard.GuardState>` of "
        ":py:obj:`skip.spike <optax_guard.x>`, ``patience``, `Text <https://a.b>`_."
    )
    assert {"GuardState", "stop.patience"} <= set(module.targets())
    assert "patience" not in module.targets()


def test_failing_block_is_seen_with_its_line():
    markdown = "# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as error:
        pages.run(markdown, "page.md")
    assert error.traceback[-1].lineno + 1 == 8


def test_marks_are_honoured():
    markdown = (
        "<!-- setup\nx = 1\n-->\n"
        "```bash\nexit 1\n```\n"
        "<!-- not run: needs a TPU -->\n```python\nraise SystemExit\n```\n"
        "```python\nassert x == 1\n```\n"
    )
    assert [block.line for block in pages.runnable_blocks(markdown)] == [2, 12]
    assert pages.run(markdown, "page.md") == 2


def test_text_after_a_block_must_be_what_it_prints():
    markdown = "```python\nprint(1 + 1)\n```\n\n```text\n{}\n```\n\n```text\n?\n```\n"
    assert pages.run(markdown.format(2), "page.md") == 1
    with pytest.raises(AssertionError, match=r"page\.md, line 2"):
        pages.run(markdown.format(3), "page.md")


@needs_docs
def test_every_finding_and_no_other_is_explained():
    text = (DOCS / "guides" / "reading.md").read_text(encoding="utf-8")
    table = text.partition("## What the findings mean")[2].partition("\n## ")[0]
    found = set(re.findall(r"^\| `([A-Z_]+)` \| (\w+)", table, re.MULTILINE))
    assert found == {(str(code), str(code.severity)) for code in FindingCode}
