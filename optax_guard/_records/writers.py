"""Scalars on their way to TensorBoard or CLU, under names in groups."""

import re
from collections.abc import Mapping
from typing import Any

from optax_guard._checks import check_kind

_GROUPS = {
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


def grouped_name(name: str) -> str:
    """The name of a row's value in a group: grad, guard, train or val.

    Args:
      name: Name of a value in a row of `fit` or in `optax_guard.metrics`.

    Returns:
      The name with its group; any other as it is.

    Raises:
      TypeError: If ``name`` is no string.

    Examples:
      >>> from optax_guard.analysis import grouped_name
      >>> [grouped_name(x) for x in ("grad_norm", "grad_norm_1", "val_loss", "mine")]
      ['grad/norm', 'grad/norm_1', 'val/loss', 'mine']
    """
    check_kind("name", name, str, "a string")
    # `optax_guard.metrics` numbers what a second clip has measured.
    number = re.search(r"_\d+$|$", name)
    suffix = number[0] if number else ""
    base = name.removesuffix(suffix)
    if base in _GROUPS:
        return _GROUPS[base] + suffix
    for group in ("train_", "val_"):
        if name.startswith(group) and len(name) > len(group):
            return name.replace("_", "/", 1)
    return name


class GroupedWriter:
    """A logger for `optax_guard.flax.fit` that writes under `grouped_name`.

    Args:
      writer: A writer of TensorBoard's event files with ``add_scalar(name, value,
        step)``, such as tensorboardX's ``SummaryWriter`` (`optax-guard[log]`) or that
        of PyTorch; or one of CLU's, with ``write_scalars(step, scalars)``. It is left
        open: close it when the run is over.

    Raises:
      TypeError: If ``writer`` has neither.

    Examples:
      >>> from optax_guard.analysis import GroupedWriter
      >>> class Printer:
      ...     def write_scalars(self, step, scalars):
      ...         print(step, scalars)
      >>> GroupedWriter(Printer())(10, {"step": 10, "grad_norm": 2.0, "val_loss": 0.5})
      10 {'grad/norm': 2.0, 'val/loss': 0.5}
    """

    def __init__(self, writer: Any):
        if not (hasattr(writer, "write_scalars") or hasattr(writer, "add_scalar")):
            raise TypeError(
                "`writer` must have `write_scalars`, as CLU's writers do, or "
                f"`add_scalar`, as tensorboardX's, got a `{type(writer).__name__}`."
            )
        self._writer = writer

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the row of a step."""
        scalars = {grouped_name(k): v for k, v in row.items() if k != "step"}
        if hasattr(self._writer, "write_scalars"):
            self._writer.write_scalars(step, scalars)
            return
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
