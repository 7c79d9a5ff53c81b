"""Compiles all programs of a part side by side, runs them, writes a line for each."""

import importlib.metadata
import json
import math
import os
import pathlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.neutral._contenders import CONTENDERS, SECOND, Contender
from benchmarks.neutral._runs import (
    QUICK,
    SIZES,
    Size,
    inputs_of,
    lower,
    optimizers_of,
    rates_of,
    scores_of,
    seeds_of,
)
from benchmarks.neutral._tasks import PARTS, TASKS, Task


class Program(NamedTuple):
    """What is compiled once and run for each length."""

    task_name: str
    task: Task
    name: str
    contender: Contender
    inputs: tuple[Any, Any, Any]


class Study:
    """The runs of a part, as many as fit into the time.

    A line of the file is a contender's scores, [setting][learning rate][seed], tuning
    seeds first, on a task with an optimizer and a length; null if not finite.
    """

    def __init__(self, path: pathlib.Path, size: Size, seconds: float) -> None:
        self.path, self.size = path, size
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.lock = threading.Lock()
        versions = {n: importlib.metadata.version(n) for n in ("jax", "optax", "numpy")}
        device = jax.devices()[0].device_kind
        path.write_text("")
        self.add({"device": device, "cores": os.cpu_count(), "versions": versions})

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "at": self.seconds()}) + "\n")

    def run(self, program: Program, compiled: Any, steps: int) -> None:
        """Runs one program for one length, if there is time, and writes its lines."""
        contender, size = program.contender, self.size
        with self.lock:
            if time.monotonic() > self.end:
                print(f"no time left: {program.task_name}, {program.name}, {steps}")
                return
            started = time.monotonic()
            scores = scores_of(compiled, contender, size, program.inputs, steps)
            took = round(time.monotonic() - started, 2)
            what = f"{program.task_name}, {program.name}, {steps}"
            print(f"{self.seconds():6} {what}: {took} s")
            for optimizer, found in zip(optimizers_of(contender), scores, strict=True):
                self.add(
                    {
                        "task": program.task_name,
                        "contender": program.name,
                        "optimizer": optimizer,
                        "steps": steps,
                        "trivial": program.task.trivial,
                        "tuning_seeds": size.tuning_seeds,
                        "rates": rates_of(optimizer, contender, size).tolist(),
                        "run_seconds": took,
                        "scores": short(found),
                    }
                )

    def compile(self, program: Program, lowered: Any) -> Any:
        if time.monotonic() > self.end:
            return None
        compiled = lowered.compile()
        self.run(program, compiled, self.size.steps[0])
        return compiled


def short(scores: np.ndarray) -> Any:
    """Nested lists, with five digits."""
    if scores.ndim:
        return [short(x) for x in scores]
    return float(f"{scores:.5g}") if math.isfinite(scores) else None


def programs_of(
    tasks: tuple[str, ...], size: Size, contenders: dict[str, Contender]
) -> list[Program]:
    """Each contender on each task; if quick, on one task only, in turns."""
    made = {name: TASKS[name]() for name in tasks}
    inputs = {name: inputs_of(task, size) for name, task in made.items()}
    return [
        Program(task, made[task], name, contender, inputs[task])
        for i, (name, contender) in enumerate(contenders.items())
        for j, task in enumerate(tasks)
        if size is not QUICK or i % len(tasks) == j
    ]


def run_part(part: str | None, number: int, out: pathlib.Path, seconds: float) -> None:
    """Runs a part of a round, or, if it is None, a few steps of everything."""
    size = SIZES[number] if part else QUICK
    contenders = CONTENDERS if part and number == 1 else CONTENDERS | SECOND
    tasks = PARTS[part] if part else tuple(TASKS)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(out / f"neutral_{part or 'quick'}.jsonl", size, seconds)
    print(f"seeds {seeds_of(size).tolist()}, {jax.devices()[0].device_kind}")
    waiting: list[tuple[Program, Future[Any]]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for program in programs_of(tasks, size, contenders):
            lowered = lower(program.task, program.contender, size, program.inputs)
            waiting.append((program, pool.submit(study.compile, program, lowered)))
        print(f"{study.seconds():6} all lowered")
        for steps in size.steps[1:]:
            for program, future in waiting:
                compiled = future.result()
                if compiled is not None:
                    study.run(program, compiled, steps)
    for _, future in waiting:
        future.result()
    print(f"{study.seconds():6} done")
