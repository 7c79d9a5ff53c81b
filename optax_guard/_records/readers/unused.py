"""Columns that look like a loss, a norm or an evaluation, and were not used."""

import re
from collections.abc import Collection, Mapping, Sequence

from optax_guard._records.readers.names import COLUMN_NAMES, evaluation_sets, plain

_MOST = 5
_LOOKS = {
    "train_loss": re.compile(r"(?!eval|val|test|dev|n_).*(loss|nll|cross_entropy)"),
    "val_loss": re.compile(
        r"(eval|evaluation|val|valid|validation|dev|test)_(?!.*(time|per_second|step))"
    ),
    "grad_norm": re.compile(r"(?!.*(param|layer|weight|batch|leaf|update)).*norm(_|$)"),
}
_WORDS = {"train_loss": "loss", "val_loss": "evaluation", "grad_norm": "norm"}


def unused_columns(
    names: Sequence[str], found: Collection[str], sources: Mapping[str, str]
) -> list[str]:
    """Says which columns were not used, where a history lacks what they look like.

    Args:
      names: The columns of the file.
      found: The names in a history that have a column.
      sources: Their columns.
    """
    notes = []
    used = set(sources.values())
    for ours, looks in _LOOKS.items():
        if ours in found:
            continue
        others = [x for x in names if x not in used and looks.match(plain(x))]
        if others:
            notes.append(
                f"no column is known as {_WORDS[ours]}: not used are "
                f"{_listed(others)}; name one with `columns={{{ours!r}: ...}}`"
            )
    used_set = sources.get("val_loss", "")
    sets = evaluation_sets(names)
    is_exact = plain(used_set) in COLUMN_NAMES["val_loss"]
    if used_set in sets and not is_exact and len(sets) > 1:
        others = [x for x in sets if x != used_set]
        notes.append(
            f"of several evaluations `val_loss` is {used_set!r}; not used are "
            f"{_listed(others)}"
        )
    return notes


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST]))
    return f"{shown} and {len(names) - _MOST} more" if len(names) > _MOST else shown
