"""Every public transformation, crossed with every law that all of them keep."""

import dataclasses
import functools
import inspect
import math
import types
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_guard as og
from optax_guard._guarding.adoption import in_old_layout
from optax_guard._rows import entries_of
from tests.hlo import primitives
from tests.strategies import (
    HUGE,
    any_float,
    f32,
    ordinary,
    same_bits,
    sampled,
    structures,
    true_norm,
    types_of,
)
from tests.tiers import all_pairs

# The table of factories --------------------------------------------------------


class LastState(NamedTuple):
    """The updates that got through last."""

    last: Any


def _keep_last(updates: Any, state: Any, params: Any = None) -> Any:
    del state, params
    return updates, LastState(updates)


# What the guards below wrap: it changes no bit, and remembers what reached it.
LAST = optax.GradientTransformation(
    lambda params: LastState(jax.tree.map(jnp.zeros_like, params)), _keep_last
)


# What a form makes of finite updates with a number, in float64.
Oracle = Callable[[np.ndarray, float], np.ndarray]


def scaled(order: float) -> Oracle:
    """Clipping by a norm of that order."""

    def bounded(x: np.ndarray, limit: float) -> np.ndarray:
        norm = true_norm(x, order)
        return x * (limit / norm) if norm > limit else x

    return bounded


def cut(x: np.ndarray, limit: float) -> np.ndarray:
    """Clipping by value."""
    return np.clip(x, -limit, limit)


def in_parts(*ends: int) -> Oracle:
    """Clipping of each part by its own norm."""

    def bounded(x: np.ndarray, limit: float) -> np.ndarray:
        return np.concatenate([scaled(2)(part, limit) for part in np.split(x, ends)])

    return bounded


