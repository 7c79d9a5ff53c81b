"""Planted faults: small functions in which one line makes the result non-finite.

The line ends in `# FAULT`. It is always a line of the user: for a fault of the backward
pass it is the forward line that is differentiated. Each fault also states a `mend`: a
text of that line and the text that cures it. So the tests can show, without the
debugger, that this line is the cause: with the mend alone the result is finite.

A NaN counts before an Inf: if the result holds a NaN, the fault is the first equation
that makes a NaN from operands without NaN. Its operands may hold an Inf.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

MARK = "# FAULT"
Kind = Literal["nan", "inf"]
Function = Callable[..., Any]
"""Takes and returns any tree: no type says more."""
Arguments = tuple[object, ...] | Callable[[Any], tuple[object, ...]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A function, its arguments, and the truth about its first non-finite value."""

    planted: Function
    """The function or class that holds the marked line; its name states the fact."""
    args: Arguments
    """Arguments, or a function that makes them from `planted` (a class of modules)."""
    kind: Kind
    mend: tuple[str, str]
    """A text of the marked line, and the text that cures the fault."""
    kwargs: dict[str, object] = field(default_factory=dict)
    wrap: Callable[[Function], Function] = lambda function: function
    """Makes the function under test from `planted`: a gradient, a `vmap`."""
    forward: Callable[[Function], Function] = lambda function: function
    """Makes the forward pass alone from `planted`."""
    is_backward: bool | None = False
    """Whether the forward pass alone is finite.

    None where that is so, but the equation stands among those of the forward pass: the
    factor `0.5 / sqrt(x)` of a derivative, a tangent. Either answer is right there.
    """
    iteration: tuple[int, ...] | None = ()
    """Iterations of the loops around the equation, outermost first; None: any answer.

    It is None in the backward pass of a loop, which counts from either end.
    """
    primitive: str | None = None
    """The primitive, where only one is possible."""

    @property
    def name(self) -> str:
        return self.planted.__name__

    @property
    def fn(self) -> Function:
        """The function to debug, built anew."""
        return self.wrap(self.planted)

    def make_args(self) -> tuple[object, ...]:
        """Arguments of JAX, for NumPy's operators are not traced."""
        if callable(self.args):
            return self.args(self.planted)
        return jax.tree.map(jnp.asarray, self.args)

    @property
    def filename(self) -> str:
        return inspect.getsourcefile(self.planted) or ""

    @property
    def line(self) -> int:
        """The number of the marked line in this file."""
        lines, first = inspect.getsourcelines(self.planted)
        (marked,) = [i for i, text in enumerate(lines) if MARK in text]
        return first + marked

    def mended(self) -> "Fault":
        """Returns the same record around a copy whose marked line is cured."""
        lines, _ = inspect.getsourcelines(self.planted)
        (marked,) = [i for i, text in enumerate(lines) if MARK in text]
        old, new = self.mend
        if lines[marked].count(old) != 1:
            raise ValueError(f"`mend` of {self.name} must occur once, got {old!r}.")
        lines[marked] = lines[marked].replace(old, new)
        table: list[Fault] = []
        scope = {**globals(), "fault": partial(fault, table=table)}
        exec(textwrap.dedent("".join(lines)), scope)
        return table[0]


FAULTS: list[Fault] = []


def fault(
    kind: Kind,
    args: Arguments,
    mend: tuple[str, str],
    *,
    table: list[Fault] = FAULTS,
    **truth,
):
    """Enters the decorated function or class into the table, and returns it."""

    def enter(planted):
        table.append(Fault(planted=planted, args=args, kind=kind, mend=mend, **truth))
        return planted

    return enter


def f32(*values) -> np.ndarray:
    return np.array(values, np.float32)


