"""Healthy functions: their results are finite, so no equation is an origin.

Many make a NaN or an Inf and discard it, or hold an Inf that is legal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import optax_guard as og
from tests.debug_faults import Function, f16, f32, gradient, sharded, summed


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """A function with a finite result, and its arguments."""

    name: str
    fn: Function
    args: tuple[object, ...] | Callable[[], tuple[object, ...]]
    makes_nan: bool
    """Whether the result of some equation holds a NaN, which is discarded later."""

    def make_args(self) -> tuple[object, ...]:
        if callable(self.args):
            return self.args()
        return jax.tree.map(jnp.asarray, self.args)


HEALTHY: list[Healthy] = []


def healthy(
    *args: object,
    make: Callable[[], tuple[object, ...]] | None = None,
    wrap: Callable[[Function], Function] = lambda function: function,
    makes_nan: bool = False,
):
    """Enters the decorated function into the table; `make` makes its arguments."""

    def enter(function):
        name, fn = function.__name__, wrap(function)
        case = Healthy(name=name, fn=fn, args=make or args, makes_nan=makes_nan)
        HEALTHY.append(case)
        return function

    return enter


# A NaN or an Inf is made and discarded.


@healthy(f32(-1, 0, 2), makes_nan=True)
def where_discards_the_log_of_a_negative(x):
    return jnp.where(x > 0, jnp.log(x), 0.0)


@healthy(f32(0, 1), makes_nan=True)
def result_that_nobody_uses(x):
    _ = x / x
    return x + 1.0


@healthy(f32(0, 1), wrap=jax.jit, makes_nan=True)
def second_result_of_a_jitted_function_is_unused(x):
    both = jax.jit(lambda x: (x * 2.0, x / x))
    return both(x)[0]


@healthy(f32(0, 1), makes_nan=True)
def select_takes_the_finite_case(x):
    return lax.select(x == 0, jnp.ones_like(x), jnp.sin(x) / x)


@healthy(f32(200, -1))
def clip_bounds_an_overflow(x):
    return jnp.clip(jnp.exp(x), 0.0, 10.0)


@healthy(f32(0, 1), makes_nan=True)
def nan_to_num_replaces_a_nan(x):
    return jnp.nan_to_num(x / x)


@healthy(f32(0, 1, 2), makes_nan=True)
def count_of_nan(x):
    return jnp.sum(jnp.isnan(x / x)) / 3.0


@healthy(f32(0, 1, 2), makes_nan=True)
def slice_leaves_the_nan_out(x):
    return (x / x)[1:]


@healthy(f32(0, 1, 2), makes_nan=True)
def set_overwrites_the_nan(x):
    return (x / x).at[0].set(1.0)


@healthy(f32(0, 1, 2))
def sort_moves_the_inf_to_the_end(x):
    return jnp.sort(1.0 / x)[:2]


@healthy(f32(np.nan, 1, 2))
def mean_that_ignores_a_nan_of_the_data(x):
    return jnp.nanmean(x)


@healthy(f32(-200))
def sigmoid_by_an_infinite_exp(x):
    return 1.0 / (1.0 + jnp.exp(-x))


@healthy(f32(0, 1))
def tanh_of_an_inf(x):
    return jnp.tanh(1.0 / x)


@healthy(f32(-1, 4), wrap=jax.vmap, makes_nan=True)
def vmap_evaluates_both_branches_of_a_cond(x):
    return lax.cond(x > 0, jnp.sqrt, lambda x: x, x)


@healthy(f32(0, 1, 2), wrap=jax.jit, makes_nan=True)
def nan_of_one_iteration_is_replaced_in_the_next(xs):
    def step(last, x):
        return jnp.where(jnp.isnan(last), 0.0, x) / x, None

    return lax.scan(step, jnp.float32(1), xs)[0]


@healthy(f32(0, 1), makes_nan=True)
def stacked_results_of_a_scan_are_unused(xs):
    return lax.scan(lambda s, x: (s + x, x / x), jnp.float32(0), xs)[0]


@healthy(np.arange(8, dtype=np.float32), wrap=sharded, makes_nan=True)
def one_shard_discards_a_nan(x):
    return lax.pmax(jnp.where(x > 0, x / x, 0.0), "data") * x


# An Inf is legal.

LARGEST = f32(np.inf)[0]


@healthy(f32(1, 3, 2), np.array([True, False, True]))
def largest_of_the_live_entries(x, mask):
    return jnp.max(jnp.where(mask, x, -jnp.inf))


@healthy(f32(1, 3, 2), np.array([True, False, True]))
def index_of_the_largest_live_entry(x, mask):
    return x[jnp.argmax(jnp.where(mask, x, -jnp.inf))]


@healthy(f32(1, 3, 2), np.array([False, False, True]), wrap=gradient)
def softmax_with_one_live_entry(scores, mask):
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.where(mask, weights * scores, 0.0)


@healthy(f32(1, 2), np.array([True, False]))
def logsumexp_with_a_live_entry(x, mask):
    return jax.nn.logsumexp(jnp.where(mask, x, -jnp.inf))


@healthy(f32(3, 1, 2))
def running_minimum_of_a_scan_starts_at_inf(xs):
    return lax.scan(lambda m, x: (jnp.minimum(m, x), None), LARGEST, xs)[0]


@healthy(np.float32(2), wrap=jax.jit)
def last_value_of_a_while_loop_starts_at_inf(x):
    def step(carry):
        root, _ = carry
        return 0.5 * (root + x / root), root

    return lax.while_loop(lambda c: jnp.abs(c[0] - c[1]) > 1e-3, step, (x, jnp.inf))[0]


@healthy(f32(3, 1, 2))
def best_value_of_a_fori_loop_starts_at_inf(xs):
    return lax.fori_loop(0, 3, lambda i, m: jnp.minimum(m, xs[i]), jnp.inf)


@healthy(f32([1, 2], [30, 4]), wrap=jax.jit)
def streamed_softmax_starts_at_minus_inf(blocks):
    def step(carry, block):
        top, total = carry
        new = jnp.maximum(top, jnp.max(block))
        total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(block - new))
        return (new, total), None

    return lax.scan(step, (-jnp.inf, 0.0), blocks)[0]


@healthy(f32([[1], [2], [3]]))
def padding_of_a_maximum_pool(x):
    return nn.max_pool(x, (2,), padding="SAME")


@healthy(f32(1, 2))
def division_by_inf(x):
    return x / jnp.inf + jnp.exp(-jnp.inf)


# The unsafe code does not run, or its derivative is not taken.


@healthy(np.float32(-1), wrap=jax.jit)
def branch_of_a_cond_that_is_not_taken(x):
    return lax.cond(x > 0, jnp.log, lambda x: x * 2.0, x)


@healthy(np.float32(0), 2, wrap=jax.jit)
def branch_of_a_switch_that_is_not_taken(x, index):
    return lax.switch(index, [lambda x: 1.0 / x, jnp.log, jnp.cos], x)


@healthy(f32(0, 4), wrap=gradient)
def stop_gradient_before_a_root(x):
    return x * jnp.sqrt(lax.stop_gradient(x))


@healthy(f32(0, 4), wrap=gradient)
def where_on_both_sides_of_a_log(x):
    safe = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, jnp.log(safe), 0.0)


@healthy(f32(0, 4), wrap=gradient)
def custom_jvp_guards_the_derivative(x):
    @jax.custom_jvp
    def root(x):
        return jnp.sqrt(x)

    @root.defjvp
    def rule(primals, tangents):
        y = root(*primals)
        return y, tangents[0] * jnp.where(y > 0, 0.5 / y, 0.0)

    return root(x)


@healthy(f32(0, 4), wrap=gradient)
def custom_vjp_guards_the_derivative(x):
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    def backward(y, g):
        return (jnp.where(y > 0, g / (y * 2), 0.0),)

    root.defvjp(lambda x: (jnp.sqrt(x), jnp.sqrt(x)), backward)
    return root(x)


# Plain good health of each transformation.


@healthy(f32(1, 2), wrap=lambda f: jax.jit(gradient(jax.checkpoint(f))))
def gradient_of_a_checkpoint(x):
    return jnp.log(x) * x


@healthy(f32(1, 2), f32(1, 1), wrap=lambda f: lambda x, t: jax.jvp(f, (x,), (t,)))
def tangent(x):
    return jnp.sqrt(x)


@healthy(f32([1, 2], [3, 4]), wrap=lambda f: jax.vmap(jax.value_and_grad(f)))
def gradient_of_a_scan_for_each_example(xs):
    return lax.scan(lambda s, x: (s * jnp.tanh(x), None), jnp.float32(1), xs)[0]


@healthy(f16(100, 1), f16(2, 3), wrap=gradient)
def float16_within_its_range(x, y):
    return x * y


@healthy(np.arange(8, dtype=np.float32), wrap=lambda f: jax.pmap(f, axis_name="data"))
def mean_over_the_devices_of_a_pmap(x):
    return x - lax.pmean(x, "data")


@healthy(np.arange(8, dtype=np.float32), wrap=lambda f: gradient(sharded(f)))
def gradient_over_the_devices_of_a_shard_map(x):
    return x * lax.psum(jnp.sum(x), "data")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.LayerNorm()(nn.relu(nn.Dense(2)(x))))


def net_args():
    return jax.jit(Net().init)(jax.random.key(0), jnp.ones((3, 2))), jnp.ones((3, 2))


@healthy(make=net_args, wrap=jax.jit)
def gradient_of_a_linen_module(variables, x):
    return jax.value_and_grad(summed(Net().apply))(variables, x)


@healthy(make=lambda: (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((3, 2))))
def call_of_an_nnx_module(model, x):
    return nnx.relu(model(x))


@healthy(make=lambda: (eqx.nn.Linear(2, 1, key=jax.random.key(0)), jnp.ones(2)))
def gradient_of_an_equinox_module(model, x):
    return eqx.filter_value_and_grad(summed(eqx.nn.Linear.__call__))(model, x)


ADAM = optax.adam(0.1)
GUARDED = og.guard(optax.sgd(0.1))


@healthy(make=lambda: (f32(1, 0), ADAM.init(jnp.ones(2))), wrap=jax.jit)
def update_of_an_optimizer(grads, state):
    return ADAM.update(grads, state)


def guard_args():
    params = jnp.ones(2)
    return jnp.array([np.nan, 1.0]), jax.jit(GUARDED.init)(params), params


@healthy(make=guard_args, wrap=jax.jit, makes_nan=True)
def guard_skips_a_nan_of_the_gradient(grads, state, params):
    updates, _ = GUARDED.update(grads, state, params)
    return updates
