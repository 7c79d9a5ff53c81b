"""What is committed of the notebooks: executed, with outputs that a reader can use."""

import json
import math
import os
import re
from pathlib import Path

import pytest

# `make notebooks` names the folder of those that it has just executed.
FOLDER = Path(
    os.environ.get("OPTAX_GUARD_NOTEBOOKS", Path(__file__).parents[1] / "notebooks")
)
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
    if any("assert" in "".join(cell["source"]) for cell in code):
        found.append("an assertion, which belongs into a test")
    first, last = ("".join(notebook["cells"][i]["source"]) for i in (0, -1))
    if "**What is shown:**" not in first:
        found.append("the first cell does not say what is shown")
    if not last.startswith("## What was learned"):
        found.append("the last cell does not say what was learned")
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
FIRST = {"cell_type": "markdown", "metadata": {}, "source": ["**What is shown:** 2"]}
LAST = FIRST | {"source": ["## What was learned\n", "1"]}


@pytest.mark.skipif(not FOLDER.exists(), reason="needs the source tree")
def test_there_are_notebooks():
    assert PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_clean(path):
    assert path.stat().st_size < LARGEST_FILE
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []


def test_a_clean_notebook_has_no_problems():
    assert problems({"cells": [FIRST, cell(text=["fine\n"]), FIGURE, LAST]}) == []


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
        (cell() | {"source": ["assert True"]}, "an assertion"),
    ],
)
def test_the_check_can_fail(bad, complaint):
    (problem,) = problems({"cells": [FIRST, bad, FIGURE, LAST]})
    assert complaint in problem


def test_a_notebook_without_a_figure_or_words_is_a_problem():
    assert problems({"cells": [FIRST, cell(), LAST]}) == ["no figure"]
    assert len(problems({"cells": [cell(), FIGURE]})) == 2


def printed(notebook: dict) -> str:
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) + "\n" for output in outputs)


def numbers(text: str, start: str) -> list[float]:
    """The numbers of the last line that starts so, indents aside."""
    (*_, line) = [x for x in text.splitlines() if x.strip().startswith(start)]
    words = line.strip().removeprefix(start)
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?|nan|inf", words)]


def check_lstm(text: str) -> None:
    # Without a clip the run explodes, and both clips save it. The record says so.
    unguarded, _, others = text.partition("\nunguarded:\n")[2].partition("by value:")
    by_value, _, by_norm = others.partition("\nclipped by norm:\n")
    assert "EXPLODING" in unguarded
    assert "DIRECTION_DISTORTED" in by_value
    assert "CLIPPING_WORKS" in by_norm
    assert not numbers(text, "unguarded")[1] < 10
    assert numbers(text, "clipped by value")[1] < 3
    assert numbers(text, "clipped by norm")[1] < 3
    # A clip does not survive the broken batch. The guard skips exactly that step.
    assert math.isnan(numbers(text, "by norm, broken batch")[1])
    assert numbers(text, "guarded, broken batch")[1] < 3
    assert "skipped: step 130, NONFINITE\n" in text
    kept, last = numbers(text, "best parameters:")
    assert kept < last


def check_transformer(text: str) -> None:
    # One spike costs Adam the rest of the run, unless it is clipped or skipped.
    assert max(numbers(text, "101")) > 100
    before, after, _ = numbers(text, "watched")
    assert after > before
    assert numbers(text, "quantile")[2] > 0.1
    assert numbers(text, "zscore, spikes skipped")[2] > 0.1
    # Every guard skips the NaN; only a skip rule skips the spike of wrong weights.
    assert text.count("step 150, NONFINITE") == 3
    assert text.count("step 100, SPIKE") == 1
    # Accumulation loses an eighth of the micro-batches; whole batches, half the steps.
    assert numbers(text, "whole ")[1:] == [25, 50, 0]
    assert numbers(text, "accumulated ")[1:] == [0, 50, 25]
    exact, ours, *_ = numbers(text, "float64:")
    assert ours == pytest.approx(exact, rel=1e-5)
    assert "dtypes after clipping: {'bfloat16'}" in text


def check_reinforcement_learning(text: str) -> None:
    # Without a bound on its steps the policy is lost; with one it learns.
    names = "watched", "fixed", "quantile", "quantile, capped"
    watched, fixed, quantile, capped, skipping = (
        numbers(text, f"mean final success, {name}:")[0]
        for name in (*names, "quantile, capped, spikes skipped")
    )
    assert max(watched, quantile) < 0.7
    assert min(fixed, capped, skipping) > 0.85
    # Gradients are zero in many steps, and still the threshold never is.
    assert numbers(text, "gradients that are exactly zero:")[0] > 10
    assert numbers(text, "lowest threshold:")[0] > 0
    # The failures of the sensor are finite, so only the spike rule skips them.
    skipped = re.findall(r"skipped: step (\d+), (\w+)", text)
    assert {reason for _, reason in skipped} == {"SPIKE"}
    assert {int(step) for step, _ in skipped} <= {
        int(step) for step in numbers(text, "the sensor failed at steps")
    }


def check_sharded(text: str) -> None:
    assert numbers(text, "parameters of eight devices and of one differ by")[0] < 1e-3
    assert text.count("step 13: NONFINITE in ") == 2
    assert "still sharded: P('data',)" in text
    with_clip, without = numbers(text, "24 runs: best loss with a clip")
    assert with_clip < without
    assert len(re.findall(r"^[A-Z]+: \d+ members", text, re.MULTILINE)) > 1
    assert "resumed: 4 of 4 things are the same bits" in text


def check_your_loop(text: str) -> None:
    assert "150 nan nan\n" in text  # as it was
    assert re.search(r"^150 \d\.\d+ \d\.\d+$", text, re.MULTILINE)  # guarded
    assert "update 130: NONFINITE" in text
    assert numbers(text, "num_skipped")[0] == 1
    assert "INFO STEPS_SKIPPED" in text
    assert "WARNING" not in text
    (kept,) = numbers(text, "validation loss of the parameters that were kept:")
    assert kept < numbers(text, "of the last evaluation:")[0]


CHECKS = [
    ("01_lstm", check_lstm),
    ("02_transformer", check_transformer),
    ("03_reinforcement_learning", check_reinforcement_learning),
    ("04_sharded", check_sharded),
    ("05_your_loop", check_your_loop),
]


@pytest.mark.skipif(not FOLDER.exists(), reason="needs the source tree")
@pytest.mark.parametrize(("name", "check"), CHECKS, ids=[name for name, _ in CHECKS])
def test_numbers_are_as_the_text_says(name, check):
    path = FOLDER / f"{name}.ipynb"
    check(printed(json.loads(path.read_text(encoding="utf-8"))))


@pytest.mark.skipif(not FOLDER.exists(), reason="needs the source tree")
def test_each_notebook_is_checked():
    assert [path.stem for path in PATHS] == [name for name, _ in CHECKS]


@pytest.mark.skipif(not FOLDER.exists(), reason="needs the source tree")
def test_differences_that_are_shown_are_those_of_the_cells():
    path = FOLDER / "05_your_loop.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    shown = 0
    for i, text in enumerate(texts):
        for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
            before, after = "\n".join(texts[:i]), "\n".join(texts[i + 1 :])
            for line in block.splitlines():
                assert line[1:] in (before if line[0] == "-" else after).splitlines()
                shown += 1
    assert shown > 20