def f16(*values) -> np.ndarray:
    return np.array(values, np.float16)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(function: Function) -> Function:
    """Runs a function of one shard on eight devices."""
    return jax.jit(
        jax.shard_map(function, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    )


def summed(function: Function) -> Function:
    return lambda *args: jnp.sum(function(*args))


# Forward: the functions that users meet first.


@fault("inf", (f32(1, 0, 2),), ("jnp.log", "jnp.log1p"), primitive="log")
def log_of_zero(x):
    scaled = 2.0 * x
    logs = jnp.log(scaled)  # FAULT
    return jnp.sum(logs)


@fault("nan", (f32(1, -1),), ("log(x)", "log(jnp.abs(x))"), primitive="log")
def log_of_a_negative(x):
    return jnp.mean(jnp.log(x))  # FAULT


@fault("nan", (f32(0, 1), f32(0, 2)), ("/ b", "/ (b + 1)"), primitive="div")
def zero_over_zero(a, b):
    ratio = a / b  # FAULT
    return ratio * 3.0


@fault("inf", (f32(0, 1),), ("-2", "2"), primitive="integer_pow")
def inverse_square_at_zero(x):
    return jnp.sum(x**-2)  # FAULT


@fault("nan", (f32(0.5, 1.0000001),), ("cosine)", "cosine * 0.9)"), primitive="acos")
def arccos_beyond_one(x):
    cosine = x * 1.0
    angle = jnp.arccos(cosine)  # FAULT
    return angle


@fault("inf", (f32(0.5, 1.0),), ("(x)", "(x / 2)"), primitive="atanh")
def arctanh_of_one(x):
    return jnp.arctanh(x)  # FAULT


@fault("nan", ({"base": f32(2, -2)},), ("0.3", "2"), primitive="pow")
def broken_power_of_a_negative(tree):
    root = tree["base"] ** 0.3  # FAULT
    return {"root": root}


@fault("inf", (f32(1, 60),), ("(x", "(0.1 * x"), primitive="exp")
def exp_overflows(x):
    growth = jnp.exp(x * 2.0)  # FAULT
    return jnp.sum(growth)


@fault("nan", (f32(1, 2, 3), np.zeros(3, bool)), ("-jnp.inf", "-9.0"))
def softmax_of_a_masked_row(scores, mask):
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))  # FAULT


@fault(
    "nan",
    (f32([1, 2], [3, 4]), np.array([[True, False], [False, False]])),
    ("count", "jnp.maximum(count, 1)"),
    primitive="div",
)
def masked_mean_of_an_empty_row(x, mask):
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=1)
    count = jnp.sum(mask, axis=1)
    return total / count  # FAULT


@fault("nan", (f32(3, 3, 3),), ("deviation", "(deviation + 1e-6)"), primitive="div")
def standardized_constants(x):
    centred = x - jnp.mean(x)
    deviation = jnp.sqrt(jnp.mean(centred**2))
    return centred / deviation  # FAULT


@fault("inf", (f32(1, 2),), ("scores", "0 * x"), primitive="log")
def logsumexp_of_a_masked_row(x):
    scores = jnp.full_like(x, -jnp.inf)
    return jax.nn.logsumexp(scores)  # FAULT


@fault("inf", (f32(2e38, 1, 2e38),), ("(x)", "(x / 4)"), primitive="cumsum")
def cumsum_overflows(x):
    return jnp.cumsum(x)  # FAULT


@fault("inf", (f32(1e20, 1e10, 1e20),), ("(x)", "(x / 1e15)"), primitive="cumprod")
def cumprod_overflows(x):
    return jnp.cumprod(x)  # FAULT


@fault("nan", (f32(1, 2), 9), ("index", "index % 2"), primitive="gather")
def take_beyond_the_end(table, index):
    row = jnp.take(table, index)  # FAULT
    return row + 1.0


@fault("nan", (f32([1, 2], [2, 1]),), ("cov)", "cov @ cov)"), primitive="cholesky")
def cholesky_of_an_indefinite_matrix(cov):
    return jnp.linalg.cholesky(cov)  # FAULT


@fault("nan", (f32(0, 1),), ("inf", "pi"), kwargs={"scale": f32(1)})
def infinite_weight_on_a_zero(x, scale):
    far = scale * x
    return jnp.sum(far * jnp.inf)  # FAULT


# Forward: half precision.


@fault("inf", (f16(300, 1), f16(300, 2)), ("a @ b", "a @ (b / 8)"))
def float16_product_of_matrices_overflows(a, b):
    return a @ b  # FAULT


@fault("inf", (f32(3e38).astype(jnp.bfloat16),), ("10", "1"), primitive="mul")
def bfloat16_product_overflows(x):
    return x * 10  # FAULT


@fault("inf", (np.full(100, 1000, np.float16),), ("sum", "max"))
def float16_sum_overflows(x):
    return jnp.sum(x)  # FAULT


