"""What is committed of the notebooks: executed, with outputs that a reader can use."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
LARGEST_FILE = 700_000
LONGEST_CELL = 25
PATH_OF_A_MACHINE = re.compile(r"(?<![\w./])/(home|root|tmp|usr|var|opt|Users)/")


def problems(notebook: dict) -> list[str]:
    """What is wrong with a notebook, if anything, in words."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not executed from top to bottom: {counts}")
    outputs = [output for cell in code for output in cell["outputs"]]
    for output in outputs:
        if output["output_type"] == "error" or output.get("name") == "stderr":
            found.append(f"an error or a warning: {output}")
        text = "".join(output.get("text", []))
        text += "".join(output.get("data", {}).get("text/plain", []))
        if PATH_OF_A_MACHINE.search(text):
            found.append(f"a path of one machine: {text}")
        if "\r" in text or "\x1b" in text:
            found.append(f"written for a terminal: {text!r}")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("no figure")
    if any(cell["metadata"] for cell in notebook["cells"]):
        found.append("metadata of cells, such as the time of execution")
    longest = max("".join(cell["source"]).count("\n") + 1 for cell in code)
    if longest > LONGEST_CELL:
        found.append(f"a cell of {longest} lines")
    return found


def cell(count: int = 1, **output: object) -> dict:
    return {
        "cell_type": "code",
        "execution_count": count,
        "metadata": {},
        "outputs": [{"output_type": "stream", "name": "stdout"} | output],
        "source": ["1 + 1"],
    }


FIGURE = cell(2, output_type="display_data", data={"image/png": ""})


@pytest.mark.skipif(not FOLDER.exists(), reason="needs the source tree")
def test_there_are_notebooks():
    assert PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_clean(path):
    assert path.stat().st_size < LARGEST_FILE
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_clean_notebook_has_no_problems():
    assert problems({"cells": [cell(text=["fine\n"]), FIGURE]}) == []


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (cell(7), "not executed"),
        (cell(output_type="error"), "an error"),
        (cell(name="stderr", text=["UserWarning"]), "an error or a warning"),
        (cell(text=["saved to /home/someone/runs"]), "a path"),
        (cell(text=["10%\r20%"]), "a terminal"),
        (cell() | {"metadata": {"execution": {}}}, "metadata"),
        (cell() | {"source": ["1\n"] * 26}, "lines"),
    ],
)
def test_the_check_can_fail(bad, complaint):
    (problem,) = problems({"cells": [bad, FIGURE]})
    assert complaint in problem


def test_a_notebook_without_a_figure_is_a_problem():
    assert problems({"cells": [cell()]}) == ["no figure"]
