"""What is public: the names that users may import, found in the sources."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import optax_guard

PACKAGE = Path(str(optax_guard.__file__)).parent


def public_modules() -> dict[str, ModuleType]:
    """The package and its modules without an underscore, by their short names."""
    files = [path.stem for path in PACKAGE.glob("*.py")]
    names = sorted(name for name in files if not name.startswith("_"))
    found = {name: importlib.import_module(f"optax_guard.{name}") for name in names}
    return {"": optax_guard} | found


def exported(module: ModuleType) -> Iterator[str]:
    """What type checkers take for public: defined there, or `import y as y`."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.Assign):
            names = [x.id for x in node.targets if isinstance(x, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def public_names() -> dict[str, Any]:
    """Every public function and class, as in `stop.patience`; no object twice."""
    found: dict[int, tuple[str, Any]] = {}
    for prefix, module in public_modules().items():
        for name in exported(module):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                path = f"{prefix}.{name}" if prefix else name
                found.setdefault(id(value), (path, value))
    return dict(found.values())
