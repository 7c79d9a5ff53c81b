"""`optax-guard replay`: where stop rules would have stopped a recorded run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optax_guard._files import fresh
from optax_guard._history import History
from optax_guard._replay import Replayed, replay, replay_table
from optax_guard._rule_text import parse_rule

DEFAULT_RULES = tuple(f"patience({n})" for n in (1, 2, 3, 5, 8, 13, 20))


def play(
    path: Path, texts: Sequence[str], *, key: str | None, mode: str, **how: Any
) -> tuple[History, list[Replayed]]:
    """Reads a run and plays it to the rules; ``how`` as for `History.read`."""
    history = History.read(path, **how)
    rules = {text: parse_rule(text) for text in texts or DEFAULT_RULES}
    return history, replay(history, rules, key=key, mode=mode)


def as_json(replayed: Sequence[Replayed]) -> str:
    """One JSON object; what is not finite is null."""
    return json.dumps(
        {
            "rules": [
                {
                    name: None if isinstance(x, float) and not math.isfinite(x) else x
                    for name, x in (one._asdict() | {"reason": one.reason.name}).items()
                }
                for one in replayed
            ]
        },
        allow_nan=False,
    )


def write(
    history: History, replayed: Sequence[Replayed], out: Path, *, key: str | None
) -> list[Path]:
    """Writes the table, and the figure if matplotlib is there, into the folder."""
    text = fresh(out / "replay.txt")
    text.write_text(replay_table(replayed) + "\n", encoding="utf-8")
    try:
        from optax_guard._plot_replay import plot_replay
    except ImportError:
        return [text]
    picture = fresh(out / "replay.png")
    plot_replay(history, replayed, key=key).savefig(picture)
    return [text, picture]
