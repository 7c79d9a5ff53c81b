"""Numbers are checked if they are concrete, whether Python's, NumPy's or JAX's."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from optax_guard import _checks
from optax_guard._checks import is_concrete, static_count, static_number
from optax_guard.flax import TrainState, fit
from optax_guard.loops import train_on_device
from optax_guard.skip._spike import SpikeState

SGD = optax.sgd(1.0)


def as_any(number: Any) -> Any:
    """A number for an argument that is annotated as Python's."""
    return number


def traces(f: Callable[..., Any], *args: Any) -> None:
    """Runs ``f`` under a trace, which compiles nothing."""

    def run(*args: Any) -> None:
        f(*args)

    jax.eval_shape(run, *args)


# What is concrete ------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [2, -1.5, math.nan, np.float32(2), np.array(2), [1], "text", None],
    ids=repr,
)
def test_values_of_python_and_numpy_are_concrete(value):
    assert is_concrete(value)


def test_arguments_of_a_traced_function_are_not_concrete():
    seen = []

    def f(x: jax.Array) -> jax.Array:
        seen.append(is_concrete(x))
        return x

    for transform in (jax.make_jaxpr, jax.vmap, jax.grad):
        argument = jnp.ones(2) if transform is jax.vmap else jnp.ones(())
        transform(f)(argument)
    assert seen == [False] * 3


def test_an_array_that_a_traced_function_closes_over_is_concrete():
    number = jnp.float32(2.0)
    seen = []

    def f(x: jax.Array) -> jax.Array:
        seen.extend([is_concrete(number), is_concrete(number + 1)])
        with jax.ensure_compile_time_eval():
            seen.append(is_concrete(number + 1))
        return x

    jax.make_jaxpr(f)(1.0)
    assert seen == [True, False, True]


def test_an_array_that_is_partly_elsewhere_is_taken_for_traced(monkeypatch):
    mesh = jax.make_mesh((8,), ("d",))
    spread = jax.device_put(-1.0, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match=r"`clip` must be positive, got -1\.0"):
        og.guard(SGD, clip=spread)
    # As it is where other processes hold some of the devices.
    monkeypatch.setattr(type(spread), "is_fully_addressable", False)
    assert not is_concrete(spread)
    og.guard(SGD, clip=spread)
    with pytest.raises(TypeError, match="`n` must be known while tracing"):
        static_count("n", spread)


# All forms of a number --------------------------------------------------------------

FLOATS = (np.float16, np.float32, np.float64, np.asarray)
FLOATS += (jnp.bfloat16, jnp.float16, jnp.float32, jnp.asarray)
WHOLE = (np.int8, np.int64, np.asarray, jnp.int8, jnp.int32, jnp.asarray, jnp.float32)
PARTS, COUNTS = (-1.0, 0.0, 0.5, 1.5, math.inf, math.nan), (-1, 0, 1, 2, 3)
FORMS: list[tuple[Any, Any]] = [
    *((form(x), x) for x in PARTS for form in FLOATS),
    *((form(x), x) for x in COUNTS for form in WHOLE),
    *((x, x) for x in PARTS + COUNTS),
    (np.uint64(2**63), 2**63),
    (np.int64(2**31), 2**31),
    (jnp.uint32(2**31), 2**31),
]


def is_whole(x: float) -> bool:
    return x == x and x not in (math.inf, -math.inf) and x == int(x)


# A check, and the numbers that it lets pass.
CHECKS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    "positive": (lambda x: _checks.check_positive("n", x), lambda x: x > 0),
    "not negative": (lambda x: _checks.check_not_negative("n", x), lambda x: x >= 0),
    "not NaN": (lambda x: _checks.check_not_nan("n", x), lambda x: not math.isnan(x)),
    "above": (lambda x: _checks.check_above("n", x, 1, ""), lambda x: x > 1),
    "range": (lambda x: _checks.check_range("n", x, 0, 1), lambda x: 0 <= x <= 1),
    "fraction": (lambda x: _checks.check_fraction("n", x), lambda x: 0 < x < 1),
    "fraction or zero": (
        lambda x: _checks.check_fraction("n", x, or_zero=True),
        lambda x: 0 <= x < 1,
    ),
    "count": (
        lambda x: _checks.check_count("n", x),
        lambda x: is_whole(x) and 1 <= x < 2**31,
    ),
    "count from 0": (
        lambda x: _checks.check_count("n", x, least=0),
        lambda x: is_whole(x) and 0 <= x < 2**31,
    ),
    "static count": (
        lambda x: static_count("n", x, least=2),
        lambda x: is_whole(x) and 2 <= x < 2**31,
    ),
    "number": (lambda x: _checks.check_number("n", x), lambda x: True),
}


