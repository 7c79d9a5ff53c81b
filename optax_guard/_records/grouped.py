"""Names in groups, under which foreign tools show the values of a row."""

import re
from collections.abc import Mapping

# Name in a history -> its name in other tools.
GROUPED_NAMES = {
    "grad_norm": "grad/norm",
    "grad_norm_mean": "grad/norm_mean",
    "norm_mean": "grad/norm_mean",
    "norm_std": "grad/norm_std",
    "norm_max": "grad/norm_max",
    "clipped_norm": "grad/clipped_norm",
    "clip_threshold": "grad/clip_threshold",
    "clip_rate": "grad/clip_rate",
    "nonfinite_rate": "grad/nonfinite_rate",
    "entries_clipped": "grad/entries_clipped",
    "update_cosine": "grad/update_cosine",
    "units_clipped": "grad/units_clipped",
    "num_updates": "grad/num_updates",
    "num_skipped": "guard/num_skipped",
    "num_dropped": "guard/num_dropped",
    "num_vanished": "guard/num_vanished",
    "drop_rate": "guard/drop_rate",
    "skip_rate": "guard/skip_rate",
    "skip_streak": "guard/skip_streak",
    "skip_reason": "guard/skip_reason",
    "guard_exhausted": "guard/exhausted",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "value": "val/value",
}


def grouped_row(row: Mapping[str, float]) -> dict[str, float]:
    """A row under grouped names, without its step."""
    return {grouped_name(name): x for name, x in row.items() if name != "step"}


def grouped_name(name: str) -> str:
    """The name of a value with its group (grad, guard, train or val), if it has one.

    TensorBoard, MLflow and W&B show the values of a group side by side.

    Examples:
      >>> [grouped_name(x) for x in ("grad_norm", "grad_norm_1", "val_loss", "mine")]
      ['grad/norm', 'grad/norm_1', 'val/loss', 'mine']
    """
    # `optax_guard.metrics` adds a number to the measurements of a second clip.
    number = re.search(r"_\d+$|$", name)
    suffix = number[0] if number else ""
    base = name.removesuffix(suffix)
    if base in GROUPED_NAMES:
        return GROUPED_NAMES[base] + suffix
    for group in ("train_", "val_"):
        if name.startswith(group) and len(name) > len(group):
            return name.replace("_", "/", 1)
    return name