def first_part(end: int) -> Oracle:
    """Clipping of that part alone, by its own norm; the rest is left as it is."""

    def bounded(x: np.ndarray, limit: float) -> np.ndarray:
        return np.concatenate([scaled(2)(x[:end], limit), x[end:]])

    return bounded


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to call a public factory.

    `of(number)` builds it with a number that may be traced, where it takes one, and
    `oracle` is what it does at a first step. No form bounds a norm of 0.1 or less. A
    form that `watches` keeps statistics.
    """

    factory: str
    of: Callable[..., Any]
    number: float | None = None
    oracle: Oracle | None = None
    watches: bool = True

    def built(self) -> Any:
        tx = self.of() if self.number is None else self.of(self.number)
        return optax.with_extra_args_support(tx)

    @functools.cached_property
    def tx(self) -> Any:
        return self.built()


def halving(number: Any) -> optax.Schedule:
    return lambda count: number * jnp.exp2(-jnp.asarray(count, jnp.float32))


SPIKE = og.skip.spike(window=4, watch=("grad_norm", "value"))


def with_rules(c: Any) -> Any:
    return og.guard(
        LAST,
        og.threshold.zscore(warmup=2, max_norm=c),
        skip=[og.skip.norm_above(100.0 * c), SPIKE],
        max_consecutive_skips=3,
    )


def with_mask(c: Any) -> Any:
    return og.guard(LAST, c, mask=lambda tree: {name: name != "c" for name in tree})


def with_bound_by_leaf(ratio: Any) -> Any:
    bound = og.threshold.relative_to_params(ratio, start=ratio)
    return og.guard(LAST, max_update=og.clip_by_leaf_norm(bound))


def by_group(threshold: Any) -> Any:
    return og.clip_by_group_norm(
        {"first": threshold, "rest": threshold},
        lambda path: "first" if path == "a" else "rest",
    )


# Scope x threshold x action: every clip by a norm, with everything that its threshold
# may be, alone and in a guard. A scope comes with the oracle of what shares a norm.
SCOPES: dict[str, tuple[str, Callable[[Any], Any], Oracle | None]] = {
    "norm": ("clip_by_global_norm", og.clip_by_global_norm, scaled(2)),
    "leaf": ("clip_by_leaf_norm", og.clip_by_leaf_norm, in_parts(3, 7)),
    "group": ("clip_by_group_norm", by_group, in_parts(3)),
    # Here parameters and updates are about as long, which no such ratio bounds.
    "unit": ("clip_by_unit_norm", og.clip_by_unit_norm, None),
}
THRESHOLDS: dict[str, tuple[float, Callable[[Any], Any]]] = {
    "a number": (1.0, lambda c: c),
    "a schedule": (4.0, lambda c: halving(c)),
    "zscore": (2.0, lambda c: og.threshold.zscore(warmup=2, max_norm=c)),
    "quantile": (2.0, lambda c: og.threshold.quantile(0.9, warmup=2, max_norm=c)),
    "relative_to_mean": (
        2.0,
        lambda c: og.threshold.relative_to_mean(warmup=2, warmup_max_norm=c),
    ),
}


ACTIONS = ("alone", "guarded")


def named(scope: str, threshold: str, action: str) -> str:
    return f"{'guard of ' * (action == 'guarded')}{scope} by {threshold}"


def product() -> dict[str, Form]:
    forms = {}
    for scope, (factory, clip, oracle) in SCOPES.items():
        for name, (number, threshold) in THRESHOLDS.items():
            # Its warm-up is by the global norm in every scope, as AdaGC's is.
            expected = scaled(2) if name == "relative_to_mean" and oracle else oracle
            number = number if oracle else 1e3 * number
            bare, guarded = alone_and_guarded(clip, threshold)
            forms[named(scope, name, "alone")] = Form(factory, bare, number, expected)
            forms[named(scope, name, "guarded")] = Form(
                "guard", guarded, number, expected
            )
    return forms


def alone_and_guarded(clip: Callable, threshold: Callable) -> tuple[Callable, Callable]:
    def alone(c: Any) -> Any:
        return clip(threshold(c))

    return alone, lambda c: og.guard(LAST, clip=alone(c))


def of_order(ord: float, number: float) -> Form:
    return Form(
        "clip_by_global_norm",
        lambda c: og.clip_by_global_norm(c, ord=ord),
        number,
        scaled(ord),
    )


FORMS = product() | {
    "norm zero": Form(
        "clip_by_global_norm",
        lambda c: og.clip_by_global_norm(c, nonfinite="zero"),
        1.0,
        scaled(2),
    ),
    "norm of order 1": of_order(1, 1.0),
    "norm of order inf": of_order(math.inf, 0.5),
    "norm of order 3": of_order(3, 0.5),
    "value": Form("clip_by_value", lambda c: og.clip_by_value(c), 0.5, cut),
    "record": Form("record_norm", lambda: og.record_norm()),
    "guard": Form("guard", lambda: og.guard(LAST)),
    "guard of value": Form(
        "guard", lambda c: og.guard(LAST, clip=og.clip_by_value(c)), 0.5, cut
    ),
    "guard with rules": Form("guard", with_rules, 1.0, scaled(2)),
    "guard with a mask": Form("guard", with_mask, 1.0, first_part(7)),
    "guard with a bound": Form(
        "guard", lambda c: og.guard(LAST, max_update=c), 1.0, scaled(2)
    ),
    # Here parameters and updates are about as long, as for units.
    "guard with a bound by leaf": Form("guard", with_bound_by_leaf, 1.0),
    "auto": Form("auto", lambda: og.auto(LAST)),
    "accumulate": Form(
        "accumulate",
        lambda c: og.accumulate(og.guard(LAST, clip=c), 1),
        1.0,
        scaled(2),
    ),
    "plateau": Form("scale_by_plateau", og.stop.scale_by_plateau, watches=False),
}

# Published presets, as they become public.
LOOSE: Any = og
PRESETS = {
    "zclip": lambda: LOOSE.zclip(warmup_steps=2),
    "autoclip": lambda: LOOSE.autoclip(90.0),
    "adagc": lambda: LOOSE.adagc(lambda_abs=1e3),
}
FORMS |= {name: Form(name, of) for name, of in PRESETS.items() if hasattr(og, name)}

# One form of each factory that changes anything: for what needs a program of its own.
TYPICAL = {
    name: FORMS[name] for name in ("norm by a number", "value", "guard with rules")
}


ONE_GUARD = {"guard of norm by a number", "guard of norm by zscore"}
# `make test` runs of the product only these: every pair of a scope, a threshold and an
# action is among them. `make soak` runs the rest.
OTHERS = FORMS.keys() - product().keys()
SHORT = (
    OTHERS | ONE_GUARD | {named(*row) for row in all_pairs(SCOPES, THRESHOLDS, ACTIONS)}
)


def case(*values: Any, id: str, is_short: bool) -> Any:
    return pytest.param(*values, id=id, marks=[] if is_short else pytest.mark.soak)


def over(
    forms: dict[str, Form], short: Collection[str] = SHORT
) -> pytest.MarkDecorator:
    cases = [case(form, id=k, is_short=k in short) for k, form in forms.items()]
    return pytest.mark.parametrize("form", cases)


def over_forms_and(argument: str, values: Iterable[str]) -> pytest.MarkDecorator:
    """Every form with every value; `make test` runs every pair of two properties."""
    rows = all_pairs(SCOPES, THRESHOLDS, ACTIONS, values)
    short = {(named(*row), value) for *row, value in rows}
    cases = [
        case(
            *(form, value),
            id=f"{name}-{value}",
            is_short=name in OTHERS or (name, value) in short,
        )
        for name, form in FORMS.items()
        for value in values
    ]
    return pytest.mark.parametrize(("form", argument), cases)


# What is public and no transformation: the tests that hold its laws are elsewhere.
ELSEWHERE = {
    "test_adoption": {"wrap_state", "unwrap_state"},
    "test_readout": {
        "find_state",
        "find_states",
        "metrics",
        "raise_if_exhausted",
        "skipped_steps",
    },
    "test_guarding": {"apply_gradients", "keep_if_skipped"},
    "test_early_stopping": {"early_stopping", "explain"},
    "test_sketch": {"norm_quantile"},
    "test_scopes": {"leaf_norms"},
}
# Modules of rules and thresholds, which are parts of transformations.
RULES = {"skip", "stop", "threshold"}


def functions_of(module: Any) -> dict[str, Any]:
    """The public functions of a module; all of one that does not list them."""
    names = getattr(module, "__all__", None) or list(vars(module))
    named = {k: getattr(module, k) for k in names if not k.startswith("_")}
    return {k: v for k, v in named.items() if inspect.isfunction(v)}


def transformations_of(module: Any) -> set[str]:
    """Names of the functions that say they return a transformation."""

    def is_one(function: Any) -> bool:
        result = inspect.signature(function).return_annotation
        return inspect.isclass(result) and issubclass(
            result, optax.GradientTransformation
        )

    return {name for name, f in functions_of(module).items() if is_one(f)}


def in_the_table() -> set[str]:
    return {form.factory for form in FORMS.values()}


def test_no_public_factory_is_missing_from_the_table():
    modules = [og, *(getattr(og, name) for name in RULES)]
    assert set().union(*map(transformations_of, modules)) == in_the_table()


def test_factories_are_told_from_other_functions():
    module = types.ModuleType("module")
    module.__dict__.update(clip=og.clip_by_value, read=og.metrics, _clip=og.record_norm)
    assert transformations_of(module) == {"clip"}


def test_every_public_function_is_in_the_table_or_has_tests_of_its_own():
    # So that a factory that does not say what it returns is missed, too.
    tested = transformations_of(og).union(*ELSEWHERE.values())
    assert set(functions_of(og)) == tested


@pytest.mark.parametrize("module", sorted(RULES))
def test_modules_of_rules_exist_and_have_tests_of_their_own(module):
    assert isinstance(getattr(og, module), types.ModuleType)
    assert functions_of(getattr(og, module))


# Trees -------------------------------------------------------------------------

SHAPES = {"a": (3,), "b": (2, 2), "c": ()}
MIXED = dict(zip(SHAPES, (jnp.float32, jnp.bfloat16, jnp.float16), strict=True))
KINDS: dict[str, Any] = {
    "half": dict.fromkeys(SHAPES, jnp.bfloat16),
    "mixed": MIXED,
    "odd": {"a": jnp.complex64, "b": jnp.int32, "c": jnp.float32},
    "x64": {"a": jnp.float64, "b": jnp.float32, "c": jnp.bfloat16},
}


def tree_of(kind: str, value: float = 1.0) -> dict[str, Any]:
    tree: dict[str, Any] = {
        name: jnp.full(SHAPES[name], value, dtype)
        for name, dtype in KINDS[kind].items()
    }
    if kind == "odd":
        tree |= {"none": None, "empty": jnp.zeros((0, 2)), "hole": optax.MaskedNode()}
    return tree


def grads_of_norm(norm: float, seed: int = 0) -> dict[str, Any]:
    """Gradients of mixed dtypes with that Euclidean norm."""
    rng = np.random.default_rng(seed)
    tree = {name: f32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    scale = norm / true_norm(tree)
    return {name: jnp.asarray(x * scale, MIXED[name]) for name, x in tree.items()}


def poisoned(tree: Any, entry: float) -> Any:
    return tree | {"b": tree["b"].at[1, 0].set(entry)}


def drawn() -> st.SearchStrategy:
    """Gradients like those above, of any size and with any entries."""
    count = sum(math.prod(shape) for shape in SHAPES.values())

    def tree(values: list[float], scale: float) -> dict[str, Any]:
        leaves, start = {}, 0
        for name, shape in SHAPES.items():
            end = start + math.prod(shape)
            part = np.reshape(values[start:end], shape) * scale
            with np.errstate(over="ignore"):
                leaves[name] = jnp.asarray(part.astype(MIXED[name]))
            start = end
        return leaves

    values = st.one_of(ordinary(), any_float())
    # Of norms around the bounds, and of all sizes.
    return st.builds(
        tree,
        st.lists(values, min_size=count, max_size=count),
        st.sampled_from([1.0, 1e-3, 1e30]),
    )


def close(a: Any, b: Any, rtol: float = 1e-6) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # As near as the leaf's own dtype allows: two bits of it, or `rtol`.
        is_float = jnp.issubdtype(x.dtype, jnp.inexact)
        eps = float(jnp.finfo(x.dtype).eps) if is_float else 0.0
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=max(rtol, 2 * eps), atol=1e-30)


# One compiled step a form ------------------------------------------------------


class Step:
    """A jitted, donated step of one form on mixed dtypes, compiled once."""

    def __init__(self, form: Form):
        self.tx = form.tx
        # Alone it lets bad updates reach the parameters, which it reads.
        self.moves = form.factory != "clip_by_unit_norm"
        self.traces = 0
        self.run = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: Any, state: Any, grads: Any, value: Any) -> Any:
        self.traces += 1
        updates, state = self.tx.update(grads, state, params, value=value)
        if self.moves:
            params = optax.apply_updates(params, updates)
        return params, state, updates

    def after(self, sequence: list[Any]) -> tuple[Any, Any]:
        """Updates of the last, and state after all; nothing is moved by the way."""
        params = tree_of("mixed")
        state, value = self.tx.init(params), jnp.float32(0.5)
        updates = None
        with jax.transfer_guard("disallow"), warnings.catch_warnings():
            # Also those of buffers that could not be donated.
            warnings.simplefilter("error")
            for grads in sequence:
                params, state, updates = self.run(params, state, grads, value)
        return updates, state


@functools.cache
def step_of(name: str) -> Step:
    return Step(FORMS[name])


def over_names(names: Iterable[str]) -> pytest.MarkDecorator:
    cases = [
        pytest.param(
            name,
            id=name,
            # A compiled step is kept, so the tests of a form share a process.
            marks=[
                pytest.mark.xdist_group(name),
                *([] if name in SHORT else [pytest.mark.soak]),
            ],
        )
        for name in names
    ]
    return pytest.mark.parametrize("name", cases)


by_name = over_names(FORMS)

SMALL = grads_of_norm(0.05)
LARGE = grads_of_norm(20.0, seed=1)
MIDDLE = grads_of_norm(0.04, seed=2)


# Laws of types -----------------------------------------------------------------


@over_forms_and("kind", KINDS)
def test_types_of_the_state_never_change(form, kind, request):
    """So loops, conditions and scans, which compare types, take it."""
    if kind == "x64":
        request.getfixturevalue("x64")
    params = tree_of(kind)
    # Built anew: a threshold made before x64 is another one.
    tx = form.built()
    state = tx.init(params)
    value = jnp.zeros((), jnp.float32)
    # Nothing is compiled.
    with jax.numpy_dtype_promotion("strict"):
        updates, after = jax.eval_shape(tx.update, params, state, params, value=value)
        traced = jax.eval_shape(tx.init, params)
    assert types_of(after) == types_of(traced) == types_of(state)
    assert types_of(updates) == types_of(params)


@over(TYPICAL)
def test_types_of_the_state_never_change_in_a_batch(form):
    params = tree_of("mixed")
    many, states = jax.tree.map(
        lambda x: jnp.stack([x, x]), (params, form.tx.init(params))
    )
    value = jnp.zeros((), jnp.float32)
    _, after = jax.eval_shape(
        jax.vmap(lambda p, s: form.tx.update(p, s, p, value=value)), many, states
    )
    assert types_of(after) == types_of(states)


@by_name
def test_types_of_the_state_never_change_when_run(name):
    params = tree_of("mixed")
    updates, state = step_of(name).after([SMALL, LARGE])
    assert types_of(state) == types_of(FORMS[name].tx.init(params))
    assert types_of(updates) == types_of(params)


@over(FORMS)
def test_no_two_leaves_of_an_initial_state_share_a_buffer(form):
    params = tree_of("mixed")
    leaves = [x for x in jax.tree.leaves((params, form.tx.init(params))) if x.size]
    addresses = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(addresses)) == len(addresses)


# Laws of values ----------------------------------------------------------------


@by_name
def test_at_or_under_the_threshold_updates_keep_their_bits(name):
    odd = poisoned(SMALL, -0.0) | {"a": f32([1e-45, -1e-40, 0.05])}
    odd = jax.tree.map(jnp.asarray, odd)
    # A scale that is one may still flush denormals.
    trees = (SMALL, odd) if FORMS[name].watches else (SMALL,)
    for grads in (*trees, jax.tree.map(jnp.zeros_like, SMALL)):
        updates, state = step_of(name).after([grads])
        assert same_bits(updates, grads)
        for last in og.find_states(state, LastState):
            assert same_bits(last.last, grads)


@pytest.mark.parametrize(
    "name", ["norm by a number", "norm by zscore", "guard of norm by a number"]
)
def test_norm_is_that_of_optax_and_what_is_clipped_equals_optax(name):
    # Optax sums in the dtype of the leaf; in float32 it is an oracle.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), LARGE)
    clip = optax.clip_by_global_norm(FORMS[name].number or math.nan)
    theirs, _ = clip.update(wide, clip.init(wide))
    updates, state = step_of(name).after([LARGE])
    close(og.metrics(state)["grad_norm"], optax.tree.norm(wide))
    close(updates, jax.tree.map(lambda x, g: x.astype(g.dtype), theirs, LARGE))


# What describes the last step, or counts steps: of all steps, the bad ones too.
RECORDS = {
    # A leaf that is finite is watched even where another one is not.
    *entries_of(og.GroupStats),
    "group_sketch",
    "num_updates",
    "num_clipped",
    "num_nonfinite",
    "num_skipped",
    "skip_streak",
    "skip_reason",
    "guard_exhausted",
    "num_vanished",
    "rejections",
    "group_seen",
    "group_kept",
    "num_groups",
    "num_micro_batches",
    "num_dropped",
    "drop_reason",
}


def learned(state: Any) -> dict[str, Any]:
    """Every number of a state that is no record, by its path."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(in_old_layout(state))
        if not any(getattr(key, "name", None) in RECORDS for key in path)
    }


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@by_name
def test_non_finite_updates_teach_nothing(name, entry):
    step = step_of(name)
    bad = poisoned(LARGE, entry)
    expected, without = step.after([SMALL, MIDDLE, SMALL])
    updates, state = step.after([SMALL, bad, bad, MIDDLE, bad, SMALL])
    # Neither in a mean nor in a window, an accumulator or a threshold: as if they had
    # never been.
    for (path, x), y in zip(
        learned(state).items(), learned(without).values(), strict=True
    ):
        assert same_bits(x, y), path
    assert same_bits(updates, expected)
    if FORMS[name].watches:
        assert og.metrics(state)["nonfinite_rate"] == 0.5


