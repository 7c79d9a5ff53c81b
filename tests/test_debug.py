"""Origins of NaN and Inf: entries, steps around a guard, modules, the text."""

import contextlib
import re
from typing import Any

import pytest

pytest.importorskip("flax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_guard as og
from optax_guard.debug import NonfiniteOrigin, explain_step, find_nonfinite


def find(function, *args, by=find_nonfinite) -> NonfiniteOrigin:
    """The origin, which must be there."""
    origin = by(function, *args)
    assert origin is not None
    return origin


def line_of(function: Any, text: str) -> int:
    """The number of the line of a function of this file that holds a text."""
    code = function.__code__
    with open(code.co_filename, encoding="utf-8") as file:
        lines = file.read().splitlines()
    after = range(code.co_firstlineno - 1, len(lines))
    return next(i + 1 for i in after if text in lines[i])


def ratio(x, y):
    discarded = jnp.log(x)  # NaN at the first entry only
    return jnp.where(jnp.arange(3) == 0, 0.0, discarded / y)  # NaN at the last


X = jnp.array([-1.0, 2.0, 1.0])
Y = jnp.array([1.0, 1.0, 0.0])


def test_the_entry_decides_between_two_nans():
    origin = find(ratio, X, Y)
    assert (origin.kind, origin.primitive) == ("nan", "div")
    assert origin.line == line_of(ratio, "discarded / y")
    assert (origin.num_bad, origin.first_bad) == (2, (0,))
    assert [x.num_nan for x in origin.operands] == [1, 0]


MOVES = {
    "roll": lambda x: jnp.roll(x, 1)[:1],
    "reverse": lambda x: x[::-1][:1],
    "gather": lambda x: x[jnp.array([5, 4])],
    "product": lambda x: (x.reshape(2, 3) @ jnp.ones((3, 2)))[1],
    "sum": lambda x: x.reshape(2, 3).sum(1)[1:],
    "cumsum": lambda x: jnp.cumsum(x.reshape(2, 3), 1).T[2, 1:],
    "sort": lambda x: jnp.sort(x.reshape(2, 3))[1],
    "update": lambda x: jnp.zeros(8).at[:6].set(x)[5:],
}


@pytest.mark.parametrize("name", MOVES)
def test_entries_are_followed_through_moves_and_sums(name):
    def function(x, y):
        # NaN at 0 by the logarithm, which no move keeps, and at 5 by the quotient.
        return MOVES[name](jnp.concatenate([jnp.log(x), y / y]))

    origin = find(function, X, Y)
    assert (origin.primitive, origin.first_bad) == ("div", (2,))
    assert find_nonfinite(function, X, Y + 1) is None


def test_finite_result_has_no_origin():
    assert find_nonfinite(ratio, X, Y + 1) is None
    assert find_nonfinite(lambda x: (x > jnp.inf, jnp.argmax(jnp.log(x))), X) is None
    assert find_nonfinite(lambda: 1.0) is None


def test_overflow_is_found_with_the_number_that_overflowed():
    origin = find(lambda x: jnp.exp(x).sum(), jnp.float16([1, 12]))
    assert (origin.kind, origin.primitive) == ("inf", "exp")
    assert origin.operands[0].largest == 12.0
    assert "overflows above 11 in float16" in origin.advice


def decay(carry, x):
    carry = jnp.roll(jnp.sqrt(carry - 1), 1)
    return carry, carry * x


def test_loops_name_the_iteration_that_made_the_nan():
    start = jnp.array([30.0, 30.0, 3.0])
    # In plain Python: the entry that ends at place 1 turns bad in this iteration.
    values, bad = [30.0, 30.0, 3.0], []
    for i in range(4):
        values = [v - 1 for v in values]
        bad += [i] if min(values) < 0 else []
        values = [float(np.sqrt(max(v, 0))) for v in values]
        values = values[-1:] + values[:-1]
    expected = bad[0]

    origin = find(lambda x: jax.lax.scan(decay, x, jnp.arange(4.0)), start)
    assert (origin.primitive, origin.iteration) == ("sqrt", (expected,))

    def backwards(x):
        return jax.lax.scan(decay, x, jnp.arange(4.0), reverse=True)[1]

    assert find(backwards, start).iteration == (3 - expected,)

    def loop(x):
        def body(c):
            return c[0] + 1, decay(c[1], 0.0)[0]

        return jax.lax.while_loop(lambda c: c[0] < 4, body, (0, x))[1]

    assert find(loop, start).iteration == (expected,)


def test_bad_argument_is_named():
    origin = find(lambda batch: batch["x"] * 2.0, {"x": Y / Y})
    assert (origin.kind, origin.primitive) == ("nan", "input")
    assert "`args/0/x` is bad already" in origin.advice
    assert origin.first_bad == (2,)
    assert origin.function == "<lambda>"


def test_optimizer_is_named_by_its_own_line():
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates / 0.0, state

    tx = optax.GradientTransformation(lambda params: (), update)
    origin = find(tx.update, jnp.ones(2), ())
    assert (origin.kind, origin.primitive) == ("inf", "div")
    assert origin.filename == __file__
    # One of Optax has no line of a user: its own is told.
    adam = optax.adam(jnp.inf)
    origin = find(adam.update, jnp.zeros(2), adam.init(jnp.zeros(2)))
    assert "optax" in origin.filename


TX = og.guard(optax.adam(0.1), clip=1.0, skip=og.skip.spike(watch="grad_norm"))


def loss(params, x):
    return jnp.sum(jnp.sqrt(params["w"] * x))


def train_step(state, x):
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params, x)
    return og.apply_gradients(TX, params, opt_state, grads=grads, value=value), value


