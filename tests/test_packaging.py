"""What an installed optax_guard imports, declares and contains."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
PACKAGE = ROOT / "optax_guard"
OPTIONAL = ("flax", "matplotlib", "rich", "orbax", "tensorboardX")

needs_source = pytest.mark.skipif(
    not (PYPROJECT.exists() and PACKAGE.exists()),
    reason="needs the source tree beside the tests",
)


def imported_by(program: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after `program`."""
    report = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    output = subprocess.run(
        [sys.executable, "-c", program + report],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return set(output.split())


def test_import_leaves_extras_alone():
    assert imported_by("import optax_guard").isdisjoint(OPTIONAL)


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_import_test_can_fail(name):
    pytest.importorskip(name)
    assert name in imported_by(f"import optax_guard, {name}")


def test_version_is_that_of_the_distribution():
    import optax_guard

    version = metadata.version("optax-guard")
    assert getattr(optax_guard, "__version__", version) == version
    if PYPROJECT.exists():
        assert tomllib.loads(PYPROJECT.read_text())["project"]["version"] == version


def distribution_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


@needs_source
def test_package_imports_only_what_it_declares():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = {distribution_name(r) for r in project["dependencies"]}
    for extra in project["optional-dependencies"].values():
        declared |= {distribution_name(r) for r in extra}
    local = {"optax_guard"} | set(sys.stdlib_module_names)
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    owners = {"orbax": "orbax-checkpoint"}
    undeclared = {
        name
        for name in imported - local
        if owners.get(name, name.lower()) not in declared
    }
    assert undeclared == set()


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist: those in OPTAX_GUARD_DIST, or fresh ones."""
    if "OPTAX_GUARD_DIST" in os.environ:
        return ROOT / os.environ["OPTAX_GUARD_DIST"]
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path):
    (path,) = dist.glob("optax_guard-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@needs_source
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    sources = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    assert names == sources | {"optax_guard/py.typed"}


@needs_source
def test_wheel_describes_itself(wheel):
    (path,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    info = path.removesuffix("METADATA")
    described = message_from_string(wheel.read(path).decode())
    assert described["Name"] == "optax-guard"
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.11"
    assert described["Description-Content-Type"] == "text/markdown"
    required = described.get_all("Requires-Dist", [])
    assert {distribution_name(r) for r in required if "extra ==" not in r} == {
        "jax",
        "numpy",
        "optax",
    }
    assert set(described.get_all("Provides-Extra", [])) == {
        "all",
        "checkpoint",
        "demo",
        "flax",
        "log",
        "plot",
    }
    assert "Apache License" in wheel.read(info + "licenses/LICENSE").decode()
    scripts = wheel.read(info + "entry_points.txt").decode()
    assert "optax-guard = optax_guard.__main__:main" in scripts


@needs_source
def test_wheel_works_without_the_source_tree(wheel, tmp_path):
    wheel.extractall(tmp_path)
    program = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1]); "
        "import optax_guard; print(optax_guard.__file__); "
        "main = importlib.import_module('optax_guard.__main__').main; "
        "assert callable(main)"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program, tmp_path],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)


@needs_source
def test_sdist_holds_what_a_build_and_a_test_need(dist):
    (path,) = dist.glob("optax_guard-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "optax_guard/py.typed",
        "pyproject.toml",
        "tests/conftest.py",
    } <= names
    assert {name.partition("/")[0] for name in names} <= {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "PKG-INFO",
        "README.md",
        "optax_guard",
        "pyproject.toml",
        "tests",
    }
