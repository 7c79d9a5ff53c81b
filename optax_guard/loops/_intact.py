"""The checkpoints of a directory, and which of them are intact.

All processes of a run act on the findings of the first.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optax_guard.loops._digest import damage, write_digest
from optax_guard.loops._warning import warn_user

# The format of the checkpoints that this version writes. Version 0.1.0 wrote 1, which
# had neither a number nor digests.
FORMAT = 2
# The item of JSON, and its file of the same name.
METADATA = "metadata"
# What the first process tells the others, instead of a step.
_NONE, _ALL_DAMAGED = -1, -2


def check_format(metadata: dict[str, Any], where: str) -> None:
    """Refuses a checkpoint of a later version."""
    if (found := metadata.get("format", 1)) > FORMAT:
        raise RuntimeError(
            f"The checkpoint has format {found}, but this version of optax-guard reads "
            f"formats up to {FORMAT} ({where}). Install the version that saved it."
        )


def steps_in(directory: Any) -> list[int]:
    """The steps of the finished checkpoints, the latest first."""
    if not directory.exists():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def damage_of(directory: Any, step: int) -> str | None:
    """The damage of a checkpoint in words, or ``None`` if it is intact."""
    checkpoint = directory / str(step)
    needs_digest = False
    # A damaged file may be anything. Without a digest, Orbax is the one to complain.
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        text = (checkpoint / METADATA / METADATA).read_text()
        needs_digest = json.loads(text).get("format", 1) >= 2
    return damage(checkpoint, needs_digest)


def add_digest(directory: Any, step: int) -> None:
    """Writes the digest of the checkpoint that is about to be finished.

    Orbax gives the directory its name after this, so a checkpoint that is there has a
    digest. On a store without renaming the directory has its name from the first.
    """
    for path in directory.iterdir():
        if path.name.split(".orbax-checkpoint-tmp")[0] == str(step) and path.is_dir():
            write_digest(path)


def choose(directory: Any, candidates: Sequence[int] | None = None) -> int | None:
    """The first candidate that is intact, or ``None`` if there is no candidate.

    Damaged ones before it are named and set aside, so that their steps can be saved
    again. Without one that is intact, all stay where they are.

    Args:
      directory: An `epath.Path`.
      candidates: Steps, the preferred first; by default all, the latest first.

    Raises:
      RuntimeError: If all candidates are damaged.
    """
    chosen, text = _NONE, ""
    if jax.process_index() == 0:
        chosen, text = _choose(directory, candidates)
    # The others wait here: an error of the first process must come later.
    chosen = agreed(chosen)
    if chosen == _ALL_DAMAGED:
        raise RuntimeError(
            f"No checkpoint in {directory} can be used{text}. To start the run from "
            "the beginning, remove the directory or give another."
        )
    if text:
        warn_user(
            f"Damaged checkpoints in {directory}{text}. The run goes on from step "
            f"{chosen}. The damaged ones are renamed to damaged-<step>.",
        )
    return None if chosen == _NONE else chosen


def _choose(directory: Any, candidates: Sequence[int] | None) -> tuple[int, str]:
    """The step, or a mark, and the damage found in words."""
    steps = steps_in(directory) if candidates is None else candidates
    damaged: dict[int, str] = {}
    for step in steps:
        if (why := damage_of(directory, step)) is None:
            break
        damaged[step] = why
    else:
        step = _ALL_DAMAGED if damaged else _NONE
    if not damaged:
        return step, ""
    text = "; ".join(f"step {other}: {why}" for other, why in damaged.items())
    for other in damaged if step >= 0 else ():
        if (old := directory / f"damaged-{other}").exists():
            old.rmtree()
        (directory / str(other)).rename(old)
    return step, f" ({text})"


def agreed(number: int) -> int:
    """The number of the first process, on all."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
