"""The order of rooms: a file imports from its own room and from those before it."""

import ast
from pathlib import Path

import optax_guard

PACKAGE = Path(str(optax_guard.__file__)).parent
# Ground floor first; rooms in one set do not import each other. `debug` comes between
# `_records` and `loops`.
ROOMS = (
    {"_checks", "_public"},
    {"_trees", "_transformation"},
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
