"""The usual cures, by the operation and its numbers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from optax_guard.debug._origin import ArraySummary


class Facts(NamedTuple):
    """The facts by which advice is chosen.

    Attributes:
      kind: ``"nan"`` or ``"inf"``.
      primitive: Name of the operation.
      operands: Its operands.
      result: Its result.
      is_backward: Whether it belongs to the backward pass.
      beside: Names of all operations of the same source line.
    """

    kind: str
    primitive: str
    operands: Sequence[ArraySummary]
    result: ArraySummary
    is_backward: bool
    beside: frozenset[str]


def advice_for(facts: Facts) -> str:
    """The first advice that fits; empty if none does."""
    rules = _NAN_RULES if facts.kind == "nan" else _INF_RULES
    return next((text for names, fits, text in rules if _holds(facts, names, fits)), "")


Rule = tuple[str, Callable[[Facts], bool], str]


def _holds(facts: Facts, names: str, fits: Callable[[Facts], bool]) -> bool:
    return (not names or facts.primitive in names.split()) and fits(facts)


def _always(facts: Facts) -> bool:
    return True


def _differentiates(*names: str) -> Callable[[Facts], bool]:
    """Whether the operation belongs to the derivative of one of these."""
    return lambda facts: (
        not facts.beside.isdisjoint(names)
        and (facts.is_backward or facts.primitive not in names)
        and (any(x.num_inf for x in facts.operands) or _has_zero(facts, -1))
    )


def _has_zero(facts: Facts, position: int) -> bool:
    x = facts.operands[position]
    return x.smallest is not None and x.smallest <= 0 <= (x.largest or 0)


def _all_infinite(facts: Facts) -> bool:
    return all(x.num_inf for x in facts.operands)


def _some_infinite(facts: Facts) -> bool:
    return any(x.num_inf for x in facts.operands)


def _is_half(facts: Facts) -> bool:
    return facts.result.dtype == "float16"


_ROOT = (
    "The derivative of `sqrt` at 0 is infinite. A norm needs `optax.safe_norm`, a root "
    "`sqrt(x + 1e-12)`; or replace the zeros by `where` before the root and after it."
)
_BEHIND_WHERE = (
    "A branch that `where` discards is differentiated too, and 0 times Inf is NaN. "
    "Replace the bad arguments by another `where` before the operation."
)
_NAN_RULES: tuple[Rule, ...] = (
    ("", _differentiates("sqrt", "rsqrt"), _ROOT),
    (
        "",
        _differentiates("acos", "asin", "acosh", "atanh"),
        "The derivative is infinite at the end of the domain. Clip the argument to "
        "[-1 + 1e-6, 1 - 1e-6].",
    ),
    ("mul div", lambda f: f.is_backward and _some_infinite(f), _BEHIND_WHERE),
    (
        "div",
        lambda f: _has_zero(f, 0) and _has_zero(f, 1),
        "0 / 0. If a mask selects nothing, divide by `jnp.maximum(count, 1)`.",
    ),
    (
        "div",
        _all_infinite,
        "Inf / Inf. If `exp` overflowed, use `jax.nn.softmax`, or subtract the maximum "
        "first.",
    ),
    (
        "sub add",
        _all_infinite,
        "Inf - Inf. If all entries of a row are masked by -Inf, as in attention, mask "
        "by a large finite number, or overwrite the row by `where` before and after.",
    ),
    ("mul", _some_infinite, "0 * Inf. A mask must be `where`, not a multiplication."),
    ("log log1p", _always, "The argument is negative: bound it by `jnp.maximum`."),
    (
        "sqrt rsqrt",
        _always,
        "The argument is negative. Rounding does that to a variance: bound it by "
        "`jnp.maximum(x, 0)`.",
    ),
    (
        "acos asin atanh erf_inv",
        _always,
        "The argument is beyond 1, often by rounding: clip it to [-1, 1].",
    ),
    ("acosh", _always, "The argument is below 1: bound it by `jnp.maximum(x, 1)`."),
    (
        "pow",
        _always,
        "A negative number has no real power. Use `jnp.abs`, or a Python integer as "
        "the exponent.",
    ),
    (
        "reduce_sum dot_general cumsum conv_general_dilated",
        _some_infinite,
        "+Inf and -Inf, or 0 and Inf, met in a sum. Look where the Inf was made.",
    ),
    (
        "cholesky",
        _always,
        "The matrix is not positive definite: add a small multiple of the identity.",
    ),
    (
        "gather",
        _always,
        "An index is out of range, and JAX fills such entries with NaN.",
    ),
    ("sin cos tan rem", _some_infinite, "The argument is infinite."),
)
_INF_RULES: tuple[Rule, ...] = (
    ("", _differentiates("sqrt", "rsqrt"), _ROOT),
    (
        "exp exp2 expm1 sinh cosh",
        _always,
        "`exp` overflows above 11 in float16 and above 88 in float32. Use "
        "`jax.nn.log_softmax` or `jax.nn.logsumexp`, or subtract the maximum first.",
    ),
    (
        "log log1p",
        _always,
        "`log` of 0. Bound the argument by `jnp.maximum`, or compute it from logits "
        "by `jax.nn.log_softmax`.",
    ),
    (
        "div rsqrt integer_pow pow atanh",
        lambda f: any(_has_zero(f, i) for i in range(len(f.operands))),
        "Division by 0. Add a small number, or replace zeros by `where` before it.",
    ),
    (
        "reduce_sum dot_general cumsum mul add square integer_pow add_any",
        _is_half,
        "float16 ends at 65504. Do this operation in float32: `dtype=jnp.float32` of a "
        "sum, `preferred_element_type=jnp.float32` of a product.",
    ),
    ("convert_element_type", _always, "The value is too large for the new dtype."),
)
