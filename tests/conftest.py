"""Set before JAX is imported: the CPU as eight devices, and no search for others."""

import ast
import contextlib
import doctest
import gc
import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One module of LLVM a program: to split programs this small costs a fifth of the time.
_flags = (
    " --xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
)
# Compilation takes nearly all the time of the tests, and each program runs a few times.
# XLA's older generator of code for the CPU, without optimisation, takes a quarter of
# the time or less, but it rounds differently in some branches: `make test-all` runs
# tests of numbers again, compiled as users compile.
if os.environ.get("OPTAX_GUARD_TEST_CODEGEN") == "quick":
    _flags += " --xla_backend_optimization_level=0"
    # An XLA that has no older generator any more does not start with this flag.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _flags


def _cache_folder(root: Path, most_bytes: int = 2 << 30) -> Path:
    """The folder of this process for compiled programs, kept between runs.

    JAX writes there without a lock, so every process of xdist has its own. The process
    that starts them lets each begin with the programs of all; it removes a cache that
    has grown too large, and a program that an interrupted run has not written.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        sizes = {path: path.stat().st_size for path in root.glob("*/*-cache")}
        is_over = sum(sizes.values()) > most_bytes
        for path in [path for path, size in sizes.items() if is_over or size == 0]:
            path.unlink(missing_ok=True)
            del sizes[path]
        folders = {path.parent for path in sizes}
        for path in sizes:
            for folder in folders - {path.parent}:
                # Another run may have started at the same time.
                with contextlib.suppress(FileExistsError):
                    os.link(path, folder / path.name)
    return root / (worker or "main")


_root = os.environ.get("OPTAX_GUARD_TEST_CACHE")
_root = Path(_root) if _root else Path(__file__).parents[1] / ".cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache_folder(_root))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Nothing below changes a result: libtpu, where `make test-accelerators` installed
# it, neither asks the network for a TPU, nor locks out a second process, nor logs.
for name, value in {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "MPLBACKEND": "agg",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402 - the environment comes first
import pytest  # noqa: E402 - as JAX, which its plugins import

from tests.strategies import in_force  # noqa: E402 - imports JAX
from tests.tiers import tier_of  # noqa: E402 - beside the line above

# Traces are full of objects that live long: looking through them for cycles as often as
# Python does by default takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)
# No test reads the stack of Python from a compiled program.
jax.config.update("jax_traceback_in_locations_limit", 0)

_find_module = doctest.DocTestFinder._from_module  # pyright: ignore


def _stands_in(finder: doctest.DocTestFinder, module: Any, value: Any) -> bool:
    """Whether the code of a function or a class stands in the file of a module.

    Doctest goes by `__module__`, which here is the public module.
    """
    if inspect.isfunction(value):
        return inspect.unwrap(value).__globals__ is vars(module)
    if inspect.isclass(value) and "." not in value.__qualname__:
        body = ast.parse(inspect.getsource(module)).body
        return any(value.__name__ == getattr(node, "name", None) for node in body)
    return _find_module(finder, module, value)


doctest.DocTestFinder._from_module = _stands_in  # pyright: ignore

# `make mutants` runs this file, and installs the packages that it needs.
collect_ignore = ["mutants.py"]
# The tests of each of these modules share something that takes long to make.
TOGETHER = {
    "test_demo",
    "test_early_stopping",
    "test_loops",
    "test_resume",
    "test_carriers",
}
# Beside `test_on_accelerator`, what `-m accelerator` runs: it fits any one device.
ON_ACCELERATOR = {"test_laws", "test_norms", "test_clipping"}


# First, so that pytest selects by the marks that are set here.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Marks the full tier, and keeps in one process the tests that share programs."""
    has_xdist = config.pluginmanager.hasplugin("xdist")
    for item in items:
        module = item.path.stem
        case = getattr(item, "callspec", None)
        name = case.params.get("name") if case else None
        tier = tier_of(module, getattr(item, "originalname", None), item.name, name)
        if tier:
            item.add_marker(tier)
        if module in ON_ACCELERATOR:
            item.add_marker(pytest.mark.accelerator)
        if has_xdist and module in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(module))
        elif has_xdist and isinstance(name, str):
            item.add_marker(pytest.mark.xdist_group(f"{module} {name}"))


def _need_eight_devices() -> None:
    # The CPU is eight devices above; an accelerator may be one.
    if jax.default_backend() != "cpu" and jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, JAX finds {jax.device_count()}")


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """Eight devices along the axis `data`; the compiler places what is between."""
    _need_eight_devices()
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def explicit_mesh():
    """Eight devices along the axis `data`, with shardings in the types; in force."""
    _need_eight_devices()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with in_force(mesh):
        yield mesh


@pytest.fixture
def x64():
    """Sixty-four bit types, for the length of a test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
