"""The debugger against planted faults and healthy functions written without it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from tests.debug_faults import FAULTS, MARK, Fault
from tests.debug_healthy import HEALTHY, Healthy

# JAX's own checks do not name the line of these.
UNNAMED = {
    # They do not look at the primitive.
    "cholesky_of_an_indefinite_matrix",
    "take_beyond_the_end",
    # The traceback ends at a function of `jax.numpy` that is jitted and cached.
    "second_call_of_a_cached_function",
    "gradient_of_a_norm_at_zero",
    "gradient_of_the_second_norm",
    "gradient_of_the_deviation_of_constants",
    "gradient_of_one_example",
    # They stop at a NaN that is discarded.
    "nan_that_is_discarded_before_the_fault",
    "nan_of_an_earlier_iteration_is_replaced",
    # They fail on it.
    "gradient_of_a_shard_map",
    "gradient_over_the_devices_of_a_shard_map",
    "NnxGradientOfANormAtZero",
}


def floats(tree: object) -> list[np.ndarray]:
    """The floating-point leaves of a result, as float64."""
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    kept = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    return [np.asarray(a.astype(jnp.float32), np.float64) for a in kept]


def kind_of(tree: object) -> str | None:
    leaves = floats(tree)
    assert leaves
    if any(np.isnan(leaf).any() for leaf in leaves):
        return "nan"
    return "inf" if any(np.isinf(leaf).any() for leaf in leaves) else None


def run(case: Fault) -> object:
    return case.fn(*case.make_args(), **case.kwargs)


def first_nan(case: Fault | Healthy) -> Any:
    """The first NaN in program order, discarded or not, by JAX's own checks."""
    checked = checkify.checkify(case.fn, errors=checkify.nan_checks)
    kwargs = case.kwargs if isinstance(case, Fault) else {}
    error, _ = checked(*case.make_args(), **kwargs)
    return error.get_exception()


def line_of(found: Any, case: Fault) -> int | None:
    """The innermost line of the file of faults in the traceback of JAX's checks."""
    frames = str(getattr(found, "traceback_info", "")).split(case.filename + ":")
    return int(frames[1].split(" ")[0])


@pytest.mark.parametrize("name", [case.name for case in FAULTS])
def test_every_fault_is_as_planted(name):
    (case,) = [case for case in FAULTS if case.name == name]
    assert kind_of(run(case)) == case.kind
    # The marked line is the cause: to change nothing else cures the result.
    assert kind_of(run(case.mended())) is None
    if case.is_backward is not False:
        forward = case.forward(case.planted)
        assert kind_of(forward(*case.make_args(), **case.kwargs)) is None
    if case.kind == "nan" and name not in UNNAMED:
        found = first_nan(case)
        assert line_of(found, case) == case.line
        # Under `pmap` they name the primitive of a later NaN of the same line.
        if case.primitive is not None and not name.endswith("pmap"):
            assert found.prim == case.primitive


@pytest.mark.parametrize("name", [case.name for case in HEALTHY])
def test_every_healthy_function_is_finite(name):
    (case,) = [case for case in HEALTHY if case.name == name]
    assert kind_of(case.fn(*case.make_args())) is None
    if name not in UNNAMED:
        # No case is healthy only because there is nothing to discard.
        assert (first_nan(case) is not None) == case.makes_nan


@functools.cache
def origins() -> list[tuple[Fault, Any]]:
    """Each fault, and the origin that the debugger names."""
    debug = pytest.importorskip("optax_guard.debug")
    return [
        (case, debug.find_nonfinite(case.fn, *case.make_args(), **case.kwargs))
        for case in FAULTS
    ]


def report(missed: list[tuple[Fault, Any]]) -> str:
    return "\n".join(f"{case.name}, line {case.line}: {said}" for case, said in missed)


def is_named(case: Fault, origin: Any) -> bool:
    return (
        origin is not None
        and origin.filename.endswith("debug_faults.py")
        and (origin.line, origin.kind) == (case.line, case.kind)
    )


def test_healthy_functions_have_no_origin():
    debug = pytest.importorskip("optax_guard.debug")
    found = [
        (case.name, debug.find_nonfinite(case.fn, *case.make_args()))
        for case in HEALTHY
    ]
    assert len(HEALTHY) >= 40
    alarms = [f"{name}: {origin}" for name, origin in found if origin is not None]
    assert not alarms, "\n".join(alarms)


def test_faults_are_named_to_the_line():
    assert len(FAULTS) >= 60
    missed = [pair for pair in origins() if not is_named(*pair)]
    assert len(missed) <= 0.05 * len(FAULTS), report(missed)


def test_faults_that_are_named_are_described():
    wrong = [
        (case, origin)
        for case, origin in origins()
        if is_named(case, origin)
        and (
            case.primitive not in (None, origin.primitive)
            or case.iteration not in (None, tuple(origin.iteration))
            or case.is_backward not in (None, origin.is_backward)
            or MARK not in origin.source
            or origin.num_bad < 1
        )
    ]
    assert not wrong, report(wrong)
