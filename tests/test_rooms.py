"""The order of rooms, and the size and depth of functions."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import optax_guard

PACKAGE = Path(str(optax_guard.__file__)).parent
# Ground floor first; rooms in one set do not import each other. `debug` comes between
# `_records` and `loops`.
ROOMS = (
    {"_checks", "_codes", "_wrong_guesses"},
    {"_public"},
    {"_trees", "_models", "_transformation", "_rows"},
    {"_norms"},
    {"stop"},
    {"threshold"},
    {"_clipping"},
    {"skip"},
    {"_guarding"},
    {"_records"},
    {"debug"},
    {"loops"},
    {"flax"},
    {"analysis"},
    {"plotting"},
    {"__init__"},
    {"_cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def imports(source: str) -> list[str]:
    """The rooms that a file imports from, whether at its top or in a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "optax_guard":
            names += [f"optax_guard.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("optax_guard")]
    return [part[1] if part[1:] and part[1] in FLOOR else "__init__" for part in parts]


def is_upward(room: str, imported: str) -> bool:
    same_floor = FLOOR[room] == FLOOR[imported] and room != imported
    return FLOOR[imported] > FLOOR[room] or same_floor


def test_every_file_imports_downward():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        # The package's own face names modules that are imported on first use.
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {imported}"
            for imported in imports(path.read_text(encoding="utf-8"))
            if room != "__init__" and is_upward(room, imported)
        ]
    assert wrong == []


def test_an_import_upward_is_seen():
    assert imports("from optax_guard.loops._fit import fit") == ["loops"]
    assert imports("def f():\n    import optax_guard.stop as s") == ["stop"]
    assert imports("from optax_guard import skip, guard") == ["skip", "__init__"]
    assert is_upward("stop", "loops")
    assert is_upward("_trees", "_transformation")
    assert not is_upward("loops", "stop")
    assert not is_upward("stop", "stop")


# Functions ---------------------------------------------------------------------

MOST_LINES = 60
MOST_DEPTH = 2


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, depth: int = 1) -> Iterator[tuple[Function, int]]:
    """Every function with its depth: 2 is a function inside a function."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, Function)
        if is_function:
            yield child, depth
        yield from functions(child, depth + is_function)


def numbers_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def lines_of_code(function: Function, lines: list[str]) -> int:
    """Lines of a function without docstrings, comments and blank lines."""
    counted = numbers_of(function)
    for node in ast.walk(function):
        has_body = isinstance(node, Function | ast.ClassDef)
        if has_body and ast.get_docstring(node) is not None:
            counted -= numbers_of(node.body[0])
    code = (lines[number - 1].strip() for number in counted)
    return sum(bool(line) and not line.startswith("#") for line in code)


def too_long(source: str) -> list[str]:
    sizes = [
        (function.name, lines_of_code(function, source.splitlines()))
        for function, _ in functions(ast.parse(source))
    ]
    return [f"{name} has {size} lines" for name, size in sizes if size > MOST_LINES]


def too_deep(source: str) -> list[str]:
    found = functions(ast.parse(source))
    return [function.name for function, depth in found if depth > MOST_DEPTH]


def check_every_file(rule: Callable[[str], list[str]]) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {offender}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for offender in rule(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_no_function_is_longer_than_sixty_lines_of_code():
    check_every_file(too_long)


def test_no_function_is_inside_a_function_inside_a_function():
    check_every_file(too_deep)


def test_a_long_function_is_seen():
    def source(num_lines: int) -> str:
        body = "    x = 1\n" * (num_lines - 3)
        inner = "    def inner():\n        pass\n"
        return f'def f():\n    """One.\n\n    Two."""\n\n    # Why.\n{inner}{body}'

    assert too_long(source(MOST_LINES)) == []
    assert too_long(source(MOST_LINES + 1)) == ["f has 61 lines"]


def test_a_function_three_deep_is_seen():
    source = "def f():\n  def g():\n    if f:\n      def h(): pass\n"
    assert too_deep(source) == ["h"]
    assert too_deep("class A:\n  def f(self):\n    def g(): pass\n") == []
