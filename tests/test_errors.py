"""Bad input: every error names the argument, the rule and what was given."""

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from tests.strategies import f32

PARAMS = {"w": jnp.ones(2)}
GRADS = {"w": jnp.array([3.0, 4.0])}
SGD = optax.sgd(0.1)

# Called with what their annotations, rightly, forbid.
loose: Any = og
Error = type[Exception] | tuple[type[Exception], ...]
Case = tuple[Callable[[], Any], Error, str]


def cases(table: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("build", "error", "message"), table.values(), ids=table
    )


def refuse(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        build()
    # A sentence, and so is what follows it.
    assert str(info.value).endswith(".")
    # None of an error inside: what is wrong is told apart where it is given.
    assert info.value.__cause__ is None


def array(*values: float) -> jax.Array:
    return jnp.array(values)


# Thresholds --------------------------------------------------------------------

# Everything that takes a number where a threshold may be, and its argument's name.
TAKERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "clip_by_global_norm": (loose.clip_by_global_norm, "max_norm"),
    "clip_by_value": (loose.clip_by_value, "max_value"),
    "guard": (lambda x: loose.guard(SGD, x), "clip"),
    "norm_above": (loose.skip.norm_above, "max_norm"),
}

NUMBERS: dict[str, tuple[Any, Error, str]] = {
    "negative": (-1.0, ValueError, r"positive.* -1\.0"),
    "negative whole": (-3, ValueError, "positive.* -3"),
    "zero": (0.0, ValueError, r"positive.* 0\.0"),
    "nan": (math.nan, ValueError, "positive.* nan"),
    "nan of numpy": (np.float32(math.nan), ValueError, "positive.* nan"),
    "minus infinity": (-math.inf, ValueError, "positive.* -inf"),
    "vector": (f32([1.0, 2.0]), ValueError, r"number.*\(2,\)"),
    "vector of jax": (array(1.0, 2.0), ValueError, r"number.*\(2,\)"),
    "complex": (1j, (TypeError, ValueError), "number.*1j"),
    "complex of numpy": (np.complex64(1j), (TypeError, ValueError), "number.*1j"),
    "bool": (True, TypeError, "number.*True"),
    "bool of numpy": (np.bool_(True), TypeError, "number.*True"),
    "text": ("1.0", TypeError, "number.*'1.0'"),
    "nothing": ({}, (TypeError, ValueError), r"number|kind"),
    "list": ([1.0], TypeError, r"number.*\[1\.0\]"),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_positive_number_is_refused_as_a_threshold(taker, number):
    build, name = TAKERS[taker]
    value, error, message = NUMBERS[number]
    with pytest.raises(error, match=rf"(?s)`{name}`.*(?:{message})"):
        build(value)


def test_no_threshold_is_refused_with_the_way_to_measure_only():
    with pytest.raises(TypeError, match=r"`max_norm`.*None"):
        loose.clip_by_global_norm(None)
    with pytest.raises(ValueError, match=r"`max_norm`.*0\.0.*`record_norm\(\)`"):
        loose.clip_by_global_norm(0.0)


class WarmUp:
    """A schedule made by a class: it is called as `WarmUp(1.0)(count)`."""

    def __init__(self, peak: float):
        self.peak = peak

    def __call__(self, count: Any) -> Any:
        return self.peak * count


@pytest.mark.parametrize("taker", ["clip_by_global_norm", "guard", "norm_above"])
def test_a_class_is_refused_as_a_schedule(taker):
    build, name = TAKERS[taker]
    build(WarmUp(1.0))
    with pytest.raises(TypeError, match=rf"`{name}`.*WarmUp"):
        build(WarmUp)


@cases(
    {
        "bounds the wrong way round": (
            lambda: og.clip_by_value(1.0, min_value=2.0),
            ValueError,
            r"`min_value` must be .*less.* `max_value`.* 2\.0 .*1\.0",
        ),
        "empty bounds": (
            lambda: og.clip_by_value(1.0, min_value=1.0),
            ValueError,
            r"`min_value` must be .*less.* `max_value`.* 1\.0 .*1\.0",
        ),
        "nan as a bound": (
            lambda: og.clip_by_value(1.0, min_value=math.nan),
            ValueError,
            "`min_value`.*nan",
        ),
        "a schedule as a bound": (
            lambda: loose.clip_by_value(lambda count: 1.0),
            TypeError,
            "`max_value` must be a number, got .*function",
        ),
        "order": (
            lambda: og.clip_by_global_norm(1.0, ord=0),
            ValueError,
            "`ord` must be positive, got 0",
        ),
        "negative order": (
            lambda: og.clip_by_global_norm(1.0, ord=-math.inf),
            ValueError,
            "`ord` must be positive, got -inf",
        ),
        "order of a matrix": (
            lambda: loose.clip_by_global_norm(1.0, ord="fro"),
            TypeError,
            "`ord` must be a number, got 'fro'",
        ),
        "nonfinite": (
            lambda: og.clip_by_global_norm(1.0, nonfinite="skip"),
            ValueError,
            "`nonfinite` must be one of 'propagate', 'zero', got 'skip'",
        ),
        "kind": (
            lambda: og.clip_by_global_norm({"kind": "z"}),
            ValueError,
            "`max_norm` .*`kind` .*'zscore'.* got .*'z'",
        ),
        "key": (
            lambda: og.clip_by_global_norm({"kind": "quantile", "quantile": 0.9}),
            ValueError,
            "`max_norm` .* keys q, .* got 'quantile'",
        ),
    }
)
def test_options_of_clips_are_named(build, error, message):
    refuse(build, error, message)


@pytest.mark.parametrize("build", [og.clip_by_global_norm, og.guard])
def test_a_traced_order_is_refused(build):
    tx = functools.partial(og.clip_by_global_norm, 1.0)

    def run(ord: Any) -> Any:
        clip = tx(ord=ord)
        clip = clip if build is og.clip_by_global_norm else og.guard(SGD, clip)
        return clip.init(PARAMS)

    with pytest.raises(TypeError, match=r"`ord`.*(static|traced|Python number)"):
        jax.jit(run)(2.0)


# The guard ---------------------------------------------------------------------


@cases(
    {
        "no inner": (
            lambda: loose.guard(0.1),
            TypeError,
            r"`inner` must be .*`optax.adamw\(1e-3\)`, got 0\.1",
        ),
        "factory as inner": (
            lambda: loose.guard(optax.adamw),
            TypeError,
            "`inner` must be .*adamw",
        ),
        "stopper as inner": (
            lambda: loose.guard(og.early_stopping(og.stop.patience(2))),
            TypeError,
            "`inner` must be .*EarlyStopping",
        ),
        "clip of optax": (
            lambda: loose.guard(SGD, clip=optax.clip(1.0)),
            TypeError,
            r"`clip` must be .*inside.*`guard\(optax.chain\(clip, optimizer\)\)`",
        ),
        "chain of clips": (
            lambda: loose.guard(SGD, clip=optax.chain(og.clip_by_global_norm(1.0))),
            TypeError,
            "`clip` must be .*own clips",
        ),
        "rule as clip": (
            lambda: loose.guard(SGD, og.skip.norm_above(1.0)),
            TypeError,
            "`clip` must be .*SkipRule",
        ),
        "number as rule": (
            lambda: loose.guard(SGD, skip=5.0),
            TypeError,
            r"`skip` must be .*`optax_guard.skip`, got 5\.0",
        ),
        "number among rules": (
            lambda: loose.guard(SGD, skip=[og.skip.norm_above(1.0), 5.0]),
            TypeError,
            r"`skip` must be .*5\.0",
        ),
        "factory as rule": (
            lambda: loose.guard(SGD, skip=og.skip.spike),
            TypeError,
            "`skip` must be .*spike",
        ),
        "threshold as rule": (
            lambda: loose.guard(SGD, skip=og.threshold.zscore()),
            TypeError,
            "`skip` must be .*Threshold",
        ),
        "stop rule as rule": (
            lambda: loose.guard(SGD, skip=og.stop.patience(3)),
            TypeError,
            "`skip` must be one or several rules of `optax_guard.skip`",
        ),
    }
)
def test_parts_of_a_guard_are_named(build, error, message):
    refuse(build, error, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "whole number of at least 1, got 0"),
        (-1, "whole number of at least 1, got -1"),
        (1.5, r"whole number of at least 1, got 1\.5"),
        (math.inf, "whole number of at least 1, got inf"),
        (math.nan, "whole number of at least 1, got nan"),
        (None, "number, got None"),
        (True, "number, got True"),
    ],
)
def test_max_consecutive_skips_is_a_count(value, message):
    with pytest.raises((ValueError, TypeError), match=message) as info:
        loose.guard(SGD, max_consecutive_skips=value)
    assert str(info.value).startswith("`max_consecutive_skips` must be")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (jnp.ones(2), ValueError, r"`value` must be one real number.*\(2,\)"),
        (jnp.ones((1, 1)), ValueError, r"`value` must be one real number.*\(1, 1\)"),
        (jnp.complex64(1j), ValueError, "`value` must be one real number"),
        ("0.5", TypeError, "`value` must be a number, got '0.5'"),
        ({"loss": 0.5}, TypeError, "`value` must be a number, got .*loss"),
    ],
    ids=["vector", "matrix", "complex", "text", "dict"],
)
def test_a_loss_that_is_no_scalar_is_refused(value, error, message):
    tx = og.guard(SGD)
    state = tx.init(PARAMS)
    with pytest.raises(error, match=message):
        tx.update(GRADS, state, PARAMS, value=value)
    with pytest.raises(error, match=message):
        og.apply_gradients(tx, PARAMS, state, grads=GRADS, value=value)