@fault("inf", (np.array([70000], np.int32),), ("count", "(count // 2)"))
def integer_beyond_float16(count):
    half = count.astype(jnp.float16)  # FAULT
    return half


@fault("nan", (f16([300, 0], [1, 2]),), ("q @ k.T", "q @ (k.T / 16)"))
def float16_attention_overflows(q):
    k = q * 1
    return jax.nn.softmax(q @ k.T) @ q  # FAULT


@fault("inf", (f16(1, 12),), ("(x)", "(x / 2)"), primitive="exp")
def float16_exp_overflows(x):
    return jnp.exp(x)  # FAULT


# Forward: inside each transformation.


@fault("inf", (f32(2, 0),), ("1.0 / x", "1.0 * x"), wrap=jax.jit, primitive="div")
def reciprocal_in_jit(x):
    return jnp.sum(1.0 / x)  # FAULT


@fault("nan", (f32(1, 0),), ("y / y", "y"), wrap=jax.jit, primitive="div")
def division_in_nested_jit(x):
    @jax.jit
    def inner(y):
        return y / y  # FAULT

    return jax.jit(lambda y: inner(y) + 1.0)(x) * 2.0


@fault("nan", (f32(4), f32(-4)), ("(b)", "(-b)"), wrap=jax.jit, primitive="sqrt")
def second_call_of_one_jitted_helper(a, b):
    helper = jax.jit(lambda x: x * 1.5)
    first = jnp.sqrt(helper(a))
    second = jnp.sqrt(helper(b))  # FAULT
    return first + second


@fault("nan", (f32(3, 4), f32(0, 0)), ("norm(b)", "norm(a)"), primitive="div")
def second_norm_of_the_same_shape(a, b):
    first = a / jnp.linalg.norm(a)
    second = b / jnp.linalg.norm(b)  # FAULT
    return first + second


@fault("nan", (f32(7), f32(2), f32(0)), ("b", "a"), primitive="rem")
def second_call_of_a_cached_function(x, a, b):
    first = jnp.remainder(x, a)
    return first + jnp.remainder(x, b)  # FAULT


@fault(
    "inf",
    (f32([2, 1], [3, 0], [1, 5]),),
    ("row)", "row + 1)"),
    wrap=jax.vmap,
    primitive="log",
)
def one_member_of_a_vmap(row):
    return jnp.sum(jnp.log(row))  # FAULT


@fault("nan", (f32(1, 2, 0, 3),), ("/ x", "* x"), iteration=(2,))
def third_iteration_of_a_scan(xs):
    def step(total, x):
        share = (x - x) / x  # FAULT
        return total + share, share

    return lax.scan(step, jnp.float32(0), xs)


@fault("inf", (np.float32(3),), ("/ left", "* left"), iteration=(3,), primitive="div")
def fourth_iteration_of_a_while_loop(start):
    def step(carry):
        left, total = carry
        share = 1.0 / left  # FAULT
        return left - 1.0, total + share

    return lax.while_loop(lambda carry: carry[0] > -3.0, step, (start, start * 0))[1]


@fault("inf", (np.float32(1e10),), ("x * x", "x * 1"), iteration=(1,), primitive="mul")
def second_iteration_of_a_fori_loop(x):
    def step(i, x):
        return x * x  # FAULT

    return lax.fori_loop(0, 2, step, x)


@fault("inf", (np.float32(1e20), 3), ("x * x", "x * 1"), iteration=(0,), wrap=jax.jit)
def fori_loop_of_traced_length(x, steps):
    def step(i, x):
        return jnp.where(i == 0, x * x, x)  # FAULT

    return lax.fori_loop(0, steps, step, x)


@fault("nan", (np.float32(-1),), ("log(x)", "log(-x)"), wrap=jax.jit, primitive="log")
def branch_of_a_cond(x):
    def negative(x):
        return jnp.log(x)  # FAULT

    return lax.cond(x > 0, lambda x: x, negative, x)


@fault("inf", (np.float32(0), 1), ("/ x", "* x"), wrap=jax.jit, primitive="div")
def branch_of_a_switch(x, index):
    def reciprocal(x):
        return 1.0 / x  # FAULT

    return lax.switch(index, [jnp.sin, reciprocal, jnp.cos], x)


@fault("inf", (f32(200),), ("exp", "tanh"), wrap=jax.checkpoint, primitive="exp")
def forward_of_a_checkpoint(x):
    return jnp.exp(x)  # FAULT


