"""Norms of whole trees: right in any float dtype and at any size, in one read."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_guard._norms.alike import alike, roles_of
from optax_guard._norms.axis_norms import ratio
from optax_guard._norms.leaf_runs import (
    Part,
    Runs,
    add_pairwise,
    add_up,
    combine,
    joined,
    parts_of,
    values_by_run,
)
from optax_guard._norms.marks import marks_of, no_marks, of_unknown_kind
from optax_guard._norms.mesh_axes import AxisName, Names, mesh_axes
from optax_guard._norms.two_scales import (
    SCALES,
    accumulator_dtype,
    not_folded,
    root_of_sums,
)
from optax_guard._trees import is_inexact, path_names

# Below this, squares in the plain sum may have been flushed to zero.
_SMALLEST_PLAIN_SUM = 2.0**-60


class TreeNorm(NamedTuple):
    """A norm of a tree, and its leaves that are not finite.

    Attributes:
      value: float[], the norm; float32, or float64 if a leaf is.
      marks: int32[2, 4], the runs of leaves whose own norm is not finite, because of an
        entry or because it overflows; see ``marks.py``. In a tree of at most 128
        leaves each is a run; in a larger one a run has 32 neighbours, or 1/128 of all.
    """

    value: jax.Array
    marks: jax.Array


def tree_norm(tree: Any, ord: Any = None, axis_name: AxisName = None) -> TreeNorm:
    """Norm of all floating entries of ``tree``.

    Args:
      tree: Any pytree; leaves that are not floating do not count.
      ord: ``None`` or 2, 1, ``inf`` or another positive number.
      axis_name: Mesh axes over which ``tree`` is split under ``shard_map`` or ``pmap``.

    Returns:
      The norm, 0 for a tree without floating entries.
    """
    all_leaves = jax.tree.leaves(tree)
    indices = [i for i, leaf in enumerate(all_leaves) if is_inexact(leaf)]
    leaves = [jnp.asarray(all_leaves[i]) for i in indices]
    paths = path_names(tree)
    if not leaves:
        return TreeNorm(jnp.zeros((), jnp.float32), no_marks())
    parts = parts_of(mesh_axes(tree, axis_name), indices, len(all_leaves))
    if ord is None or ord == 2:
        value, marks = _euclidean(leaves, parts, roles_of(paths[i] for i in indices))
    elif ord == 1:
        value, marks = _sum_norm(leaves, parts)
    elif ord == np.inf:
        value, marks = _max_norm(leaves, parts)
    else:
        value, marks = _power_norm(leaves, parts, ord)
    return TreeNorm(value, marks)


# Jitted for callers outside of `jit`: there, every call would compile its branches.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _euclidean(
    leaves: list[jax.Array], parts: tuple[Part, ...], roles: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(leaves)
    sums, marks = [], []
    for part in parts:
        # Two reductions over one operand are one fusion on TPU and GPU. On CPU they
        # cost many times one reduction; there a rare second look is cheap.
        *own, own_marks = lax.platform_dependent(
            *part.of(leaves),
            cpu=functools.partial(_squares_cpu, dtype, part.runs),
            cuda=functools.partial(
                _squares, dtype, part.runs, tuple(part.of(roles)), in_pairs=True
            ),
            default=functools.partial(
                _squares, dtype, part.runs, tuple(part.of(roles))
            ),
        )
        # The marks of bad leaves travel in the same all-reduce.
        of_all, own_marks = add_up(part, tuple(own), own_marks)
        sums.append(of_all)
        marks.append(own_marks)
    small, big = map(add_pairwise, zip(*sums, strict=True))
    return root_of_sums(small, big, dtype), joined(marks)


@_euclidean.defjvp
def _euclidean_jvp(
    parts: tuple[Part, ...], roles: tuple[str, ...], primals: Any, tangents: Any
) -> Any:
    # The derivative of the sums is 0 * inf if one of them overflows or vanishes. The
    # derivative of the norm is the unit vector, and by convention zero at zero.
    (leaves,), (dots,) = primals, tangents
    value, marks = _euclidean(leaves, parts, roles)
    usable = jnp.isfinite(value) & (value > 0)
    length = jnp.where(usable, value, 1.0)

    def along(x: jax.Array, dot: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            return along(x.real, dot.real) + along(x.imag, dot.imag)
        unit = jnp.where(usable, ratio(x.astype(value.dtype), length), 0.0)
        return jnp.sum(unit * dot.astype(value.dtype))

    slopes = [along(x, dot) for x, dot in zip(leaves, dots, strict=True)]
    slope = add_pairwise(
        [_psum(add_pairwise(part.of(slopes)), part.axes) for part in parts]
    )
    return (value, marks), (slope, np.zeros(marks.shape, jax.dtypes.float0))


def _psum(x: jax.Array, axes: Names) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _squares(
    dtype: Any,
    runs: Runs,
    roles: tuple[str, ...],
    *leaves: jax.Array,
    in_pairs: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of squares of entries scaled up, and down; the marks of bad leaves."""
    up, down = not_folded(dtype, *SCALES[dtype])
    members = values_by_run(list(zip(roles, leaves, strict=True)), runs)
    groups = [alike(run) for run in members]
    if in_pairs:
        pairs = [
            add_pairwise([_sum_pairs(x, dtype, up, down) for x in g]) for g in groups
        ]
        total = add_pairwise(pairs)
        return total.real, total.imag, _marks([x.imag for x in pairs], runs)

    def sums(scale: jax.Array) -> list[jax.Array]:
        return [
            add_pairwise([_sum_squares(x, dtype, scale) for x in g]) for g in groups
        ]

    totals = sums(down)
    return add_pairwise(sums(up)), add_pairwise(totals), _marks(totals, runs)


