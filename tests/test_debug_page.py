"""Runs the examples of docs/debug.md, and compares the text that they print."""

import re
from pathlib import Path

import pytest

pytest.importorskip("flax")

PAGE = Path(__file__).parents[1] / "docs" / "debug.md"
EXAMPLE = re.compile(
    r"^```python\n(# (?P<name>\w+\.py)\n.*?)^```\n\n^```text\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


def examples():
    if not PAGE.exists():
        return {}
    found = EXAMPLE.finditer(PAGE.read_text(encoding="utf-8"))
    return {match["name"]: (match[1], match["text"]) for match in found}


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not beside the tests")
def test_there_are_three_examples():
    assert list(examples()) == ["norm.py", "attention.py", "mean.py"]


@pytest.mark.parametrize("name", examples())
def test_example_prints_its_text(name, tmp_path, monkeypatch, capsys):
    code, text = examples()[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(code, encoding="utf-8")
    exec(compile(code, name, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == text
