"""Every public name is documented, where it is defined and in the README."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from tests.public import is_listed, public_names

README = Path(__file__).parents[1] / "README.md"
NAMES = public_names()
FUNCTIONS = {k: v for k, v in NAMES.items() if inspect.isfunction(v)}
CLASSES = {k: v for k, v in NAMES.items() if inspect.isclass(v)}
RAISING = re.compile(r"(check|refuse)_\w+|as_threshold")

over_names = pytest.mark.parametrize("name", NAMES)


def section(text: str, title: str) -> str:
    """A section of a docstring in Google's style; empty if it has none."""
    found = re.search(rf"^{title}:\n((?:  .*\n?|\n)+)", text, re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def entries(text: str) -> set[str]:
    """The names that a section describes."""
    return {name.strip("*") for name in re.findall(r"^([*\w]+):", text, re.MULTILINE)}


def arguments(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def raises(function: Callable[..., Any]) -> bool:
    """Whether its own lines, without those of inner functions, can raise."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body

    def own(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef):
                yield child
                yield from own(child)

    return any(
        isinstance(each, ast.Raise)
        or (
            isinstance(each, ast.Call)
            and isinstance(each.func, ast.Name)
            and RAISING.fullmatch(each.func.id)
        )
        for each in own(node)
    )


def missing(function: Callable[..., Any]) -> list[str]:
    """What the documentation of a function leaves out."""
    text = (inspect.getdoc(function) or "") + "\n"
    described = entries(section(text, "Args"))
    found = sorted(arguments(function) - described)
    found += [f"no {x}" for x in sorted(described - arguments(function))]
    if inspect.signature(function).return_annotation is not None:
        found += [] if section(text, "Returns") else ["Returns"]
    if raises(function):
        found += [] if section(text, "Raises") else ["Raises"]
    return found


def methods(cls: type) -> list[Callable[..., Any]]:
    """What users call, without what Flax adds to a dataclass."""
    own = [getattr(cls, name) for name in vars(cls) if not name.startswith("_")]
    return [x for x in own if inspect.isroutine(x) and x.__module__ == cls.__module__]


@over_names
def test_every_public_name_is_described(name):
    if name in FUNCTIONS or name in CLASSES:
        line = (inspect.getdoc(NAMES[name]) or "").partition("\n")[0]
        assert len(line) > 10
        # A NamedTuple or a dataclass without a docstring is given its signature as one.
        assert not line.startswith(f"{NAMES[name].__name__}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_describe_arguments_result_and_errors(name):
    assert missing(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_an_example(name):
    assert ">>> " in section((inspect.getdoc(FUNCTIONS[name]) or "") + "\n", "Examples")


@pytest.mark.parametrize("name", CLASSES)
def test_classes_describe_their_fields_and_methods(name):
    cls = CLASSES[name]
    text = (inspect.getdoc(cls) or "") + "\n"
    described = entries(section(text, "Attributes")) | entries(section(text, "Args"))
    if issubclass(cls, tuple):
        assert described == set(vars(cls)["_fields"])
    for method in methods(cls):
        described = inspect.getdoc(method) or ""
        assert described
        assert {x for x in arguments(method) if x not in described} == set()


@pytest.mark.skipif(not README.exists(), reason="README.md is not beside the tests")
@pytest.mark.parametrize("name", [n for n in NAMES if is_listed(n)])
def test_every_public_name_is_in_the_readme(name):
    # As code: many names are words of English, too.
    text = README.read_text(encoding="utf-8")
    code = " ".join(re.findall(r"```python\n.*?```|`[^`\n]+`", text, re.DOTALL))
    assert re.search(rf"\b{name.rpartition('.')[2]}\b", code)


def test_what_is_not_documented_is_found():
    def bad(x: int, y: int) -> int:
        """Adds.

        Args:
          x: One.
          z: Another.
        """
        if x < 0:
            raise ValueError(x)
        return x + y

    def good(x: int) -> None:
        """Shows.

        Args:
          x: What.
        """

        def inner() -> None:
            raise ValueError(x)

        inner()

    assert missing(bad) == ["y", "no z", "Returns", "Raises"]
    assert missing(good) == []
