"""The README: each block runs alone and prints its text, and it stays short."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("flax")

from optax_guard.__main__ import main
from optax_guard.analysis import History
from tests import pages

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(
    not README.exists(), reason="README.md is not beside the tests"
)
FENCED = re.compile(r"```(\w+)\n(.*?)```|<!--.*?-->", re.DOTALL)


def alone(markdown: str) -> list[str]:
    """The README in parts that hold one block each, with the names that it needs."""
    ends = [match.end() for match in re.finditer(r"^```\n", markdown, re.MULTILINE)]
    parts, start = [], 0
    for end in ends:
        part = markdown[start:end]
        follows = markdown[end:].lstrip().startswith("```text")
        if "```python" in part and not follows:
            parts.append(part)
        start = start if follows else end
    return parts


def text() -> str:
    return README.read_text(encoding="utf-8")


@pytest.mark.parametrize("index", range(3))
def test_block_runs_alone_and_prints_its_text(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = alone(text())
    assert len(parts) == 3
    assert pages.runnable_blocks(parts[index])[-1].printed
    assert pages.run(parts[index], str(README)) > 0


def test_commands_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"step": i, "train_loss": 1 / i, "grad_norm": 1.0} for i in range(1, 9)]
    history = History("runs/1/history.jsonl")
    for row in rows:
        history.append(int(row["step"]), row)
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    blocks = [m[2] for m in FENCED.finditer(text()) if m[1] == "bash"]
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert all(
                re.search(rf"^{name}:", makefile, re.MULTILINE) for name in words
            )
        else:
            assert program == "optax-guard"
            assert main(words) in (0, 3, 4)
            assert "step" in capsys.readouterr().out


def test_it_is_short_and_its_links_are_there():
    prose = FENCED.sub("", text())
    assert len(prose.split()) <= 900
    lines = [line for line in prose.splitlines() if line.startswith("|")]
    lines += [x for m in FENCED.finditer(text()) for x in (m[2] or "").splitlines()]
    assert len(lines) <= 150
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert (README.parent / link).exists(), link