@fault("nan", (f32(0),), ("x / x", "x"), primitive="div")
def primal_of_a_custom_jvp(x):
    @jax.custom_jvp
    def ratio(x):
        return x / x  # FAULT

    ratio.defjvp(lambda primals, tangents: (ratio(*primals), tangents[0]))
    return ratio(x) + 1.0


@fault(
    "nan", (np.float32(-1),), ("x)", "-x)"), wrap=jax.value_and_grad, primitive="sqrt"
)
def forward_rule_of_a_custom_vjp(x):
    @jax.custom_vjp
    def root(x):
        return x

    def forward(x):
        return jnp.sqrt(x), x  # FAULT

    root.defvjp(forward, lambda x, g: (g * x,))
    return root(x) * 2.0


@fault(
    "inf",
    (np.arange(8, dtype=np.float32) - 5,),
    ("/ shard", "* shard"),
    wrap=sharded,
    primitive="div",
)
def one_shard_of_a_shard_map(shard):
    total = lax.psum(jnp.sum(shard), "data")
    return total / shard  # FAULT


@fault(
    "nan",
    (np.arange(8, dtype=np.float32) - 5,),
    ("log(x)", "log(x + 6)"),
    wrap=jax.pmap,
    primitive="log",
)
def one_device_of_a_pmap(x):
    return jnp.log(x)  # FAULT


# Forward: loops, branches and batches inside one another.


@fault("nan", (f32(-1, 4),), ("(x - x)", "(x + 9)"), primitive="div")
def nan_that_is_discarded_before_the_fault(x):
    kept = jnp.where(x > 0, jnp.log(x), 0.0)
    return kept / (x - x)  # FAULT


@fault("nan", (f32(-1, 2, -3, 4),), ("(x)", "(jnp.abs(x))"), iteration=(2,))
def nan_of_an_earlier_iteration_is_replaced(xs):
    def step(carry, x):
        last, i = carry
        last = jnp.where(i == 1, 0.0, last)
        last = last + jnp.sqrt(x)  # FAULT
        return (last, i + 1), None

    return lax.scan(step, (jnp.float32(0), 0), xs)[0][0]


@fault("inf", (f32([1, 2, 3], [4, 0, 5]),), ("/ x", "* x"), iteration=(1, 1))
def scan_inside_a_scan(rows):
    def inner(total, x):
        return total + 1.0 / x, None  # FAULT

    def outer(total, row):
        return lax.scan(inner, total, row)[0], None

    return lax.scan(outer, jnp.float32(0), rows)[0]


@fault(
    "nan",
    (f32([1, 2, 3], [4, 5, -6]),),
    ("log(x)", "log(x * x)"),
    wrap=jax.vmap,
    iteration=(2,),
    primitive="log",
)
def scan_inside_a_vmap(row):
    def step(total, x):
        return total + jnp.log(x), None  # FAULT

    return lax.scan(step, jnp.float32(0), row)[0]


@fault("inf", (f32(1, 0, 3, 0),), ("/ x", "* x"), wrap=jax.jit, iteration=(3,))
def cond_inside_a_scan(xs):
    def step(i, x):
        # The zero at index 1 takes the other branch.
        share = lax.cond(i > 1, lambda x: 1.0 / x, lambda x: x, x)  # FAULT
        return i + 1, share

    return lax.scan(step, 0, xs)[1]


# Backward: the loss is finite, its gradient is not.


def gradient(function: Function) -> Function:
    """The gradient of the summed result by the first argument."""
    return jax.grad(summed(function))


GRAD = {"wrap": gradient, "is_backward": True}
FACTOR = {"wrap": gradient, "is_backward": None}


@fault("inf", (f32(0, 4),), ("x)", "x + 1)"), **FACTOR)
def gradient_of_sqrt_at_zero(x):
    return jnp.sqrt(x)  # FAULT


@fault("nan", (f32(0, 0),), ("weights)", "weights + 1)"), **GRAD, primitive="mul")
def gradient_of_a_norm_at_zero(weights):
    penalty = jnp.linalg.norm(weights)  # FAULT
    return 0.1 * penalty


@fault("nan", (f32(3, 4), f32(0, 0)), ("(b)", "(b + 1)"), primitive="mul", **GRAD)
def gradient_of_the_second_norm(a, b):
    first = jnp.linalg.norm(a)
    b = b * first
    return first + jnp.linalg.norm(b)  # FAULT