# Gradients, and a loss, none of which a record can hold as a number of float32.
FAULTS = {
    "NaN": (poisoned(SMALL, math.nan), 0.5),
    "Inf": (poisoned(SMALL, math.inf), 0.5),
    "-Inf": (poisoned(SMALL, -math.inf), 0.5),
    "huge": (SMALL | {"a": jnp.full(SHAPES["a"], 3e38, jnp.float32)}, 0.5),
    "1e38": (SMALL | {"a": jnp.full(SHAPES["a"], 1e38, jnp.float32)}, 0.5),
    "value NaN": (SMALL, math.nan),
    "value -Inf": (SMALL, -math.inf),
}
ORDERS = {"norm of order 1": 1, "norm of order inf": math.inf, "norm of order 3": 3}


def check_finite(state: Any) -> None:
    """Of all that is not what the optimizer inside has kept."""

    def is_inner(x: Any) -> bool:
        return isinstance(x, LastState)

    for path, x in jax.tree.leaves_with_path(state, is_leaf=is_inner):
        assert is_inner(x) or np.all(np.isfinite(x)), jax.tree_util.keystr(path)


@by_name
def test_all_that_is_added_to_a_state_is_finite_and_faults_are_read_all_the_same(name):
    step = step_of(name)
    params = tree_of("mixed")
    state = step.tx.init(params)
    check_finite(state)
    for grads, value in FAULTS.values():
        for each, loss in ((SMALL, 0.5), (grads, value)):
            loss = jnp.float32(loss)
            with jax.transfer_guard("disallow"):  # As in `Step.after`: one program.
                params, state, _ = step.run(params, state, each, loss)
            check_finite(state)
        if not FORMS[name].watches:
            continue
        norm = true_norm(counted(name, grads), ORDERS.get(name, 2))
        if name in ORDERS and ORDERS[name] > 2 and math.isnan(norm):
            norm = math.inf  # Norms by the largest entry take a NaN for an infinity.
        with np.errstate(over="ignore"):
            expected = np.float32(norm)
        np.testing.assert_allclose(og.metrics(state)["grad_norm"], expected, 1e-5)
        if found := og.find_states(state, og.GuardState):
            if not math.isfinite(value):
                np.testing.assert_equal(og.skipped_steps(found[0])[-1].value, value)
            assert found[0].skip_reason != 0 or math.isfinite(norm)