def passes(check: Callable[[Any], Any], value: Any) -> bool:
    try:
        check(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_compares_every_form_of_a_number_as_python_does(name):
    check, expected = CHECKS[name]
    for value, number in FORMS:
        assert passes(check, value) == expected(number), (value, type(value))


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_compares_under_a_trace_what_is_concrete(name):
    check, expected = CHECKS[name]

    def compare() -> None:
        for value, number in FORMS:
            assert passes(check, value) == expected(number), (value, type(value))

    traces(compare)


@pytest.mark.parametrize("name", [x for x in CHECKS if x != "static count"])
def test_a_traced_number_passes_a_check(name):
    check, _ = CHECKS[name]
    for number in (-1, 0, 2**31 - 1, -1.0, math.nan):
        traces(check, number)


def test_a_double_is_compared_in_double_precision(x64):
    almost = np.nextafter(1.0, 0.0)
    for value in (almost, jnp.asarray(almost)):
        assert value.dtype == np.float64
        _checks.check_fraction("n", value)
        with pytest.raises(ValueError, match="`n` must be above 1"):
            _checks.check_above("n", value, 1, "")
    with pytest.raises(ValueError, match=f"`n` must be at most {2**31 - 1}"):
        _checks.check_count("n", jnp.asarray(2**40))


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (True, TypeError),
        (np.True_, TypeError),
        (jnp.array(True), TypeError),
        (np.timedelta64(1, "s"), TypeError),
        (jax.random.key(0), TypeError),
        ("1", TypeError),
        (1j, ValueError),
        (np.complex64(1), ValueError),
        (jnp.complex64(1), ValueError),
        (np.ones(1), ValueError),
        (jnp.ones(1), ValueError),
        (10**400, ValueError),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else repr(x)[:20],
)
def test_what_is_not_one_real_number_is_refused_by_every_check(value, error):
    for check, _ in CHECKS.values():
        with pytest.raises(error, match="`n` must be"):
            check(value)


def test_a_flag_is_a_bool_of_python_numpy_or_jax():
    for value in (True, np.False_, np.array(True), jnp.array(False)):
        _checks.check_flag("flag", value)
    for value in (1, np.int32(1), jnp.int32(0), np.ones(1, bool), jnp.ones(1, bool)):
        with pytest.raises(TypeError, match="`flag` must be True or False"):
            _checks.check_flag("flag", value)
    with pytest.raises(TypeError, match="`flag` must be True or False"):
        traces(lambda x: _checks.check_flag("flag", x), True)


# Numbers that decide a shape --------------------------------------------------------


def test_a_static_number_becomes_pythons():
    for value in (3, np.int8(3), np.array(3), jnp.int32(3), jnp.float32(3), 3.0):
        assert type(static_count("n", value)) is int
    for value in (0.5, np.float32(0.5), jnp.bfloat16(0.5)):
        assert type(static_number("n", value, "it is")) is float
    with pytest.raises(TypeError, match=r"`n` must be known .* it is, .*static_arg"):
        traces(lambda x: static_number("n", x, "it is"), 0.5)


