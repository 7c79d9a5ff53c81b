"""Runs the Python blocks of README.md."""

from pathlib import Path

import pytest

from tests import pages

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
def test_readme_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pages.run(README.read_text(encoding="utf-8"), str(README)) > 0