def counted(name: str, grads: Any) -> Any:
    return {k: x for k, x in grads.items() if k != "c"} if "mask" in name else grads


@by_name
def test_only_guards_skip_non_finite_updates(name):
    updates, state = step_of(name).after([SMALL, poisoned(SMALL, math.nan)])
    is_guard = FORMS[name].factory in ("guard", "auto", "accumulate")
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    if is_guard or name == "norm zero":
        assert same_bits(updates, zeros)
    else:
        assert same_bits(updates, poisoned(SMALL, math.nan))
    assert bool(og.find_states(state, og.GuardState)) == is_guard


# What a guard clips with is what the clip does alone. Entries that are masked out are
# neither judged nor bounded: see `test_masking`.
WITH_ORACLE = [
    name
    for name, form in FORMS.items()
    if form.oracle
    and name != "guard with a mask"
    and ("guard of" not in name or name in ONE_GUARD)
]


@over_names([*WITH_ORACLE, "record", "guard"])
def test_any_first_updates_are_bounded_as_in_float64(name):
    form, step = FORMS[name], step_of(name)

    # Inside, so that all draws are of one program, which other laws run as well.
    @settings(sampled, max_examples=8)
    @given(grads=drawn())
    def check(grads: Any) -> None:
        updates, state = step.after([grads])
        assert types_of(updates) == types_of(grads)
        entries, norm = flat(grads), true_norm(grads)
        skipped = og.find_states(state, og.GuardState)
        if any(guard.num_skipped for guard in skipped):
            # Float32 cannot hold the square of what is larger.
            limit = 100.0 if name == "guard with rules" else math.sqrt(HUGE)
            assert not norm <= limit * (1 - 1e-6)
            assert same_bits(updates, jax.tree.map(jnp.zeros_like, grads))
        elif not norm <= HUGE:
            assert not skipped or np.isfinite(entries).all()
            assert np.all(np.isfinite(flat(updates)) | ~np.isfinite(entries))
        else:
            expected = bounded(form, grads, form.number)
            if np.array_equal(expected, entries):
                assert same_bits(updates, grads)
            ends = np.cumsum([x.size for x in jax.tree.leaves(updates)])
            parts = np.split(expected, ends[:-1])
            for x, wanted in zip(jax.tree.leaves(updates), parts, strict=True):
                # Where the coefficient is below 2**-100, what is far smaller than the
                # bound is lost; so is, in half precision, what is no normal number.
                eps, tiny = map(
                    float, (jnp.finfo(x.dtype).eps, jnp.finfo(x.dtype).tiny)
                )
                rtol, atol = max(1e-5, 2 * eps), max(1e-31, tiny)
                np.testing.assert_allclose(flat(x), wanted, rtol=rtol, atol=atol)

    check()


