"""Every public name is documented where it is defined."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from optax_guard._rows import entries_of

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from tests.public import public_names

NAMES = public_names()
FUNCTIONS = {k: v for k, v in NAMES.items() if inspect.isfunction(v)}
CLASSES = {k: v for k, v in NAMES.items() if inspect.isclass(v)}
RAISING = re.compile(r"(check|refuse)_\w+|as_threshold")


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

    def outside_of_inner_functions(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef):
                yield child
                yield from outside_of_inner_functions(child)

    return any(
        isinstance(each, ast.Raise)
        or (
            isinstance(each, ast.Call)
            and isinstance(each.func, ast.Name)
            and RAISING.fullmatch(each.func.id)
        )
        for each in outside_of_inner_functions(node)
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


def test_every_public_name_is_described():
    for name, value in (FUNCTIONS | CLASSES).items():
        line = (inspect.getdoc(value) or "").partition("\n")[0]
        assert len(line) > 10, name
        # A NamedTuple or a dataclass without a docstring is given its signature as one.
        assert not line.startswith(f"{value.__name__}("), name


def test_functions_describe_arguments_result_and_errors():
    found = {name: missing(function) for name, function in FUNCTIONS.items()}
    assert {name: lacks for name, lacks in found.items() if lacks} == {}


def has_example(value: Any) -> bool:
    return ">>> " in section((inspect.getdoc(value) or "") + "\n", "Examples")


def test_functions_have_an_example():
    assert [name for name, x in FUNCTIONS.items() if not has_example(x)] == []


def missing_of_class(cls: type) -> list[str]:
    """The fields and arguments of methods that the documentation of a class lacks."""
    text = (inspect.getdoc(cls) or "") + "\n"
    described = entries(section(text, "Attributes")) | entries(section(text, "Args"))
    fields = set(vars(cls)["_fields"]) if issubclass(cls, tuple) else described
    fields |= {k for k, x in vars(cls).items() if isinstance(x, property)}
    fields |= set(entries_of(cls))
    found = sorted(described ^ fields)
    for method in methods(cls):
        text = inspect.getdoc(method) or ""
        found += [] if text else [method.__name__]
        found += sorted(x for x in arguments(method) if x not in text)
    return found


def test_classes_describe_their_fields_and_methods():
    found = {name: missing_of_class(cls) for name, cls in CLASSES.items()}
    assert {name: lacks for name, lacks in found.items() if lacks} == {}


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


def test_a_class_that_leaves_something_out_is_found():
    class Bad(NamedTuple):
        """Holds two.

        Attributes:
          x: One.
          z: Another.
        """

        x: int
        y: int

        def show(self, width: int) -> None:
            """Shows."""

    assert not has_example(Bad)
    assert missing_of_class(Bad) == ["y", "z", "width"]