SIZED: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "lag": (lambda k: og.stop.lag(k).init(), 3),
    "overfitting": (lambda k: og.stop.overfitting(k).init(), 3),
    "progress_quotient": (lambda k: og.stop.progress_quotient(1.0, k).init(), 3),
    "median": (lambda k: og.stop.median(k).init(), 3),
    "spike": (lambda n: og.skip.spike(window=n).start(), 8),
    "quantile": (
        lambda e: og.threshold.quantile(0.5, relative_error=e).start(()),
        0.5,
    ),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_size_is_pythons_numpys_or_jaxs_and_never_traced(name):
    make, number = SIZED[name]
    dtype = np.int32 if isinstance(number, int) else np.float32
    expected = jax.eval_shape(lambda: make(number))
    for form in (dtype(number), np.array(number, dtype), jnp.asarray(number, dtype)):
        assert jax.eval_shape(lambda form=form: make(form)) == expected
    with pytest.raises(TypeError, match="must be known while tracing"):
        jax.eval_shape(make, number)


def test_an_order_is_pythons_numpys_or_jaxs():
    for ord in (1, np.int32(1), jnp.int32(1), jnp.float32(1)):
        clip: Any = og.clip_by_global_norm(1.0, ord=ord)
        _, state = clip.update(jnp.array([3.0, -4.0]), clip.init(jnp.ones(2)))
        assert state.stats.grad_norm == 7.0


def test_a_device_loop_takes_numpys_and_jaxs_lengths():
    pytest.importorskip("flax")
    from optax_guard.flax import TrainState
    from optax_guard.loops import train_on_device

    tx = og.guard(optax.sgd(0.1))
    state = TrainState.create(apply_fn=str, params=jnp.ones(()), tx=tx)
    result = train_on_device(
        state,
        lambda state, batch: (state.apply_gradients(grads=batch), batch),
        lambda step: jnp.float32(1),
        num_steps=as_any(jnp.int32(3)),
        eval_every=as_any(np.int64(2)),
    )
    assert [row["step"] for row in result.history] == [2, 3]


# What users met ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1.0, math.nan])
@pytest.mark.parametrize(
    "form", [float, np.float32, jnp.float32], ids=["Python", "NumPy", "JAX"]
)
def test_a_clip_that_is_no_positive_number_is_refused_in_every_form(form, bad):
    with pytest.raises(ValueError, match=f"`clip` must be positive, got {bad}"):
        og.guard(SGD, clip=form(bad))
    number = form(bad)
    with pytest.raises(ValueError, match=f"`clip` must be positive, got {bad}"):
        traces(lambda: og.guard(SGD, clip=number))


def test_every_form_of_a_threshold_clips_alike():
    grads, params = jnp.array([3.0, 4.0]), jnp.zeros(2)
    for max_norm in (2, 2.0, np.float64(2), np.int32(2), jnp.float32(2), jnp.int32(2)):
        tx: Any = og.guard(SGD, clip=max_norm)
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates, [-1.2, -1.6], 1e-6)


def test_bounds_of_jax_that_are_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"`min_value` must be less .* 2\.0 and 1\.0"):
        og.clip_by_value(jnp.float32(1), min_value=jnp.float32(2))
    low, high = jnp.float32(2), np.float32(1)
    with pytest.raises(ValueError, match="`min_value` must be less"):
        traces(lambda: og.clip_by_value(high, min_value=low))
    traces(lambda low: og.clip_by_value(1.0, min_value=low), 2.0)


def test_injected_numbers_are_checked_in_init_and_traced_in_update():
    make = optax.inject_hyperparams(og.clip_by_global_norm)
    params = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`max_norm` must be positive, got -1\.0"):
        make(max_norm=-1.0).init(params)
    tx = make(max_norm=2.0)
    state: Any = tx.init(params)
    state.hyperparams["max_norm"] = jnp.float32(5.0)
    updates, _ = jax.jit(tx.update)(jnp.array([6.0, 8.0]), state)
    np.testing.assert_allclose(updates, [3.0, 4.0], 1e-6)


def test_thresholds_of_a_batch_are_traced():
    def clipped(max_norm: jax.Array) -> Any:
        tx = og.clip_by_global_norm(max_norm)
        return tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.ones(2)))[0]

    found = jax.vmap(clipped)(jnp.array([2.5, -1.0, 9.0]))
    np.testing.assert_allclose(found, [[1.5, 2.0], [0.0, 0.0], [3.0, 4.0]], 1e-6)