ON_ANY_TREE = [
    "leaf by zscore",
    "unit by quantile",
    "value",
    "guard with rules",
    "accumulate",
    "record",
]


@pytest.mark.parametrize("name", ON_ANY_TREE)
@settings(sampled, max_examples=6)
@given(tree=structures())
def test_types_never_change_on_any_tree(name, tree):
    tx = FORMS[name].tx
    state = jax.eval_shape(tx.init, tree)
    updates, after = jax.eval_shape(tx.update, tree, state, tree)
    assert types_of(after) == types_of(state)
    assert types_of(updates) == types_of(jax.eval_shape(lambda x: x, tree))


# Laws of programs --------------------------------------------------------------


@by_name
def test_step_is_traced_once(name):
    step = step_of(name)
    step.after([SMALL, LARGE, poisoned(LARGE, math.nan)])
    assert step.traces == 1


def talks_to_the_host(name: str) -> bool:
    words = ("callback", "infeed", "outfeed", "debug")
    return any(word in name for word in words)


@over(FORMS)
def test_step_does_not_call_the_host(form):
    params = tree_of("mixed")
    jaxpr = jax.make_jaxpr(form.tx.update)(params, form.tx.init(params), params)
    assert not any(map(talks_to_the_host, primitives(jaxpr.jaxpr)))


