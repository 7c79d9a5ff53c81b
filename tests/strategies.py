"""Trees of gradients, how two of them are compared, how versions of JAX differ."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

# Without shrinking: the draws are small as they are, and a step is slow for a search.
sampled = settings(
    max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate]
)

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# One structure for all drawn trees: a step is then compiled once for each choice of
# dtypes, however many values are drawn.
SHAPES: dict[str, tuple[int, ...]] = {"bias": (), "kernel": (3, 2), "scale": (4,)}

TINY = 1e-25
HUGE = 3e38


def f32(values: Any) -> np.ndarray:
    """A float32 array; numbers beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32)


def magnitudes(smallest: float = TINY, largest: float = HUGE) -> st.SearchStrategy:
    """Zero, or a number of either sign whose logarithm is anywhere in the range."""
    logs = st.floats(math.log(smallest), math.log(largest))
    sizes = logs.map(lambda x: min(max(math.exp(x), smallest), largest))
    signed = st.tuples(sizes, st.sampled_from([-1.0, 1.0])).map(lambda t: t[0] * t[1])
    return st.one_of(st.just(0.0), signed)


def ordinary() -> st.SearchStrategy:
    """Numbers as gradients usually are."""
    return magnitudes(1e-6, 1e3)


def any_float() -> st.SearchStrategy:
    """Also denormals, both zeros, infinities and NaN."""
    special = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e38, -3.4e38]
    bad = [math.nan, math.inf, -math.inf]
    return st.one_of(ordinary(), st.sampled_from(special), st.sampled_from(bad))


def trees(
    values: st.SearchStrategy, dtypes: Sequence[Any] = (jnp.float32,)
) -> st.SearchStrategy:
    """Trees of NumPy arrays of `SHAPES`; leaves have one of the dtypes, or all."""

    def tree(drawn: tuple[tuple[Any, ...], list[float]]) -> dict[str, np.ndarray]:
        kinds, flat = drawn
        leaves, start = {}, 0
        for (name, shape), dtype in zip(SHAPES.items(), kinds, strict=True):
            size = math.prod(shape)
            with np.errstate(over="ignore"):
                leaf = np.array(flat[start : start + size]).astype(dtype)
            leaves[name] = leaf.reshape(shape)
            start += size
        return leaves

    total = sum(math.prod(shape) for shape in SHAPES.values())
    # Not every mixture: each is a program to compile.
    mixtures = {
        tuple(dtypes[(i + j) % len(dtypes)] for j in range(3)) for i in range(3)
    }
    uniform = {(dtype,) * 3 for dtype in dtypes}
    kinds = st.sampled_from(sorted(mixtures | uniform, key=str))
    return st.tuples(kinds, st.lists(values, min_size=total, max_size=total)).map(tree)


def structures() -> st.SearchStrategy:
    """Trees of any form: nested, empty, of scalars, with leaves that do not count."""
    shapes = st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3).map(tuple)
    kinds = st.sampled_from([*FLOAT_DTYPES, jnp.complex64, jnp.int32, jnp.bool_])
    arrays = st.builds(jnp.ones, shapes, kinds)
    trees = st.recursive(
        st.one_of(arrays, st.none()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            st.tuples(inner, inner),
        ),
        max_leaves=5,
    )
    # Nothing at all is no tree, but an argument that was left out.
    return trees.filter(lambda tree: tree is not None)


def true_norm(tree: Any, ord: float = 2) -> float:
    """The norm in float64, of entries scaled so that nothing overflows or vanishes."""
    flat = [np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]
    wide = [
        np.abs(x.astype(np.complex128 if x.dtype.kind == "c" else float)) for x in flat
    ]
    entries = np.concatenate([np.zeros(1), *wide])
    unit = entries.max()
    if ord == math.inf or unit == 0 or not np.isfinite(unit):
        return float(unit)
    return float(unit) * math.fsum((entries / unit) ** ord) ** (1 / ord)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, dtypes, shapes and bytes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(_same_bits, jax.tree.leaves(a), jax.tree.leaves(b)))


def _same_bits(x: Any, y: Any) -> bool:
    x, y = map(_raw, (x, y))
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _raw(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def types_of(tree: Any) -> Any:
    """Structure of a tree and the type of every leaf: dtype, shape, weakness."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jax.typeof, tree))
    return structure, [(str(x), x.weak_type) for x in map(_aval, leaves)]


def _aval(x: Any) -> Any:
    return x if hasattr(x, "weak_type") else jax.typeof(jnp.zeros(x.shape, x.dtype))


def unlike_lowest_jax(reason: str) -> pytest.MarkDecorator:
    """Marks what JAX itself, or its XLA, does not do yet at the lowest version."""
    is_lowest = jax.__version_info__[:2] == (0, 7)
    return pytest.mark.xfail(is_lowest, reason=reason, strict=True)


def in_force(mesh: jax.sharding.Mesh) -> Any:
    """A context in which arrays are made on this mesh."""
    set_mesh = getattr(jax, "set_mesh", None)  # JAX >= 0.8
    return (set_mesh or vars(jax.sharding)["use_mesh"])(mesh)
