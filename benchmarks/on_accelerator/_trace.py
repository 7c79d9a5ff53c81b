"""The kernels that a device ran, from the trace that JAX's profiler writes."""

import collections
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Traced(NamedTuple):
    """What a device did while it was traced.

    Attributes:
      kernels: How many kernels ran.
      copies: How many copies and fills ran, which are no kernels.
      busy: Seconds in which at least one of them ran.
      span: Seconds from the start of the first to the end of the last.
      longest: The names that took most, without their numbers, with their seconds.
    """

    kernels: int
    copies: int
    busy: float
    span: float
    longest: list[tuple[str, float]]


def trace(run: Callable[[], Any]) -> Traced | None:
    """Runs something, and returns what the device did; None where nothing is seen.

    `run` must wait for the device before it returns.
    """
    options = jax.profiler.ProfileOptions()
    # What Python does is not asked for, and would slow it.
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return read(pathlib.Path(folder))


def read(folder: pathlib.Path) -> Traced | None:
    """Reads the newest trace of a folder."""
    found = sorted(folder.glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        return None
    with gzip.open(found[-1]) as file:
        return summarize(json.load(file)["traceEvents"])


def summarize(events: list[dict[str, Any]]) -> Traced | None:
    """Adds up the events of a device's streams, or of its operations on a TPU."""
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name"
        and event["args"]["name"].startswith("/device:")
    }
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name" and event["pid"] in devices
    }
    # The other threads of a device name the same time again, by module or by operation.
    wanted = {key for key, name in threads.items() if name.startswith("Stream")} or {
        key for key, name in threads.items() if name == "XLA Ops"
    }
    ran = sorted(
        (event["ts"], event["ts"] + event.get("dur", 0.0), event["name"])
        for event in events
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in wanted
    )
    if not ran:
        return None
    busy, reached = 0.0, ran[0][0]
    longest: collections.Counter[str] = collections.Counter()
    for start, end, name in ran:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        longest[re.sub(r"[_.]?\d+", "", name)] += end - start
    copies = sum(name.lower().startswith(("memcpy", "memset")) for *_, name in ran)
    return Traced(
        kernels=len(ran) - copies,
        copies=copies,
        busy=1e-6 * busy,
        span=1e-6 * (reached - ran[0][0]),
        longest=[(name, 1e-6 * time) for name, time in longest.most_common(6)],
    )