@fault("nan", (f32(0, 1),), ("log(x)", "log1p(x)"), primitive="div", **GRAD)
def gradient_of_log_behind_a_where(x):
    logs = jnp.log(x)  # FAULT
    return jnp.where(x > 0, logs, 0.0)


@fault("nan", (f32(0, 1),), ("/ x", "/ (x + 1)"), **GRAD)
def gradient_of_a_division_behind_a_where(x):
    ratio = jnp.sin(x) / x  # FAULT
    return jnp.where(x == 0, 1.0, ratio)


@fault("nan", (f32(0, 4),), ("sqrt(x)", "sqrt(x + 1)"), primitive="mul", **GRAD)
def gradient_of_sqrt_behind_a_where(x):
    safe = jnp.where(x > 0, x, 1.0)
    good = jnp.where(x > 0, jnp.sqrt(safe), 0.0)
    root = jnp.sqrt(x)  # FAULT
    return good + jnp.where(x > 0, root, 0.0)


@fault("inf", (f32(1, 0),), ("(x)", "(0.9 * x)"), **FACTOR)
def gradient_of_arccos_at_one(x):
    return jnp.arccos(x)  # FAULT


@fault("inf", (f32(0, 1),), ("0.5", "2.0"), **FACTOR)
def gradient_of_a_broken_power_at_zero(x):
    return x**0.5  # FAULT


@fault("nan", (f32(0), f32(0)), (", x", ", x + 1"), **FACTOR)
def gradient_of_arctan2_at_the_origin(y, x):
    return jnp.arctan2(y, x)  # FAULT


@fault("nan", (f32(2, 2, 2),), ("std(x)", "std(x * jnp.arange(3))"), **GRAD)
def gradient_of_the_deviation_of_constants(x):
    return jnp.std(x)  # FAULT


@fault("inf", (f16(1, 2),), ("(jnp.float32)", "(jnp.float32) * 1e-3"), **GRAD)
def gradient_overflows_in_its_cast_to_float16(x):
    wide = x.astype(jnp.float32)  # FAULT
    return wide * 1e6


@fault(
    "inf",
    (np.float32(0),),
    ("1.5", "3.0"),
    wrap=lambda f: jax.grad(jax.grad(f)),
    forward=jax.grad,
    is_backward=None,
)
def second_derivative_of_a_power_at_zero(x):
    return x**1.5  # FAULT


# Backward: inside each transformation.


@fault(
    "inf",
    (np.float32(0), np.float32(1)),
    ("x)", "x + 1)"),
    wrap=lambda f: lambda x, t: jax.jvp(f, (x,), (t,)),
    forward=lambda f: lambda x, t: f(x),
    is_backward=None,
)
def tangent_of_sqrt_at_zero(x):
    return 3.0 * jnp.sqrt(x)  # FAULT


@fault(
    "nan",
    ({"w": f32(1, 0)}, f32(1, 1)),
    ("logits)", "logits + 1)"),
    wrap=lambda f: jax.jit(jax.value_and_grad(f, has_aux=True)),
    is_backward=True,
    primitive="div",
)
def value_and_grad_with_auxiliary_output(params, x):
    logits = params["w"] * x
    logs = jnp.log(logits)  # FAULT
    return jnp.sum(jnp.where(logits > 0, logs, 0.0)), logits


@fault(
    "nan",
    (f32([3, 4], [0, 0], [1, 1]),),
    ("row)", "row + 1)"),
    wrap=lambda f: jax.vmap(jax.grad(f)),
    is_backward=True,
)
def gradient_of_one_example(row):
    return jnp.linalg.norm(row)  # FAULT


@fault(
    "nan",
    (f32(1, 0),),
    ("(x)", "(x + 1)"),
    wrap=lambda f: gradient(jax.checkpoint(f)),
    is_backward=True,
    primitive="div",
)
def gradient_of_a_checkpoint(x):
    logs = jnp.log(x)  # FAULT
    return jnp.where(x > 0, logs, 0.0) * x


@fault("inf", (f32(1, 0),), ("/ x", "* x"), **GRAD)
def rule_of_a_custom_jvp(x):
    @jax.custom_jvp
    def square(x):
        return x * x

    @square.defjvp
    def rule(primals, tangents):
        ((x,), (t,)) = primals, tangents
        return square(x), t / x  # FAULT

    return square(x)


