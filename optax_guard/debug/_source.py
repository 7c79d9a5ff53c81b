"""Where an operation stands: the user's line, the name scope, the pass."""

import functools
import linecache
import sys
import sysconfig
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from optax_guard.debug._program import Step, body_of_call, open_jaxpr

_DEBUG = ("optax_guard.debug",)
_JAX = ("jax", "jaxlib", "python")  # Its standard library included.
_LIBRARIES = ("optax", "flax", "equinox", "chex", "jaxtyping", "optax_guard")
_PYTHON = sysconfig.get_path("stdlib")
# Scopes that JAX opens itself.
_OWN_SCOPES = frozenset({"checkpoint", "rematted_computation"})


class Place(NamedTuple):
    """Where an operation stands; the fields are those of `NonfiniteOrigin`."""

    filename: str
    line: int
    function: str
    source: str
    scope: str
    is_backward: bool


NOWHERE = Place("", 0, "", "", "", False)


def find_place(step: Step) -> Place:
    """The innermost line of the user that led to an operation, and its scope.

    The body of a jitted function of a library is traced once and then reused, and has
    no user's line. The line is then that of the call. If there is no user at all, as
    when an optimizer of Optax is traced alone, it is the innermost line outside of JAX.
    """
    equations = (step.eqn, *step.callers[::-1])
    frames = [f for pair in zip_longest(equations, equations[1:]) for f in _own(*pair)]
    chosen = next((f for f in frames if not _is_in(f, _JAX + _LIBRARIES)), None)
    chosen = chosen or next((f for f in frames if not _is_in(f, _JAX)), None)
    # An equation inside of a loop or a call continues the name stack of that one.
    stack = [x for eqn in equations[::-1] for x in eqn.source_info.name_stack.stack]
    names = [x.name for x in stack]
    scopes = [x.name for x in stack if type(x).__name__ == "Scope"]
    scope = "/".join(name for name in scopes if name not in _OWN_SCOPES)
    # The backward pass of `jax.checkpoint` runs forward operations again.
    is_backward = "transpose" in names and "rematted_computation" not in names
    if chosen is None:
        return NOWHERE._replace(scope=scope, is_backward=is_backward)
    filename, line = chosen.file_name, chosen.line_num
    function = chosen.function_name.rpartition(".")[2]
    source = linecache.getline(filename, line).strip()
    return Place(filename, line, function, source, scope, is_backward)


def _own(eqn: JaxprEqn, caller: JaxprEqn | None) -> list[Any]:
    """The frames of an equation inside of the function that its caller jits.

    A jitted function is traced once. Before JAX 0.10 the frames go on into the first
    call of it, and this may be another call.
    """
    frames = frames_of(eqn)
    body = None if caller is None else open_jaxpr(body_of_call(caller))
    info = getattr(body, "debug_info", None)
    # As in "norm at linalg.py:12".
    name, _, file = (getattr(info, "func_src_info", None) or "").partition(" at ")
    file = file.rpartition(":")[0]
    for n, frame in enumerate(frames):
        if frame.file_name == file and frame.function_name.split(".")[-1] == name:
            return frames[: n + 1]
    return frames


def frames_of(eqn: JaxprEqn) -> list[Any]:
    """The frames from an operation outward, until those of this module."""
    traceback = eqn.source_info.traceback
    frames = []
    for frame in [] if traceback is None else traceback.frames:
        if _is_in(frame, _DEBUG):
            break
        frames.append(frame)
    return frames


def _is_in(frame: Any, modules: tuple[str, ...]) -> bool:
    """Whether the code of a frame belongs to one of these packages."""
    return _file_is_in(frame.file_name, modules)


@functools.cache
def _file_is_in(name: str, modules: tuple[str, ...]) -> bool:
    is_python = name.startswith(_PYTHON) and "-packages" not in name
    if "python" in modules and (is_python or name.startswith("<frozen")):
        return True
    found = (sys.modules.get(module) for module in modules)
    files = (module.__file__ for module in found if module is not None)
    folders = (f"{Path(file).parent}/" for file in files if file is not None)
    return any(name.startswith(folder) for folder in folders)