def test_a_call_of_the_host_in_a_branch_is_found():
    def call(x: Any) -> Any:
        jax.debug.print("{}", x)
        return x

    jaxpr = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, call, lambda x: x, x))(1.0)
    assert any(map(talks_to_the_host, primitives(jaxpr.jaxpr)))


# Traced numbers, and derivatives -----------------------------------------------

# Norms of gradients: at zero, below what float32 squares, under and over the bounds.
NORMS = (0.0, 1e-30, 0.04, 20.0, 1e10)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(tree)])


def bounded(form: Form, tree: Any, number: float | None) -> np.ndarray:
    if form.oracle is None or number is None:
        return flat(tree)
    return form.oracle(flat(tree), number)


# A guard has the derivatives of its clip, and all guards have theirs alike. `make test`
# takes every threshold in one scope, and every scope with one threshold.
# The preset takes no number, and bounds by the parameters, which here are gradients.
@over(
    {
        n: form
        for n, form in FORMS.items()
        if n != "auto" and (n in ONE_GUARD or "guard of" not in n)
    },
    short=OTHERS | {n for n in product() if "norm by" in n or "by a number" in n},
)
def test_numbers_may_be_traced_and_derivatives_are_finite(form):
    unit = wide(grads_of_norm(1.0, seed=3))
    weights = wide(grads_of_norm(1.0, seed=4))

    def weighted(size: jax.Array, number: jax.Array) -> Any:
        tx = form.tx if form.number is None else form.of(number)
        grads = jax.tree.map(lambda x: x * size, unit)
        updates, _ = tx.update(grads, tx.init(grads), grads, value=size)
        products = jax.tree.map(lambda x, w: jnp.sum(x * w), updates, weights)
        return sum(jax.tree.leaves(products)), updates

    number = form.number or 1.0
    numbers = f32([number, 3 * number])
    # All pairs of a norm and a number, in one program.
    slope = jax.vmap(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    pairs = np.repeat(f32(NORMS), 2), np.tile(numbers, len(NORMS))
    slopes, updates = jax.tree.map(
        lambda x: x.reshape(len(NORMS), 2, *x.shape[1:]), jax.jit(slope)(*pairs)
    )
    assert np.all(np.isfinite(slopes[0]))
    assert np.all(np.isfinite(slopes[1]))
    # Under the bound the slope is that of the weighted sum itself; above it, where the
    # length is held, hardly any, but one in the number.
    is_clip = form.oracle is not None
    inside = flat(unit) @ flat(weights)
    np.testing.assert_allclose(slopes[0][2], inside, rtol=1e-5)
    assert np.all(slopes[1][2] == 0)
    assert np.any(slopes[1][3] != 0) == is_clip
    for i, norm in enumerate(NORMS[:-1]):
        grads = jax.tree.map(lambda x, c=norm: x * c, unit)
        for j, limit in enumerate(numbers):
            got = jax.tree.map(lambda x, i=i, j=j: x[i, j], updates)
            expected = bounded(form, grads, float(limit))
            np.testing.assert_allclose(flat(got), expected, rtol=1e-5, atol=0)


# Inside other transformations --------------------------------------------------

PARTS = {"a": True, "b": True, "c": False}
LABELS = {"a": "bounded", "b": "bounded", "c": "other"}

WRAPPERS: dict[str, Callable[[Form], Any]] = {
    "chain": lambda form: optax.chain(optax.scale(1.0), form.tx, optax.identity()),
    "masked": lambda form: optax.masked(form.tx, PARTS),
    "partition": lambda form: optax.partition(
        {"bounded": form.tx, "other": optax.identity()}, LABELS
    ),
    "MultiSteps": lambda form: optax.MultiSteps(form.tx, 2).gradient_transformation(),
    "inject_hyperparams": lambda form: (
        optax.inject_hyperparams(form.of)()
        if form.number is None
        else optax.inject_hyperparams(form.of)(form.number)
    ),
}


@over_forms_and("wrapper", WRAPPERS)
def test_types_never_change_inside_other_transformations(form, wrapper):
    params = tree_of("mixed")
    tx = WRAPPERS[wrapper](form)
    state = tx.init(params)

    def loop(params: Any, state: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            updates, state = tx.update(params, state, params, value=jnp.float32(0))
            return state, updates

        return jax.lax.scan(step, state, length=2)

    after, updates = jax.eval_shape(loop, params, state)
    assert types_of(after) == types_of(state)
    expected = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    assert types_of(updates) == types_of(expected)
    assert bool(og.find_states(state, og.NormStats)) == form.watches


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@over(TYPICAL)
def test_bounds_are_kept_inside_other_transformations(form, wrapper):
    tx = WRAPPERS[wrapper](form)
    update = jax.jit(tx.update)
    grads = wide(LARGE)
    state = tx.init(grads)
    updates = None
    for _ in range(2 if wrapper == "MultiSteps" else 1):
        updates, state = update(grads, state, grads, value=jnp.float32(0))
    assert isinstance(updates, dict)
    if wrapper in ("masked", "partition"):
        assert same_bits(updates.pop("c"), grads.pop("c"))
    expected = bounded(form, grads, form.number)
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-5)
    assert og.metrics(state)["grad_norm"] == pytest.approx(
        true_norm(grads), rel=1e-6, abs=0
    )


@over(TYPICAL)
def test_train_state_of_flax_takes_it(form):
    train_state = pytest.importorskip("flax.training.train_state")
    grads = wide(LARGE)
    state = train_state.TrainState.create(
        apply_fn=str, params=jax.tree.map(jnp.zeros_like, grads), tx=form.tx
    )
    state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
    expected = bounded(form, grads, form.number)
    np.testing.assert_allclose(flat(state.params), expected, rtol=1e-5)
    assert og.metrics(state)["num_updates"] == 1


@over(TYPICAL)
def test_nnx_optimizer_takes_it(form):
    nnx = pytest.importorskip("flax.nnx")
    grads = wide(LARGE)

    class Model(nnx.Module):
        def __init__(self):
            for name, x in grads.items():
                setattr(self, name, nnx.Param(jnp.zeros_like(x)))

    model = Model()
    optimizer = nnx.Optimizer(model, form.tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, value: Any) -> None:
        state = nnx.state(model, nnx.Param)
        for name, x in grads.items():
            state[name] = state[name].replace(x)
        optimizer.update(model, state, value=value)

    step(model, optimizer, jnp.float32(0.5))
    expected = bounded(form, grads, form.number)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(flat(params), expected, rtol=1e-5)
    assert og.metrics(optimizer)["num_updates"] == 1


# On and off --------------------------------------------------------------------


def losses_of(tx: Any, is_one_pass: bool = False, num_steps: int = 30) -> np.ndarray:
    """Losses of a small regression on clean data, step by step."""
    rng = np.random.default_rng(5)
    x, y = f32(rng.normal(size=(16, 4))), f32(rng.normal(size=16))
    params = {"kernel": jnp.zeros(4), "bias": jnp.zeros(())}

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params)
        if is_one_pass:
            params, state = og.apply_gradients(
                tx, params, state, grads=grads, value=loss
            )
        else:
            update = optax.with_extra_args_support(tx).update
            updates, state = update(grads, state, params, value=loss)
            params = optax.apply_updates(params, updates)
        return params, state, loss

    state, losses = tx.init(params), []
    for _ in range(num_steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    return np.array(losses)


INNER = optax.adamw(optax.cosine_decay_schedule(0.1, 40), weight_decay=0.01)
RULES_THAT_WATCH = [
    og.skip.norm_above(1e3),
    og.skip.spike(1e3, watch=("grad_norm", "value")),
]


ON = {
    "guard": (og.guard(INNER), False),
    "guard in one pass": (og.guard(INNER), True),
    "rules": (og.guard(INNER, clip=1e3, skip=RULES_THAT_WATCH), True),
    "norm": (optax.chain(og.clip_by_global_norm(1e3), INNER), False),
    "value": (optax.chain(og.clip_by_value(1e3), og.record_norm(), INNER), False),
}


@functools.cache
def losses_off(is_jitted: bool) -> np.ndarray:
    return losses_of(INNER) if is_jitted else losses_of(INNER, num_steps=5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(k, marks=[pytest.mark.full] if k in ("guard", "value") else [])
        for k in ON
    ],
)
def test_on_clean_data_losses_on_and_off_are_identical(name):
    # One operation at a time, because a compiler that fuses more rounds less.
    with jax.disable_jit():
        np.testing.assert_array_equal(losses_of(*ON[name], 5), losses_off(False))


@pytest.mark.parametrize("name", ["guard in one pass", "norm"])
def test_on_clean_data_compiled_losses_on_and_off_agree(name):
    np.testing.assert_allclose(losses_of(*ON[name]), losses_off(True), rtol=1e-6)