PARAMS = {"w": jnp.array([4.0, 1.0])}
STATE = PARAMS, TX.init(PARAMS)
ZERO = jnp.array([1.0, 0.0])


def test_gradients_are_examined_as_they_enter_the_guard():
    new_state, _ = train_step(STATE, ZERO)
    assert og.find_state(new_state, og.GuardState).num_skipped == 1
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(new_state[0]))
    for step in (train_step, jax.jit(train_step)):
        origin = find(step, STATE, ZERO, by=explain_step)
        assert origin.line == line_of(loss, "jnp.sqrt")
        assert origin.is_backward
    assert explain_step(train_step, STATE, jnp.ones(2)) is None


def test_legal_inf_in_the_state_of_an_optimizer_is_let_be():
    def init(params):
        return jnp.inf

    def update(updates, state, params=None):
        return updates, jnp.minimum(jnp.asarray(state), 5.0)

    inner = optax.chain(optax.GradientTransformation(init, update), optax.sgd(0.1))
    tx = og.guard(inner)

    def step(state, x):
        params, opt_state = state
        grads = jax.grad(loss)(params, x)
        return og.apply_gradients(tx, params, opt_state, grads=grads), 0.0

    assert explain_step(step, (PARAMS, tx.init(PARAMS)), jnp.ones(2)) is None


def test_loss_is_examined_with_its_gradient():
    assert bool(jnp.isfinite(loss(PARAMS, ZERO)))
    origin = find(loss, PARAMS, ZERO, by=explain_step)
    assert origin.line == line_of(loss, "jnp.sqrt")
    assert explain_step(loss, PARAMS, jnp.ones(2)) is None


def test_guard_under_shard_map_is_found():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(state, x):
        params, opt_state = state
        grads = jax.grad(lambda w: jnp.sum(jnp.log(w * x)))(params)  # here
        grads = jax.lax.pmean(grads, "d")
        return og.apply_gradients(TX, params, opt_state, grads=grads)

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False
    )
    state = jnp.ones(()), TX.init(jnp.ones(()))
    batch = jnp.ones(16).at[9].set(0.0)
    origin = find(jax.jit(step), state, batch, by=explain_step)
    assert origin.line == line_of(local, "# here")
    assert origin.result.shape == (2,)
    assert origin.first_bad == (1,)
    assert explain_step(step, state, jnp.ones(16)) is None
    bad = find(step, state, batch.at[9].set(jnp.nan), by=explain_step)
    assert (bad.primitive, bad.first_bad) == ("input", (9,))


def test_modules_of_nnx_are_arguments_and_do_not_change():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))

    def step(model, x):
        value, grads = nnx.value_and_grad(
            lambda model: jnp.sum(jnp.sqrt(model(x) * 0))  # here
        )(model)
        model.kernel[...] = model.kernel[...] * 2
        return value, grads

    origin = find(step, model, jnp.ones((1, 2)))
    assert origin.line == line_of(step, "# here")
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_modules_of_equinox_are_arguments():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, activation=jnp.sqrt, key=jax.random.key(0))
    origin = find(lambda model, x: model(x).sum(), model, -jnp.ones(2))
    assert origin.filename == __file__
    assert origin.primitive in ("sqrt", "log")


def test_library_called_through_the_standard_library_names_the_user():
    @contextlib.contextmanager
    def context():
        yield

    rate = context()(optax.adam(jnp.inf).update)
    state = optax.adam(jnp.inf).init(jnp.zeros(2))

    def update(grads, state):
        return rate(grads, state)  # here

    origin = find(update, jnp.zeros(2), state)
    assert origin.line == line_of(update, "# here")


def test_scope_is_the_path_of_linen_modules():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.log(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Head(name="head")(nn.relu(x))

    origin = find(lambda x: Model().apply({}, x), -jnp.ones(2))
    assert origin.scope == "Model/head"


def test_text_tells_all():
    origin = find(ratio, X, Y)._replace(iteration=(3,), scope="a/b")
    text = str(origin)
    place = f"{re.escape(__file__)}:{origin.line}, in ratio"
    assert re.search(f"^NaN from `div` in the forward pass at {place}\n", text)
    assert "    return jnp.where(jnp.arange(3) == 0, 0.0, discarded / y)" in text
    assert "\n  scope: a/b\n  iteration: 3\n" in text
    assert "operand 0: float32[3] from 0 to 0.693147, 1 NaN" in text
    assert "result: float32[3]" in text
    assert "the first at [0]" in text


def test_what_is_no_function_is_an_error():
    wrong: Any = 1
    with pytest.raises(TypeError, match="`fn` must be a function, got 1"):
        find_nonfinite(wrong)
    with pytest.raises(TypeError, match="`train_step_or_loss` must be a function"):
        explain_step(wrong, STATE, ZERO)
