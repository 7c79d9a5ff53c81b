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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

MARK = "# FAULT"
Kind = Literal["nan", "inf"]
Function = Callable[..., object]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A function, its arguments, and the truth about its first non-finite value."""

    planted: Function
    """The function or class that holds the marked line; its name states the fact."""
    args: tuple[object, ...] | Callable[[], tuple[object, ...]]
    """Arguments, or a function that makes them (modules of NNX and Equinox)."""
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
            return self.args()
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
    args: tuple[object, ...] | Callable[[], tuple[object, ...]],
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


def jit_grad(function: Function) -> Function:
    return jax.jit(jax.grad(function))


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