def _squares_cpu(
    dtype: Any, runs: Runs, *leaves: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same numbers from a plain sum, and from a second look if that fails."""
    up, down = not_folded(dtype, *SCALES[dtype])
    # Here one vector compiles faster than many scalars.
    total = _sum_vector(jnp.stack([_sum_squares([x], dtype, 1.0) for x in leaves]))
    too_small = total < _SMALLEST_PLAIN_SUM
    scale = jnp.where(too_small, up, down)

    def enough(*leaves: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del leaves
        # A constant would not vary over the devices of `shard_map` as `rescaled` does.
        none = jnp.where(too_small, no_marks(), no_marks())
        return total * up * up, total * down * down, none

    def rescaled(*leaves: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums = jnp.stack([_sum_squares([x], dtype, scale) for x in leaves])
        total = _sum_vector(sums)
        return (
            jnp.where(too_small, total, jnp.inf),
            jnp.where(too_small, 0.0, total),
            marks_of(sums, runs),
        )

    second_look = too_small | ~jnp.isfinite(total)
    return lax.switch(second_look.astype(jnp.int32), [enough, rescaled], *leaves)


def _sum_norm(
    leaves: list[jax.Array], parts: tuple[Part, ...]
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(leaves)
    sums, marks = [], []
    for part in parts:
        each = [jnp.sum(jnp.abs(x).astype(dtype)) for x in part.of(leaves)]
        runs = [add_pairwise(run) for run in values_by_run(each, part.runs)]
        (total,), own_marks = add_up(
            part, (add_pairwise(runs),), _marks(runs, part.runs)
        )
        sums.append(total)
        marks.append(own_marks)
    return add_pairwise(sums), joined(marks)


def _marks(of_runs: list[jax.Array], runs: Runs) -> jax.Array:
    """The marks from one value for each run."""
    return marks_of(jnp.stack(of_runs), tuple(dict.fromkeys(runs)))


def _max_norm(
    leaves: list[jax.Array], parts: tuple[Part, ...]
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator_dtype(leaves)

    def size(x: jax.Array) -> jax.Array:
        # The largest of several devices' values may leave out a NaN, but no infinity.
        return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x).astype(dtype))

    largest, marks = [], []
    for part in parts:
        each = [jnp.max(size(x), initial=0.0) for x in part.of(leaves)]
        runs = [combine(jnp.maximum, run) for run in values_by_run(each, part.runs)]
        of_all = combine(jnp.maximum, runs)
        largest.append(lax.pmax(of_all, part.axes) if part.axes else of_all)
        marks.append(add_up(part, (), _marks(runs, part.runs))[1])
    return combine(jnp.maximum, largest), of_unknown_kind(joined(marks))


def _power_norm(
    leaves: list[jax.Array], parts: tuple[Part, ...], ord: Any
) -> tuple[jax.Array, jax.Array]:
    # Any other power needs the largest entry first: a second read, for few users.
    dtype = accumulator_dtype(leaves)
    largest, marks = _max_norm(leaves, parts)
    usable = jnp.isfinite(largest) & (largest > 0)
    # The norm does not depend on its unit, so neither does the derivative.
    unit = lax.stop_gradient(jnp.where(usable, largest, 1.0))
    sums = [jnp.sum((jnp.abs(x).astype(dtype) / unit) ** ord) for x in leaves]
    total = add_pairwise([_psum(add_pairwise(p.of(sums)), p.axes) for p in parts])
    root = jnp.where(usable, total, 1.0) ** (1 / ord)
    return jnp.where(usable, unit * root, largest), marks


def _sum_squares(alike: Sequence[jax.Array], dtype: Any, scale: Any) -> jax.Array:
    """Sum of squares of arrays of one shape."""
    return jnp.sum(_entry_squares(alike, dtype, scale))


def _sum_pairs(
    alike: Sequence[jax.Array], dtype: Any, up: jax.Array, down: jax.Array
) -> jax.Array:
    """Both sums of squares in one number, the real and the imaginary part.

    A GPU takes two kernels to reduce one leaf, and a third for a second sum.
    """
    each = [_entry_squares(alike, dtype, scale) for scale in (up, down)]
    return jnp.sum(lax.complex(*each))


def _entry_squares(alike: Sequence[jax.Array], dtype: Any, scale: Any) -> jax.Array:
    """Squares of arrays of one shape, added entry by entry."""
    pairs = [(x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in alike]
    scaled = [x.astype(dtype) * scale for pair in pairs for x in pair]
    return add_pairwise([x * x for x in scaled])


def _sum_vector(values: jax.Array) -> jax.Array:
    """Sum of a vector in two stages: rounding grows with the root of its length."""
    width = math.isqrt(values.size - 1) + 1
    padded = jnp.pad(values, (0, -values.size % width))
    return jnp.sum(jnp.sum(padded.reshape(-1, width), axis=0))
