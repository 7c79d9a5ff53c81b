"""The way back through operations that have a body: loops, branches, ``shard_map``."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from optax_guard.debug._entries import Entry, Scene
from optax_guard.debug._execution import Devices
from optax_guard.debug._loops import enter_loop
from optax_guard.debug._origin import NonfiniteOrigin
from optax_guard.debug._program import Program, Step, flatten

Source = NonfiniteOrigin | Entry | None


def entrance(step: Step, devices: Devices) -> Callable[[Scene, Entry], Source] | None:
    """The function that goes into the body of an operation; ``None`` if it has none."""
    known = {"scan": enter_loop, "while": enter_loop, "cond": _enter_branch}
    if not devices.axes:
        known["shard_map"] = _enter_devices
    return known.get(step.eqn.primitive.name)


def _enter_branch(scene: Scene, entry: Entry) -> Source:
    choice, *operands = scene.operands
    device = entry.at[: len(scene.devices.axes)]
    step = scene.step
    branch = step.eqn.params["branches"][int(choice[device])]
    program = flatten(branch, (*step.callers, step.eqn))
    targets = {program.outputs[entry.position]: entry.at}
    source = scene.walk_back(program, scene.devices, operands, targets, scene.kind)
    if isinstance(source, Entry):
        return Entry(source.position + 1, source.at)
    return source


def _enter_devices(scene: Scene, entry: Entry) -> Source:
    """Goes into the body of ``shard_map``, to the device that holds the bad entry."""
    params = scene.step.eqn.params
    inside, program, operands = open_devices(scene.step, scene.operands)
    out: Any = scene.step.eqn.outvars[entry.position].aval
    index = _to_device(inside, params["out_specs"][entry.position], out.shape, entry)
    targets = {program.outputs[entry.position]: index}
    source = scene.walk_back(program, inside, operands, targets, scene.kind)
    if isinstance(source, Entry):
        return to_outside(scene.step, inside, operands, source)
    return source


def open_devices(
    step: Step, operands: Sequence[Any]
) -> tuple[Devices, Program, list[Any]]:
    """The body of a ``shard_map``, and its inputs with the leading mesh axes."""
    params = step.eqn.params
    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    mesh = params["mesh"]
    axes = tuple(a for a in mesh.axis_names if a in manual)
    inside = Devices(mesh, axes, params["check_vma"])
    split = inside.mapped(
        lambda *x: inside.stacked(list(x)), params["in_specs"], PartitionSpec(*axes)
    )
    program = flatten(params["jaxpr"], (*step.callers, step.eqn))
    return inside, program, jax.jit(split)(*operands)


def to_outside(
    step: Step, inside: Devices, operands: Sequence[Any], entry: Entry
) -> Entry:
    """The entry of an operand of ``shard_map`` for one of an input of its body."""
    position, index = entry
    spec = step.eqn.params["in_specs"][position]
    local = operands[position].shape[len(inside.axes) :]
    return Entry(position, _to_global(inside, spec, local, index))


def _to_device(
    devices: Devices, spec: Any, shape: tuple[int, ...], entry: Entry
) -> tuple[int, ...]:
    """The index of an entry of a global array in the array with leading mesh axes."""
    device = dict.fromkeys(devices.axes, 0)
    local = list(entry.at)
    for dim, names in _split_dims(spec):
        sizes = [devices.mesh.shape[name] for name in names]
        size = shape[dim] // int(np.prod(sizes))
        block, local[dim] = divmod(local[dim], size)
        at = np.unravel_index(block, sizes)
        device |= dict(zip(names, map(int, at), strict=True))
    return (*device.values(), *local)


def _to_global(
    devices: Devices, spec: Any, local: tuple[int, ...], at: tuple[int, ...]
) -> tuple[int, ...]:
    """The inverse of `_to_device`; ``local`` is the shape of the part on one device."""
    count = len(devices.axes)
    device = dict(zip(devices.axes, at[:count], strict=True))
    index = list(at[count:])
    for dim, names in _split_dims(spec):
        sizes = [devices.mesh.shape[name] for name in names]
        block = int(np.ravel_multi_index([device[name] for name in names], sizes))
        index[dim] += block * local[dim]
    return tuple(index)


def _split_dims(spec: Any) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions that a spec splits, each with its mesh axes."""
    named = [(dim, x if isinstance(x, tuple) else (x,)) for dim, x in enumerate(spec)]
    return [(dim, names) for dim, names in named if names not in [(None,), ()]]
