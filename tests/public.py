"""What is public: the names that users may import, as `dir` lists them."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import optax_guard

PACKAGE = Path(str(optax_guard.__file__)).parent


def public_modules() -> dict[str, ModuleType]:
    """The package and its modules without an underscore, by their short names."""
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    stems = [path.stem for path in [*PACKAGE.glob("*.py"), *folders]]
    names = sorted(stem for stem in stems if not stem.startswith("_"))
    found = {name: importlib.import_module(f"optax_guard.{name}") for name in names}
    return {"": optax_guard} | found


def public_names() -> dict[str, Any]:
    """Every public function and class, as in `stop.patience`, where it is published."""
    found = {}
    for prefix, module in public_modules().items():
        for name in dir(module):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                prefix = value.__module__.removeprefix("optax_guard").lstrip(".")
            if not inspect.ismodule(value):
                found[f"{prefix}.{name}" if prefix else name] = value
    return found


def is_listed(name: str) -> bool:
    """Whether documentation lists a name of `public_names`; it need not list states."""
    module, _, name = name.rpartition(".")
    return name in public_modules()[module].__all__
