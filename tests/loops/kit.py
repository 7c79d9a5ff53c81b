"""Two programs from one file: a loop as others write it, and the same with the guard.

A line that ends in `# theirs` is of the first program alone, one that ends in
`# guarded` of the second alone. So the marked lines are the difference of the two.
"""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np

FOLDER = Path(__file__).parent
THEIRS, GUARDED = "# theirs", "# guarded"
LENGTH, BAD = 6, 2


def source(name: str) -> list[str]:
    return (FOLDER / f"{name}.py").read_text("utf-8").splitlines()


@functools.cache
def load(name: str, *, is_guarded: bool) -> Any:
    """The module of a loop, without the lines of the other program."""
    left_out = THEIRS if is_guarded else GUARDED
    lines = ["" if line.endswith(left_out) else line for line in source(name)]
    module = types.ModuleType(f"{name}_{'guarded' if is_guarded else 'theirs'}")
    sys.modules[module.__name__] = module  # Where dataclasses look for their types.
    code = compile("\n".join(lines), str(FOLDER / f"{name}.py"), "exec")
    exec(code, vars(module))  # Its own tests' code.
    return module


def run(loop: Any, state: Any, steps: range, fault: float = 1.0) -> list[Any]:
    """States after each step, the first one included; the batch `BAD` has the fault."""
    states = [state]
    for i in steps:
        state, loop.log = loop.step(state, loop.batch(i, fault if i == BAD else 1.0))
        states.append(state)
    return states


@functools.cache
def clean(name: str, *, is_guarded: bool) -> tuple[Any, list[Any]]:
    """A loop and the states of its run on good batches."""
    loop = load(name, is_guarded=is_guarded)
    return loop, run(loop, loop.create(), range(LENGTH))


def numbers(tree: Any) -> np.ndarray:
    """All that is floating, in one row."""
    leaves = [np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]
    return np.concatenate([x for x in leaves if np.issubdtype(x.dtype, np.floating)])