@fault("inf", (f32(1, 0),), ("/ x", "* x"), primitive="div", **GRAD)
def backward_rule_of_a_custom_vjp(x):
    @jax.custom_vjp
    def square(x):
        return x * x

    def backward(x, g):
        return (g / x,)  # FAULT

    square.defvjp(lambda x: (x * x, x), backward)
    return jnp.sin(square(x))


@fault("nan", (f32(1, 0, 2),), ("(x)", "(x + 1)"), iteration=None, **GRAD)
def gradient_of_a_scan(xs):
    def step(total, x):
        logs = jnp.log(x)  # FAULT
        return total + jnp.where(x > 0, logs, 0.0), None

    return lax.scan(step, jnp.float32(0), xs)[0]


@fault("nan", (np.float32(2),), ("(x - i)", "(x + i)"), iteration=None, **GRAD)
def gradient_of_a_fori_loop(x):
    def step(i, total):
        root = jnp.sqrt(x - i)  # FAULT
        return total + jnp.where(i < 2, root, 0.0)

    return lax.fori_loop(0, 3, step, 0.0)


@fault("nan", (np.float32(0),), ("log(x)", "log1p(x)"), primitive="div", **GRAD)
def gradient_of_a_branch_of_a_cond(x):
    def guarded(x):
        logs = jnp.log(x)  # FAULT
        return jnp.where(x > 0, logs, x)

    return lax.cond(x < 1, guarded, jnp.sin, x)


@fault(
    "nan",
    (np.arange(8, dtype=np.float32),),
    ("(shard)", "(shard + 1)"),
    wrap=lambda f: gradient(sharded(f)),
    forward=sharded,
    is_backward=True,
    primitive="div",
)
def gradient_of_a_shard_map(shard):
    logs = jnp.log(shard)  # FAULT
    return jnp.where(shard > 0, logs, 0.0)


@fault(
    "nan",
    (np.arange(8, dtype=np.float32),),
    ("(x)", "(x + 1)"),
    wrap=lambda f: jax.pmap(jax.grad(f)),
    is_backward=True,
    primitive="div",
)
def gradient_on_one_device_of_a_pmap(x):
    logs = jnp.log(x)  # FAULT
    return jnp.where(x > 0, logs, 0.0)


# Modules of Linen, NNX and Equinox.


@fault(
    "inf",
    (
        {"params": {"Dense_0": {"kernel": f16([300], [300]), "bias": f16(0)}}},
        f16([1, 2], [300, 2]),
    ),
    ("(hidden)", "(hidden / 8)"),
    wrap=lambda net: net().apply,
    primitive="dot_general",
)
class LinenDenseOverflowsInFloat16(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(x)
        return nn.Dense(1, dtype=jnp.float16)(hidden)  # FAULT


@fault(
    "nan",
    ({"params": {"gain": f32(1, 1)}}, f32([1, 2], [0, 0])),
    ("/ size", "/ (size + 1)"),
    wrap=lambda net: jax.value_and_grad(summed(net().apply)),
    primitive="div",
)
class LinenNormalizesARowOfZeros(nn.Module):
    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (2,))
        size = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        return gain * (x / size)  # FAULT


