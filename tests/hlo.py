"""Reading programs: their operations, and what is copied where there is a choice."""

import re
from typing import Any

import jax


def primitives(jaxpr: Any) -> list[str]:
    """The names of all operations of a traced program, in its inner ones too."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


def computations(text: str) -> dict[str, str]:
    """The text of each computation of a module, by its name."""
    found = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            found[match[1]] = block
    return found


def copies(text: str, size: int) -> int:
    """How many arrays of at least so many entries are copied, fused or selected."""
    written = re.findall(
        r"= \(?\w+\[([\d,]*)\][^=]*? (?:copy|copy-start|fusion|select)\(", text
    )
    shapes = [[int(n) for n in dims.split(",") if n] for dims in written]
    return sum(_product(shape) >= size for shape in shapes)


def choices_in_loops(text: str, size: int) -> list[tuple[int, list[int]]]:
    """Of each choice between large arrays inside of a loop, the arrays it moves.

    Returns:
      For each conditional: how many arrays of at least ``size`` entries are written in
      the loop's body around it, and how many in each branch.
    """
    whole = computations(text)
    found = []
    for body in whole.values():
        if body.startswith("ENTRY"):
            continue
        for each in re.findall(
            r" conditional\(.*?branch_computations=\{([^}]*)\}", body
        ):
            branches = [whole[name.strip().lstrip("%")] for name in each.split(",")]
            moved = [copies(branch, size) for branch in branches]
            if any(moved):
                found.append((copies(body, size), moved))
    return found


def _product(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
