"""Runs the Python blocks of README.md, in order, in one namespace.

Every ```python block runs. Two comments, invisible to readers, change that::

    <!-- not run: the reason -->     before a block that is only to be read

    <!-- setup                       names that a block uses but does not define
    import flax.linen as nn
    -->
"""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?P<reason>^<!-- not run: [^\n]+ -->\n\s*)?^```python\n(?P<shown>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


def runnable_blocks(markdown: str) -> list[tuple[int, str]]:
    """The blocks to run, each with the line of the document it starts on."""
    blocks = []
    for match in BLOCK.finditer(markdown):
        if match["reason"] is None:
            group = "shown" if match["setup"] is None else "setup"
            line = markdown.count("\n", 0, match.start(group)) + 1
            blocks.append((line, match[group]))
    return blocks


def run(markdown: str, filename: str) -> int:
    """Runs the blocks and returns how many there were."""
    namespace = {"__name__": "__readme__"}
    blocks = runnable_blocks(markdown)
    for line, source in blocks:
        # Blank lines in front make a traceback show the line of the document.
        exec(compile("\n" * (line - 1) + source, filename, "exec"), namespace)
    return len(blocks)


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
def test_readme_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(README.read_text(encoding="utf-8"), str(README)) > 0


@pytest.mark.skipif(not README.exists(), reason="docs/ is not beside the tests")
def test_page_of_states_runs():
    page = README.parent / "docs" / "states.md"
    assert run(page.read_text(encoding="utf-8"), str(page)) == 3


def test_failing_block_is_seen_with_its_line():
    markdown = "# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as error:
        run(markdown, "README.md")
    assert error.traceback[-1].lineno + 1 == 8


def test_marks_are_honoured():
    markdown = (
        "<!-- setup\nx = 1\n-->\n"
        "```bash\nexit 1\n```\n"
        "<!-- not run: needs a TPU -->\n```python\nraise SystemExit\n```\n"
        "```python\nassert x == 1\n```\n"
    )
    assert [line for line, _ in runnable_blocks(markdown)] == [2, 12]
    assert run(markdown, "README.md") == 2
