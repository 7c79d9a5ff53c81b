"""The leaves of a skipped step that were not finite, and those beside them, by name."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey

from optax_guard._guarding.readout import is_on_this_host
from optax_guard._norms.marks import MAX_RUNS, kinds_of_runs, run_size
from optax_guard._trees import is_inexact, path_names

# A leaf, or a run of neighbours, and the kind of its gradient.
Verdict = tuple[str | int, str]
FINITE = "finite"
# By the bits of NaN and of infinity.
_KINDS = {(1, 0): "NaN", (0, 1): "Inf", (1, 1): "NaN or Inf", (0, 0): FINITE}


def verdicts_of(marks: np.ndarray, num_leaves: int, params: Any) -> tuple[Verdict, ...]:
    """The bad leaves in the order of the model, with their finite neighbours.

    Args:
      marks: int32[8], the marks of the leaves.
      num_leaves: How many leaves the gradients had.
      params: The parameters. If they have another number of leaves, those of the
        gradients are not known; bad ones then have their index as a name.
    """
    nan, inf = kinds_of_runs(marks)
    kinds = [_KINDS[int(a), int(b)] for a, b in zip(nan, inf, strict=True)]
    size = int(run_size(num_leaves))
    paths = path_names(params)
    if len(paths) != num_leaves:
        # A part of the parameters, as under a mask: which part is not known here.
        return tuple(
            (run * size, kind) for run, kind in enumerate(kinds) if kind != FINITE
        )
    counts = [is_inexact(x) for x in jax.tree.leaves(params)]
    place = {leaf: i for i, leaf in enumerate(model_order(params))}
    found: list[tuple[int, Verdict]] = []
    for run in range(min(MAX_RUNS, -(-num_leaves // size))):
        leaves = range(run * size, min(num_leaves, (run + 1) * size))
        if leaves := [i for i in leaves if counts[i]]:
            ends = dict.fromkeys((paths[leaves[0]], paths[leaves[-1]]))
            verdict = " to ".join(ends), kinds[run]
            found.append((min(place[i] for i in leaves), verdict))
    ordered = [verdict for _, verdict in sorted(found)]
    is_bad = [False, *(kind != FINITE for _, kind in ordered), False]
    return tuple(v for i, v in enumerate(ordered) if any(is_bad[i : i + 3]))


def model_order(tree: Any) -> list[int]:
    """The indices of the leaves, in the order in which the model has them.

    Fields and lists are in that order. JAX sorts the names in a dict, as text. A dict
    that is not sorted has kept the order of the model. In one that is sorted, numbers
    count as numbers: ``layers_2`` comes before ``layers_10``.
    """
    count = iter(range(len(jax.tree.leaves(tree))))

    def visit(node: Any) -> list[int]:
        below = jax.tree.leaves_with_path(node, is_leaf=lambda x: x is not node)
        if len(below) == 1 and not below[0][0]:
            return [next(count)]
        children = [(path[0], visit(child)) for path, child in below]
        keys = [key.key for key, _ in children if isinstance(key, DictKey)]
        if isinstance(node, Mapping) and len(keys) == len(children):
            own = [key for key in node if key in keys]
            is_sorted = own == keys
            by = _natural if is_sorted else own.index
            children.sort(key=lambda child: by(child[0].key))
        return [leaf for _, leaves in children for leaf in leaves]

    return visit(tree)


def _natural(key: Any) -> list[Any]:
    """Text and whole numbers in turn."""
    parts = re.split(r"(\d+)", str(key))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def as_text(verdicts: Iterable[Verdict]) -> str:
    """The leaves in words; empty if none was bad."""
    verdicts = list(verdicts)
    blocks = [
        (kind, _names(list(group))) for kind, group in groupby(verdicts, lambda v: v[1])
    ]
    bad = [f"{kind} in {names}" for kind, names in blocks if kind != FINITE]
    finite = [names for kind, names in blocks if kind == FINITE]
    if finite:
        bad.append(f"finite beside it: {', '.join(finite)}")
    return "; ".join(bad)


def _names(block: list[Verdict]) -> str:
    if len(block) > 2:
        return f"{block[0][0]} to {block[-1][0]} ({len(block)} leaves)"
    # A tree that is one array has no names.
    return ", ".join("the only leaf" if name == "" else str(name) for name, _ in block)


def bad_parameters(params: Any) -> list[str]:
    """Names of the parameters that are not finite. Reads all of them, and waits.

    Those that are split over several processes are left out.
    """
    leaves = jax.tree.leaves(params)
    return [
        name
        for x, name in zip(leaves, path_names(params), strict=True)
        if is_inexact(x) and is_on_this_host(x) and not bool(jnp.isfinite(x).all())
    ]
