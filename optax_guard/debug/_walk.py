"""The way back from a bad result to the operation that made it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optax_guard.debug._advice import Facts, advice_for
from optax_guard.debug._bodies import entrance
from optax_guard.debug._entries import Entry, Scene, find_source
from optax_guard.debug._execution import Devices, run
from optax_guard.debug._origin import (
    NonfiniteOrigin,
    first_bad_entry,
    summarize,
)
from optax_guard.debug._program import Program, Step
from optax_guard.debug._source import find_place

KINDS = ("nan", "inf")


def walk_back(
    program: Program,
    devices: Devices,
    inputs: Sequence[Any],
    targets: Mapping[int, tuple[int, ...] | None],
    kind: str,
    flags: Mapping[int, Any] | None = None,
) -> NonfiniteOrigin | Entry | None:
    """Follows a bad entry through the operations that passed it on.

    A first run finds the bad values. A second one keeps those on the way. Then each
    step goes from an entry of a result to an entry of an operand.

    Args:
      program: The program.
      devices: Where it runs.
      inputs: Its inputs.
      targets: Numbers of bad values, each with a bad entry, or with ``None`` for its
        first. The one that is made first is followed.
      kind: ``"nan"`` or ``"inf"``.
      flags: The second result of `run` for the whole program, if it is known.

    Returns:
      The origin; or the entry of an input from which the target comes; or ``None`` if
      a constant was bad from the start.
    """
    if flags is None:
        flags = run(program, devices, inputs, (), len(program.steps))[1]
    made_by = {i: n for n, step in enumerate(program.steps) for i in step.outputs}
    current = min(targets, key=lambda i: made_by.get(i, -1))
    index = targets[current]
    on_the_way = _steps_on_the_way(program, current, made_by, flags, kind)
    keep = {current, *program.inputs}
    for n in on_the_way:
        keep |= {*program.steps[n].inputs, *program.steps[n].outputs}
    values = run(program, devices, inputs, keep, max(on_the_way, default=-1) + 1)[0]
    if index is None:
        index = first_bad_entry(kind, values[current])
    while current in made_by:
        step = program.steps[made_by[current]]
        operands = [values[i] for i in step.inputs]
        entry = Entry(step.outputs.index(current), index)
        enter = entrance(step, devices) or find_source
        source = enter(Scene(walk_back, step, devices, operands, kind), entry)
        if isinstance(source, NonfiniteOrigin):
            return source
        # A constant that is bad from the start has no operation; its reader has one.
        if source is None or step.inputs[source.position] in program.constants:
            return _describe(program, devices, step, values, entry, kind)
        current, index = step.inputs[source.position], source.at
    if current in program.constants:
        return None
    return Entry(program.inputs.index(current), index)


def _steps_on_the_way(
    program: Program,
    target: int,
    made_by: Mapping[int, int],
    flags: Mapping[int, Any],
    kind: str,
) -> list[int]:
    """Numbers of the steps with a bad result that may have reached the target."""
    wanted, found = {target}, []
    for n in range(made_by.get(target, -1), -1, -1):
        step = program.steps[n]
        if wanted.intersection(step.outputs):
            found.append(n)
            wanted |= {i for i in step.inputs if flags[i][KINDS.index(kind)]}
    return found


def _describe(
    program: Program,
    devices: Devices,
    step: Step,
    values: Mapping[int, jax.Array],
    entry: Entry,
    kind: str,
) -> NonfiniteOrigin:
    """The record of an operation that made a bad entry."""
    # Under `shard_map`, on the device of the entry.
    device = entry.at[: len(devices.axes)]
    result = values[step.outputs[entry.position]][device]
    operands = tuple(summarize(values[i][device]) for i in step.inputs)
    place = find_place(step)
    beside = frozenset(
        other.eqn.primitive.name
        for other in program.steps
        if find_place(other)[:2] == place[:2]
    )
    name = step.eqn.primitive.name
    summary = summarize(result)
    facts = Facts(kind, name, operands, summary, place.is_backward, beside)
    return NonfiniteOrigin(
        kind=kind,
        primitive=name,
        **place._asdict(),
        operands=operands,
        result=summary,
        num_bad=summary.num_nan if kind == "nan" else summary.num_inf,
        first_bad=first_bad_entry(kind, result),
        iteration=(),
        advice=advice_for(facts),
    )
