"""Fields of states have the types, shapes and first values that their classes state."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_guard as og
from tests.test_early_stopping import everything, mixed_params, numpy_rule
from tests.test_laws import FORMS, SCOPES, THRESHOLDS, named, tree_of

# Together they have every class of states.
FORMS_OF_ALL = [
    *(named(scope, "zscore", "alone") for scope in SCOPES),
    *(named("leaf", threshold, "alone") for threshold in THRESHOLDS),
    *("value", "record", "guard with rules", "guard with a bound by leaf"),
    *("accumulate", "plateau"),
]
STOPPERS = [
    everything,
    lambda: og.early_stopping(numpy_rule(), smooth=og.stop.ema(0.5)),
    lambda: og.early_stopping(og.stop.skip_storm(3)),
]
NUM_CLASSES = 32

FIELD = re.compile(r"^  (\w+): (.*(?:\n   .*)*)", re.M)
TYPE = re.compile(r"\b(bool|u?int\d+|float\d+)\b(\[[^\]]*\])?")
FIRST = re.compile(r"(-?\d+) (?:after ``init``|at first)")


class Declared(NamedTuple):
    """What a class says of a field: its type may depend on an argument."""

    dtypes: list[str]
    shape: str | None
    first: str | None


def declared(cls: type) -> dict[str, Declared]:
    _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found = {}
    for name, words in FIELD.findall(text):
        line = " ".join(words.split())
        first = FIRST.search(line)
        if kinds := TYPE.findall(line):
            dtypes = [dtype for dtype, *_ in kinds]
            found[name] = Declared(dtypes, kinds[0][1] or None, first and first[1])
    return found


def states_in(tree: Any) -> Iterator[Any]:
    """Every state of this library, those inside of others too."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        if type(tree).__module__.startswith("optax_guard"):
            yield tree
        for part in tree:
            yield from states_in(part)


def fits(shape: tuple[int, ...], stated: str, sizes: dict[str, Any]) -> bool:
    """A first letter stands for any number of axes, and for the same everywhere."""
    names = [name.strip() for name in stated[1:-1].split(",") if name.strip()]
    if not names:
        return shape == ()
    rest = len(shape) - len(names) + 1
    parts = [shape[:rest], *((n,) for n in shape[rest:])]
    return rest >= 0 and all(
        part == ((int(name),) if name.isdecimal() else sizes.setdefault(name, part))
        for name, part in zip(names, parts, strict=True)
    )


def wrong_fields(state: Any) -> dict[str, str]:
    """The fields that are not as the class of a state says."""
    cls, sizes, wrong = type(state), {}, {}
    for name, stated in declared(cls).items():
        x = getattr(state, name)
        if not hasattr(x, "dtype"):
            continue
        is_right = x.dtype.name in stated.dtypes
        if stated.shape is not None:
            is_right &= fits(x.shape, stated.shape, sizes)
        if stated.first is not None and not isinstance(x, jax.ShapeDtypeStruct):
            is_right &= bool(np.all(np.asarray(x) == float(stated.first)))
        if not is_right:
            wrong[f"{cls.__name__}.{name}"] = f"{x} {x.dtype}{x.shape}, not {stated}"
    return wrong


def first_states(kind: str) -> tuple[list[Any], list[Any]]:
    transformations = [FORMS[name].built() for name in FORMS_OF_ALL]
    return (
        [tx.init(tree_of(kind)) for tx in transformations],
        [make().init(mixed_params()) for make in STOPPERS],
    )


def wrong_in(states: Any) -> dict[str, str]:
    found = list(states_in(states))
    assert len({type(state) for state in found}) == NUM_CLASSES
    wrong = {}
    for state in found:
        wrong |= wrong_fields(state)
    return wrong


def test_first_states_are_as_their_classes_say():
    assert wrong_in(jax.jit(lambda: first_states("mixed"))()) == {}


def test_types_are_the_same_with_doubles(x64):
    assert wrong_in(jax.eval_shape(lambda: first_states("x64"))) == {}


def test_field_that_is_not_as_stated_is_found():
    class State(NamedTuple):
        """Of a test.

        Attributes:
          count: int32[], steps; 1 at first.
          means: float32[S, 2], of
            the window.
          rows: float32[S], others.
          flag: Whether, bool.
        """

        count: Any = jnp.int32(1)
        means: Any = jnp.zeros((3, 2))
        rows: Any = jnp.zeros(3)
        flag: Any = jnp.array(False)

    assert wrong_fields(State()) == {}
    for name, bad in {
        "count": jnp.int32(0),
        "means": jnp.zeros((3, 1)),
        "rows": jnp.zeros(2),
        "flag": jnp.array(0),
    }.items():
        assert list(wrong_fields(State(**{name: bad}))) == [f"State.{name}"]
    assert not jax.tree.leaves(list(states_in({"a": (State(),)})))