@fault(
    "inf",
    ({"params": {"gain": np.float32(1)}}, f32(1), f32([1], [2], [0], [3])),
    ("/ x", "* x"),
    wrap=lambda net: jax.jit(
        nn.scan(net, variable_broadcast="params", split_rngs={"params": False})().apply
    ),
    iteration=(2,),
    primitive="div",
)
class LinenScanDividesByZero(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        gain = self.param("gain", nn.initializers.ones, ())
        carry = carry + gain / x  # FAULT
        return carry, carry


@fault(
    "nan",
    ({"params": {"gain": f32(1, 0)}}, f32(1, 1)),
    ("(h)", "(h + 1)"),
    wrap=lambda net: jax.jit(jax.grad(summed(nn.remat(net)().apply))),
    forward=lambda net: net().apply,
    is_backward=True,
    primitive="div",
)
class LinenRematOfLogBehindAWhere(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = x * self.param("gain", nn.initializers.ones, (2,))
        logs = jnp.log(h)  # FAULT
        return jnp.where(h > 0, logs, 0.0)


@fault(
    "nan",
    lambda net: (net(), f32(1, -2)),
    ("sqrt(h)", "tanh(h)"),
    wrap=lambda net: lambda model, x: model(x),
    primitive="sqrt",
)
class NnxRootOfANegative(nnx.Module):
    def __init__(self):
        self.gain = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        h = self.gain * x
        return jnp.sqrt(h)  # FAULT


@fault(
    "nan",
    lambda net: (net(), f32(0, 0)),
    ("h)", "h + 1)"),
    wrap=lambda net: nnx.value_and_grad(summed(net.__call__)),
    forward=lambda net: net.__call__,
    is_backward=True,
)
class NnxGradientOfANormAtZero(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        h = self.linear(x)
        return jnp.linalg.norm(h)  # FAULT


@fault(
    "inf",
    lambda net: (net(jnp.float32(90)), f32(0, 1)),
    ("exp", "tanh"),
    wrap=lambda net: eqx.filter_jit(net.__call__),
    primitive="exp",
)
class EquinoxExpOverflows(eqx.Module):
    gain: jax.Array
    power: int = eqx.field(static=True, default=2)

    def __call__(self, x):
        return jnp.exp(self.gain * x)  # FAULT


@fault(
    "nan",
    lambda net: (net(eqx.nn.Linear(2, 2, False, key=jax.random.key(0))), f32(0, 0)),
    ("(h)", "(h + 1)"),
    wrap=lambda net: eqx.filter_value_and_grad(summed(net.__call__)),
    forward=lambda net: net.__call__,
    is_backward=True,
    primitive="mul",
)
class EquinoxGradientOfSqrtBehindAWhere(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x):
        h = self.linear(x)
        root = jnp.sqrt(h)  # FAULT
        return jnp.where(h > 0, root, 0.0)


# Optimizers that make a non-finite update or state from finite gradients.


def stateless(update: Function) -> Function:
    """The update of a transformation without a state, after a rescaling of Optax."""
    mine = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.scale(0.5), mine).update


STATELESS = (optax.EmptyState(), optax.EmptyState())


@fault(
    "nan",
    ({"w": f32(0, 1)}, {"w": f32(0, 1)}),
    ("sqrt(n)", "sqrt(n + 1)"),
    primitive="div",
)
def update_divides_by_a_second_moment_of_zero(grads, state):
    moment = jax.tree.map(lambda n, g: 0.9 * n + 0.1 * g * g, state, grads)
    scaled = jax.tree.map(lambda g, n: g / jnp.sqrt(n), grads, moment)  # FAULT
    return scaled, moment


@fault(
    "nan",
    ({"w": f32(0, 0)}, STATELESS, {"w": f32(0, 0)}),
    ("norm(u)", "(norm(u) + 1)"),
    wrap=stateless,
    primitive="div",
)
def trust_ratio_of_parameters_at_zero(updates, state, params):
    norm = jnp.max
    ratio = jax.tree.map(lambda p, u: norm(p) / norm(u), params, updates)  # FAULT
    return jax.tree.map(jnp.multiply, updates, ratio), state


@fault(
    "nan",
    ({"w": f32(1)}, optax.ScaleByScheduleState(count=np.array(20, np.int32))),
    ("0.5", "2"),
    wrap=lambda schedule: optax.scale_by_schedule(schedule).update,
    primitive="pow",
)
def schedule_beyond_its_last_step(count):
    left = 1.0 - count / 10
    return left**0.5  # FAULT


@fault(
    "inf",
    ({"w": f16(300, 1)}, {"w": f16(0, 0)}),
    ("g * g", "g"),
    primitive="mul",
)
def second_moment_overflows_in_float16(grads, moment):
    square = jax.tree.map(lambda g: g * g, grads)  # FAULT
    moment = jax.tree.map(jnp.maximum, moment, square)
    return jax.tree.map(lambda g, n: g / (1 + n), grads, moment), moment


@fault(
    "inf",
    ({"w": f32(1, 2)}, STATELESS),
    ("**0", "**1"),
    wrap=lambda update: jax.jit(stateless(update)),
    primitive="div",
)
def bias_correction_of_step_zero(updates, state, params=None):
    decay = jnp.float32(0.9)
    corrected = jax.tree.map(lambda u: u / (1 - decay**0), updates)  # FAULT
    return corrected, state
