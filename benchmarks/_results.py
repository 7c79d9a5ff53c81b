"""How the studies write down what they found."""

import json
import math
import os
import pathlib
import platform
import re
import time
from importlib.metadata import version
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "results"


def write(
    path: pathlib.Path, settings: Any, started: float, content: dict[str, Any]
) -> None:
    """Writes JSON with what one needs to know of a run beside its content."""
    seconds = round(time.monotonic() - started)
    print(f"\nTook {seconds} s.")
    about = {
        "versions": {name: version(name) for name in ("jax", "optax", "numpy")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": seconds,
        "settings": settings._asdict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json({**about, **content}), indent=1)
    # A list of numbers stands on one line.
    text = re.sub(
        r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text
    )
    path.write_text(text + "\n")


def as_json(value: Any) -> Any:
    """Numbers to 5 digits; those that are not finite as strings."""
    if isinstance(value, dict):
        return {key: as_json(x) for key, x in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
