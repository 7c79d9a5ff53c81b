"""CONTRIBUTING.md names files and functions that exist."""

import functools
import importlib
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from tests.public import PACKAGE

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="it is not beside the tests")


def paths_of(text: str) -> list[str]:
    """The files and folders of the package in a text, as in `stop/_rule.py`."""
    quoted = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    return [path for path in quoted if not path.startswith(("tests/", "benchmarks/"))]


def steps_of(text: str) -> list[list[tuple[str, str]]]:
    """The numbered lines of a text: each has pairs of a file and a name in it."""
    steps = []
    for line in re.findall(r"^\d\. .*$", text, re.MULTILINE):
        path, pairs = "", []
        for quoted in re.findall(r"`([\w./]+)`", line):
            if quoted.endswith(".py"):
                path = quoted
            elif path:
                pairs.append((path, quoted))
        steps.append(pairs)
    return steps


def find(path: str, name: str) -> object:
    parts = ["optax_guard", *path.removesuffix(".py").split("/")]
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    return functools.reduce(getattr, name.split("."), module)


def test_both_walks_have_five_steps_and_name_what_is_there():
    steps = steps_of(GUIDE.read_text(encoding="utf-8"))
    assert len(steps) == 10
    assert all(steps)
    for step in steps:
        for path, name in step:
            assert find(path, name) is not None, (path, name)


def test_the_map_names_every_room():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    rows = "\n".join(line.split("|")[1] for line in lines if line.startswith("| `"))
    rooms = {path.rstrip("/") for path in paths_of(rows)}
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert rooms == entries - {"__init__.py", "__pycache__"}


def test_a_step_is_read_as_pairs_of_a_file_and_a_name():
    text = (
        "1. `stop/_rule.py` `Verdict` and `StopReason`, in `skip.py` `spike`.\nNo step."
    )
    expected = [("stop/_rule.py", "Verdict"), ("stop/_rule.py", "StopReason")]
    assert steps_of(text) == [[*expected, ("skip.py", "spike")]]
    assert paths_of(text) == ["stop/_rule.py", "skip.py"]
    with pytest.raises(AttributeError):
        find("stop/_rule.py", "Verdicts")
    with pytest.raises(ModuleNotFoundError):
        find("stop/_rules_of_old.py", "Verdict")


def test_the_citation_names_the_version():
    root = GUIDE.parent
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
