"""The compiler for TPU takes a third of the time with its least effort.

What is counted is the same (`test_effort_of_the_compiler_changes_no_count`) but in a
whole train step and with state in the host's memory, which take `users_effort`.
"""

import contextlib
from collections.abc import Iterator

import jax
import pytest

LONGEST = "TestTrainStep"
EFFORT = "jax_exec_time_optimization_effort"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest: at the end one of two processes would wait for it."""
    items.sort(key=lambda item: LONGEST not in item.nodeid)


@contextlib.contextmanager
def effort(value: float) -> Iterator[None]:
    """Compiles with this effort: from -1, the least, to 1; users do with 0."""
    if not hasattr(jax.config, EFFORT):  # No longer since JAX 0.12.
        yield
        return
    before = getattr(jax.config, EFFORT)
    jax.config.update(EFFORT, value)
    try:
        yield
    finally:
        jax.config.update(EFFORT, before)


@pytest.fixture(scope="module", autouse=True)
def least_effort() -> Iterator[None]:
    with effort(-1.0):
        yield


@pytest.fixture(scope="class")
def users_effort() -> Iterator[None]:
    with effort(0.0):
        yield
