"""Which leaves of a skipped step were bad, in the order of the model."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard._guarding.leaf_report import as_text, model_order
from tests.strategies import f32, same_bits

DEPTH = 12


def layers(values: Any) -> dict[str, Any]:
    return {f"layers_{i}": {"w": jnp.full(3, x)} for i, x in enumerate(values)}


@pytest.fixture(scope="module")
def step() -> Any:
    """A network of layers; the backward pass of one of them divides by zero."""

    def loss(params: Any, broken: jax.Array) -> jax.Array:
        x = jnp.ones(3)
        for i in range(DEPTH):
            # The root is 0 and its slope infinite, but only there.
            nothing = jnp.sum(x) * jnp.where(broken == i, 0.0, 1.0)
            x = x * params[f"layers_{i}"]["w"] + jnp.sqrt(nothing) * 0.0
        return jnp.sum(x)

    tx = og.guard(optax.sgd(0.1), clip=1.0, max_consecutive_skips=1)

    @jax.jit
    def step(params: Any, state: Any, broken: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, broken)
        return og.apply_gradients(tx, params, state, grads=grads, value=value)

    params = layers([1.0] * DEPTH)
    return lambda broken: (params, step(params, tx.init(params), broken)[1])


@pytest.mark.parametrize("broken", [2, 9, 10])
def test_finite_leaf_stands_just_above_the_layer_that_broke(step, broken):
    params, state = step(broken)
    (skipped,) = og.skipped_steps(state, params)
    # The infinite slope meets all that lies before it, and not the layer's own weights.
    bad = [name for name, kind in skipped.leaves if kind != "finite"]
    assert bad == [f"layers_{i}/w" for i in range(broken)]
    assert skipped.leaf == "layers_0/w"
    assert skipped.leaves[-1] == (f"layers_{broken}/w", "finite")
    assert str(skipped).endswith(f"finite beside it: layers_{broken}/w")


def test_exhaustion_tells_the_leaves_if_it_is_given_the_state(step):
    params, state = step(9)
    with pytest.raises(og.GuardExhaustedError) as error:
        og.raise_if_exhausted(og.metrics(state), state, params)
    assert "layers_0/w to layers_8/w (9 leaves)" in str(error.value)
    assert "finite beside it: layers_9/w" in str(error.value)
    assert "These parameters" not in str(error.value)


class Block(NamedTuple):
    query: Any
    key: Any


def test_order_is_that_of_the_model_where_it_can_be_known():
    def names(tree: Any) -> list[str]:
        paths = jax.tree.leaves_with_path(tree)
        return [
            jax.tree_util.keystr(paths[i][0], simple=True, separator="/")
            for i in model_order(tree)
        ]

    # Sorted, as JAX leaves a dict: numbers count as numbers.
    numbered = {f"Dense_{i}": {"b": 0, "w": 0} for i in (0, 1, 10, 2)}
    assert names(jax.tree.map(float, numbered)) == [
        f"Dense_{i}/{x}" for i in (0, 1, 2, 10) for x in "bw"
    ]
    # Not sorted: its own order, down to the last dict.
    own = {"stem": {"w": 0, "b": 0}, "body": [0, 0], "head": None, "exit": 0}
    assert names(own) == ["stem/w", "stem/b", "body/0", "body/1", "exit"]
    # Fields and lists have theirs.
    assert names({"x": Block(query=0, key=0), "a10": 0, "a9": 0}) == [
        *("x/query", "x/key", "a10", "a9")
    ]
    assert model_order(0.0) == [0]
    assert model_order({}) == []


def test_text_joins_what_stands_in_a_row():
    verdicts = [("a", "finite"), ("b", "NaN"), ("c", "NaN"), ("d", "Inf")]
    assert as_text(verdicts) == "NaN in b, c; Inf in d; finite beside it: a"
    assert as_text([(i, "NaN") for i in range(4)]) == "NaN in 0 to 3 (4 leaves)"
    assert as_text([]) == ""


# Parameters that were not finite already ----------------------------------------


def one_step(tx: Any, params: Any, grads: Any, value: Any, apply: bool) -> Any:
    state = tx.init(params)
    if apply:
        return og.apply_gradients(tx, params, state, grads=grads, value=value)
    return tx.update(grads, state, params, value=value)


GOOD = {"a": f32([1.0, 2.0]), "b": f32([3.0])}
BAD = {"a": f32([1.0, math.nan]), "b": f32([3.0])}
NONE_LEFT = jax.tree.map(lambda x: x * f32(math.nan), GOOD)
LARGE = jnp.ones((400, 400))  # Then the step is not by a mask on CPU.


@pytest.mark.parametrize("use_cond", [False, True])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("apply", [True, False])
def test_reason_tells_whose_fault_it_was(apply, size, use_cond):
    tx = og.guard(optax.sgd(0.1), clip=1.0, use_cond=use_cond)
    overflowing = og.guard(optax.scale(1e38), use_cond=use_cond)
    more = {"large": LARGE} if size == "large" else {}
    step = jax.jit(one_step, static_argnums=(0, 4))

    def reason(params: Any, grads: Any, value: float = 0.5, tx: Any = tx) -> str:
        params, grads = params | more, grads | more
        new, state = step(tx, params, grads, value, apply)
        found = og.SkipReason(int(state.skip_reason)).name
        judged = value, *jax.tree.leaves(grads)
        if not all(np.all(np.isfinite(x)) for x in judged):
            kept = params if apply else jax.tree.map(jnp.zeros_like, params)
            assert same_bits(new, jax.tree.map(jnp.asarray, kept))
            assert state.num_partial == 0
        return found

    assert reason(GOOD, GOOD) == "NONE"
    assert reason(GOOD, BAD) == reason(GOOD, NONE_LEFT) == "NONFINITE"
    assert reason(GOOD, GOOD, math.inf) == "NONFINITE_VALUE"
    ten = jax.tree.map(lambda x: 10 * x, GOOD)
    assert reason(GOOD, ten, tx=overflowing) == "NONFINITE_UPDATE"
    assert reason(BAD, BAD) == "NONFINITE_PARAMS"
    assert reason(BAD, GOOD, math.nan) == "NONFINITE_PARAMS"
    # Other entries than the bad one take the step.
    assert reason(BAD, GOOD) == "NONE"
    assert reason(NONE_LEFT, GOOD) == "NONFINITE_PARAMS"


def test_parameter_that_does_not_count_is_not_blamed():
    tx = og.guard(optax.sgd(0.1), mask={"a": False, "b": True})
    grads = {"a": GOOD["a"], "b": f32([math.nan])}
    state = one_step(tx, BAD, grads, 0.5, True)[1]
    assert state.skip_reason == og.SkipReason.NONFINITE


# To look at the parameters at every micro-batch would be one more all-reduce.
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda tx: tx, r"NONFINITE_PARAMS. The parameters were not finite before"),
        (lambda tx: og.accumulate(tx, 1), "NONFINITE"),
    ],
    ids=["guard", "accumulate"],
)
def test_exhaustion_names_the_bad_parameters(wrap, reason):
    tx = wrap(og.guard(optax.sgd(0.1), max_consecutive_skips=1))
    state = one_step(tx, BAD, BAD, 0.5, True)[1]
    with pytest.raises(og.GuardExhaustedError, match=reason) as error:
        og.raise_if_exhausted(og.metrics(state), state, BAD)
    assert "These parameters are not finite: a. No step" in str(error.value)
