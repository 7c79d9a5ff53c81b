"""Writes the pages of the API reference: one a module, and one a public name."""

import importlib
import inspect
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

# In the order of the sidebar.
MODULES = [
    "optax_guard",
    "optax_guard.threshold",
    "optax_guard.skip",
    "optax_guard.stop",
    "optax_guard.loops",
    "optax_guard.flax",
    "optax_guard.debug",
    "optax_guard.analysis",
    "optax_guard.plotting",
]


def short(name: str) -> str:
    """A full name as users write it, `stop.patience`."""
    return name.removeprefix("optax_guard.")


def names_of(module: ModuleType) -> dict[str, Any]:
    """The public functions, classes and values of a module by their full names."""
    found = {}
    for name in dir(module):
        value = getattr(module, name)
        if not inspect.ismodule(value):
            is_named = inspect.isfunction(value) or inspect.isclass(value)
            home = value.__module__ if is_named else module.__name__
            found[f"{home}.{name}"] = value
    return found


def public_names() -> dict[str, Any]:
    """All of them, each under the module in which it is published."""
    found = {}
    for name in MODULES:
        found |= names_of(importlib.import_module(name))
    return found


def methods_of(cls: type) -> list[str]:
    """What users call, without the fields and what Python or Flax adds."""
    own = [name for name in vars(cls) if not name.startswith("_")]
    return [
        name
        for name in own
        if inspect.isroutine(value := getattr(cls, name))
        and value.__module__ == cls.__module__
    ]


def name_page(name: str, value: Any) -> str:
    """The page of one name, in MyST."""
    lines = [f"# {short(name)}", "", "```{eval-rst}"]
    if inspect.isclass(value):
        lines.append(f".. autoclass:: {name}")
        if methods := methods_of(value):
            lines.append(f"   :members: {', '.join(methods)}")
    elif inspect.isfunction(value):
        lines.append(f".. autofunction:: {name}")
    else:
        lines.append(f".. autodata:: {name}")
    return "\n".join([*lines, "```", ""])


def module_page(module: ModuleType) -> str:
    """The page of a module: its names with their first lines, as a table."""
    names = names_of(module)
    listed = [name for name in names if name.rpartition(".")[2] in module.__all__]
    states = [name for name in names if name not in listed]
    text = f"# {module.__name__}\n\n{inspect.getdoc(module)}\n"
    for title, group in (("", listed), ("Met in states and results", states)):
        if group:
            text += f"\n## {title}\n" if title else ""
            text += "\n| | |\n|---|---|\n"
        for name in group:
            first = (inspect.getdoc(names[name]) or "").partition("\n")[0]
            first = first.replace("``", "`").replace("|", "\\|")
            text += f"| [{short(name)}]({short(name)}.md) | {first} |\n"
    own = sorted(x for x in names if x.rpartition(".")[0] == module.__name__)
    toctree = "\n".join(map(short, own))
    return text + f"\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"


def pages() -> dict[str, str]:
    """All pages by the names of their files, without the ending."""
    found = {short(name): name_page(name, x) for name, x in public_names().items()}
    for name in MODULES:
        found[short(name)] = module_page(importlib.import_module(name))
    return found


def write(folder: Path) -> None:
    """Writes the pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in pages().items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def linked(line: str, pages: dict[str, str]) -> str:
    """A line of a docstring in which names of this library are links.

    Docstrings quote names with one backtick or two, with their module or without.
    """

    def link(match: re.Match[str]) -> str:
        name = match["name"].removeprefix("og.").removeprefix("optax_guard.")
        return f":py:obj:`{name} <{pages[name]}>`" if name in pages else match[0]

    return re.sub(r"(?<![`\w:])(`{1,2})(?P<name>[\w.]+)\1(?![`\w])", link, line)


def targets() -> dict[str, str]:
    """What docstrings may call a name: `stop.patience`, or `SkipLog` if unique."""
    full = list(public_names())
    found = {short(name): name for name in full}
    last = [name.rpartition(".")[2] for name in full]
    # Words that are arguments as often as names stay as they are.
    for name in full:
        word = name.rpartition(".")[2]
        if last.count(word) == 1 and not (word.islower() and "_" not in word):
            found.setdefault(word, name)
    return found
