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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def closure(requirements: list[str]) -> set[str]:
    """Those and all that they require in turn, without extras nobody asked for."""
    found: dict[tuple[str, str], None] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for extra in {"", *requirement.extras}:
            key = canonicalize_name(requirement.name), extra
            if key not in found:
                found[key] = None
                inner = metadata.distribution(requirement.name).requires or []
                waiting += [(Requirement(text), extra) for text in inner]
    return {name for name, _ in found}


def link(names: set[str], folder: Path) -> None:
    """Puts installed distributions into a folder, as links to their files."""
    for name in names:
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or ()}:
            if top not in ("..", "__pycache__"):
                source = distribution.locate_file(top)
                (folder / top).symlink_to(str(source))


# In an environment of what is declared: what works, and what says what it needs.
CLEAN = """
import sys, warnings
sys.path[:0] = [sys.argv[1]]
from importlib.util import find_spec
print(*(name for name in sys.argv[3:] if find_spec(name)), "are there")
import jax.numpy as jnp, optax
import optax_guard as og, optax_guard.analysis, optax_guard.loops
from optax_guard.__main__ import main
print(og.__file__)
tx = og.guard(optax.sgd(1.0), clip=1.0)
params, state = jnp.ones(1), tx.init(jnp.ones(1))
params, state = og.apply_gradients(tx, params, state, grads=jnp.array([jnp.nan]))
history = og.analysis.History(sys.argv[2] + "/history.jsonl")
history.append(1, og.metrics(state), val_loss=0.5)
print(params, og.skipped_steps(state)[0].reason.name)
for extra in ("flax", "plotting"):
    try:
        __import__("optax_guard." + extra)
    except ImportError as error:
        print(error)
print(main(["replay", sys.argv[2], "--rule", "target(1.0)"]))
print(main(["report", sys.argv[2]]), main(["demo", "--quick"]))
"""


@needs_source
def test_wheel_needs_only_what_it_declares(wheel, tmp_path):
    # Neither the source tree nor the environment of the tests can be seen: `-S`.
    site, run = tmp_path / "site", tmp_path / "run"
    wheel.extractall(site)
    run.mkdir()
    (path,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    described = message_from_string(wheel.read(path).decode())
    link(closure(described.get_all("Requires-Dist", [])), site)
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CLEAN, site, run, *OPTIONAL],
        cwd=run,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = iter(result.stdout.splitlines())
    assert next(lines) == "are there"
    assert Path(next(lines)).is_relative_to(site)
    assert next(lines) == "[1.] NONFINITE"
    assert "pip install 'optax-guard[flax]'" in next(lines)
    assert "pip install 'optax-guard[plot]'" in next(lines)
    printed = "\n".join(lines)
    assert "target(1.0)" in printed
    assert printed.endswith("\n0 1")
    for extra in ("plot", "demo"):
        assert f"pip install 'optax-guard[{extra}]'" in result.stderr
    assert {path.name for path in (run / "report").iterdir()} == {"report.md"}


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