def test_patience_of_jax_is_compared_under_a_trace():
    patience = as_any(jnp.int32(2))
    traces(lambda: og.stop.from_keras(patience=patience).init())
    traces(lambda: og.stop.from_lightning("loss", patience=patience).init())
    with pytest.raises(TypeError, match="`patience` must be known while tracing"):
        traces(lambda n: og.stop.from_keras(patience=n), 2)


def test_a_value_that_is_a_bool_is_refused_in_every_form():
    stopper = og.early_stopping(og.stop.patience(2))
    for value in (True, np.True_, jnp.array(True)):
        with pytest.raises(TypeError, match="`value` must be a number"):
            stopper.update(value, stopper.init())


LARGE = [2**31, -(2**40), 2**70, np.int64(2**40), np.array(2**40), np.uint64(2**63)]


def test_a_loss_beyond_32_bits_is_judged_as_a_float():
    # JAX refuses such a number of Python, and takes 2**40 of NumPy's for 0.
    stopper = og.early_stopping(og.stop.patience(2))
    guarded = og.guard(SGD, skip=og.skip.spike(window=2, watch="value"))
    params = jnp.ones(2)
    accumulated: Any = og.accumulate(guarded, 2)
    for number in LARGE:
        expected = float(np.float32(number))
        state = stopper.update(number, stopper.init(), seconds=abs(as_any(number)))
        assert float(state.best_value) == expected
        assert float(state.train_seconds) == abs(expected)
        _, new = guarded.update(params, guarded.init(params), params, value=number)
        window = og.find_state(new, SpikeState).value_window
        assert float(window.window_values[0]) == expected
        _, new = og.apply_gradients(
            *(accumulated, params, accumulated.init(params)),
            grads=params,
            value=number,
        )
        assert float(as_any(new).value_mean) == expected


def test_loops_take_a_loss_beyond_32_bits():
    def train_step(state: Any, x: Any) -> Any:
        del x
        new = state.apply_gradients(grads=state.params, value=2**40)
        return new, {"loss": 2**40, "tokens": np.int64(2**41)}

    state = TrainState.create(
        apply_fn=str, params=jnp.ones(2), tx=og.guard(SGD, clip=1.0)
    )
    for loop in (fit, train_on_device):
        result = loop(
            state,
            train_step,
            lambda step: np.float32(0),
            num_steps=1,
            eval_every=1,
            evaluate=lambda state: 2**42,
            stopper=og.early_stopping(og.stop.patience(2)),
        )
        row = result.history[0]
        assert (row["train_loss"], row["train_tokens"]) == (2.0**40, 2.0**41)
        assert row["value"] == 2.0**42


def test_a_loss_beyond_all_floats_is_refused():
    params = jnp.ones(2)
    tx = og.guard(SGD)
    with pytest.raises(ValueError, match="`value` must be no larger than a float"):
        tx.update(params, tx.init(params), params, value=10**400)
    stopper = og.early_stopping(og.stop.patience(2))
    with pytest.raises(ValueError, match="`value` must be no larger than a float"):
        stopper.update(10**400, stopper.init())


def test_levels_of_jax_are_checked_as_numpys():
    state = og.record_norm().init(jnp.ones(2))
    for form in (np.asarray, jnp.asarray):
        for wrong in ([0.5, 1.5], -0.1, math.nan):
            with pytest.raises(ValueError, match=r"`q` must be in \[0, 1\]"):
                og.norm_quantile(state, form(wrong))
        with pytest.raises(TypeError, match="`q` must be a number or numbers"):
            og.norm_quantile(state, form(True))
    traces(lambda q: og.norm_quantile(state, q), jnp.array([0.5, 1.5]))


def test_a_leaf_that_no_array_of_jax_holds_is_refused():
    for number in (2**40, np.int64(2**40), -(2**40), np.uint64(2**63)):
        with pytest.raises(ValueError, match=r"`tree` must have leaves that fit"):
            _checks.check_leaves("tree", {"a": number})
    _checks.check_leaves("tree", [2**31 - 1, np.int64(2**31 - 1), np.uint32(2**31)])