def growing() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: {}, lambda updates, state, params=None: (updates, {"g": updates})
    )


@pytest.mark.parametrize("inner", [growing(), optax.chain(SGD, growing())])
def test_inner_that_changes_structure_is_refused(inner):
    tx = og.guard(inner)
    state = tx.init(PARAMS)
    message = r"`inner` must not change the structure of its state.*'g'"
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match=message):
        og.apply_gradients(tx, PARAMS, state, grads=GRADS)


def test_trees_of_keep_if_skipped_must_match():
    tx = og.guard(SGD)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"(?s)`new` and `old` must .*'mean'.*'var'"):
        og.keep_if_skipped(state, {"mean": jnp.ones(1)}, {"var": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"`opt_state` must hold a `GuardState`"):
        og.keep_if_skipped(SGD.init(PARAMS), PARAMS, PARAMS)


# What is no transformation -----------------------------------------------------

THRESHOLDS = {
    "zscore": og.threshold.zscore,
    "quantile": lambda: og.threshold.quantile(0.9),
    "relative_to_mean": og.threshold.relative_to_mean,
}
RULES = {"norm_above": lambda: og.skip.norm_above(1.0), "spike": og.skip.spike}

WAYS_TO_CHAIN: dict[str, Callable[[Any], Any]] = {
    "chain": lambda x: optax.chain(x, SGD).init(PARAMS),
    "chain after": lambda x: optax.chain(SGD, x).init(PARAMS),
    "named chain": lambda x: optax.named_chain(("clip", x), ("sgd", SGD)).init(PARAMS),
    "masked": lambda x: optax.masked(x, {"w": True}).init(PARAMS),
}


@pytest.mark.parametrize("way", WAYS_TO_CHAIN)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_put_in_a_chain_is_refused(name, way):
    with pytest.raises(
        TypeError, match=r"threshold is not .*transformation.*`clip_by_global_norm\("
    ):
        WAYS_TO_CHAIN[way](THRESHOLDS[name]())


@pytest.mark.parametrize("way", WAYS_TO_CHAIN)
@pytest.mark.parametrize("name", RULES)
def test_a_skip_rule_put_in_a_chain_is_refused(name, way):
    with pytest.raises(TypeError, match=r"rule is not .*transformation.*`guard\("):
        WAYS_TO_CHAIN[way](RULES[name]())


def test_a_threshold_is_refused_as_inner():
    with pytest.raises(TypeError, match=r"`inner` must be an optax .*Threshold"):
        loose.guard(og.threshold.zscore())


# States ------------------------------------------------------------------------

TRANSFORMATIONS: dict[str, Any] = {
    "clip_by_global_norm": og.clip_by_global_norm(1.0),
    "clip_by_value": og.clip_by_value(1.0),
    "record_norm": og.record_norm(),
    "guard": og.guard(SGD),
}


@pytest.mark.parametrize("other", [*TRANSFORMATIONS, "sgd"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_of_another_transformation_is_refused(name, other):
    if name == other:
        return
    state = SGD.init(PARAMS) if other == "sgd" else TRANSFORMATIONS[other].init(PARAMS)
    expected = type(TRANSFORMATIONS[name].init(PARAMS)).__name__
    message = (
        rf"`state` of `{name}` must be a `{expected}`, got a `{type(state).__name__}`"
    )
    with pytest.raises(TypeError, match=message):
        TRANSFORMATIONS[name].update(GRADS, state, PARAMS)
    if name == "guard":
        with pytest.raises(TypeError, match=message):
            og.apply_gradients(TRANSFORMATIONS[name], PARAMS, state, grads=GRADS)


def test_state_before_and_after_swapped_arguments_is_refused():
    tx = TRANSFORMATIONS["guard"]
    with pytest.raises(TypeError, match=r"`state` of `guard` must be .* got a `dict`"):
        tx.update(tx.init(PARAMS), GRADS, PARAMS)


def test_state_of_other_skip_rules_is_refused():
    state = og.guard(SGD, skip=og.skip.norm_above(1.0)).init(PARAMS)
    with pytest.raises(ValueError, match=r"its skip rules.* before the rules were"):
        og.guard(SGD, skip=og.skip.spike()).update(GRADS, state, PARAMS)


def test_inner_that_needs_params_says_so():
    tx = og.guard(optax.adamw(0.1))
    with pytest.raises(ValueError, match="params"):
        tx.update(GRADS, tx.init(PARAMS))


def test_params_and_state_in_the_wrong_order_are_refused():
    tx = og.guard(SGD)
    with pytest.raises(TypeError, match=r"`state` of `guard` must be a `GuardState`"):
        og.apply_gradients(tx, tx.init(PARAMS), PARAMS, grads=GRADS)


@cases(
    {
        "none": (
            lambda: og.find_state(SGD.init(PARAMS), og.GuardState),
            ValueError,
            "`tree` must hold one `GuardState`, found 0.*built with",
        ),
        "two": (
            lambda: og.find_state(
                optax.chain(og.record_norm(), og.record_norm()).init(PARAMS),
                og.RecordNormState,
            ),
            ValueError,
            "`tree` must hold one `RecordNormState`, found 2.*`find_states`",
        ),
        "tuple of classes": (
            lambda: loose.find_state(
                SGD.init(PARAMS), (og.GuardState, og.ClipByNormState)
            ),
            ValueError,
            "`tree` must hold one .*GuardState.*ClipByNormState.* found 0",
        ),
        "metrics of nothing": (
            lambda: og.metrics(SGD.init(PARAMS)),
            ValueError,
            "`state` holds no state of this library.*`guard`",
        ),
        "skipped steps of nothing": (
            lambda: og.skipped_steps(SGD.init(PARAMS)),
            ValueError,
            "must hold one `GuardState`, found 0",
        ),
        "exhausted without a guard": (
            lambda: og.raise_if_exhausted(og.metrics(og.record_norm().init(PARAMS))),
            ValueError,
            "`metrics` must hold `guard_exhausted`.*'grad_norm'",
        ),
        "exhausted of a state": (
            lambda: loose.raise_if_exhausted(og.guard(SGD).init(PARAMS)),
            TypeError,
            r"`metrics` must be .*`optax_guard.metrics`.*GuardState",
        ),
    }
)
def test_reading_what_is_not_there_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


# Stopping ----------------------------------------------------------------------


@cases(
    {
        "zero patience": (
            lambda: og.stop.patience(0),
            ValueError,
            "`n` must be .*at least 1, got 0",
        ),
        "negative patience": (
            lambda: og.stop.patience(-2),
            ValueError,
            "`n` must be .*at least 1, got -2",
        ),
        "fractional patience": (
            lambda: og.stop.patience(1.5),
            ValueError,
            r"`n` must be .*got 1\.5",
        ),
        "unknown mode": (
            lambda: og.early_stopping(og.stop.patience(3), mode="lower"),
            ValueError,
            "`mode` must be one of 'min', 'max', got 'lower'",
        ),
        "number as rule": (
            lambda: loose.early_stopping(3),
            TypeError,
            r"`rule` of `early_stopping` must be .*`stop.patience\(\d\)`, got 3",
        ),
    }
)
def test_arguments_of_early_stopping_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_missing_params_of_early_stopping_are_named():
    stopper = og.early_stopping(og.stop.patience(3))
    with pytest.raises(ValueError, match=r"`params` of `update` are missing"):
        stopper.update(1.0, stopper.init(PARAMS))


# Extras ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "blocked", "message"),
    [
        ("import optax_guard.flax", "flax", "pip install 'optax-guard[flax]'"),
        (
            "import optax_guard.plotting",
            "matplotlib",
            "pip install 'optax-guard[plot]'",
        ),
    ],
    ids=["flax", "plot"],
)
def test_missing_extra_is_named(program, blocked, message):
    """In a process of its own, where the package cannot be imported."""
    lines = (
        "import sys",
        f"sys.modules[{blocked!r}] = None",
        "import optax_guard",
        f"try: {program}",
        "except ImportError as error: print(error.name, error)",
    )
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert message in result.stdout
    assert result.stdout.split()[0].split(".")[0] == blocked
