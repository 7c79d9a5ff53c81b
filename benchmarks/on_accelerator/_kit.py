"""What all parts share: arguments, rows that are written as they come, a time limit."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import time
from typing import Any

import jax

from benchmarks._results import as_json

# Beyond this a part begins nothing new.
SECONDS = 270


def read_arguments(description: str | None) -> argparse.Namespace:
    """Reads the arguments of a part; ends it where there is nothing to measure."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="the folder to write to"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, on a CPU too")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="begin nothing new after these"
    )
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.quick:
        parser.error("JAX finds only a CPU. `--quick` is a dry run on it.")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class Report:
    """A JSON file that is written anew after each row: a cut run keeps what it has."""

    def __init__(self, path: pathlib.Path, **settings: Any) -> None:
        """Notes where and with what this runs, and prints it."""
        self.path = path
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        names = ("jax", "jaxlib", "optax", "flax", "numpy")
        self.about: dict[str, Any] = {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in names},
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **settings,
        }
        print(", ".join(f"{key} {value}" for key, value in self.about.items()))

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        content = {**self.about, "seconds": round(self.seconds(), 1), "rows": self.rows}
        text = json.dumps(as_json(content), indent=1)
        # A list of numbers stands on one line.
        text = re.sub(
            r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text
        )
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(text + "\n")
        unfinished.replace(self.path)


def number(value: float | None, digits: int = 2) -> str:
    """A cell of a table; what was not measured leaves it empty."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints Markdown; the first column is text, the others are numbers."""
    print(
        f"\n{title}\n\n| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|"
    )
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)
