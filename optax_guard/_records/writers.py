"""Writers of TensorBoard and CLU as loggers. They get scalars under names in groups."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

# Name in a history -> its name in an event file.
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


@runtime_checkable
class MetricWriter(Protocol):
    """A metric writer of CLU."""

    def write_scalars(self, step: int, scalars: Mapping[str, float], /) -> Any:
        """Writes the scalars of one step."""
        ...


@runtime_checkable
class SummaryWriter(Protocol):
    """A writer of event files: tensorboardX's, or PyTorch's."""

    def add_scalar(self, name: str, value: float, step: int, /) -> Any:
        """Writes one scalar of a step."""
        ...


LogFunction = Callable[[int, dict[str, float]], Any]
Logger = LogFunction | MetricWriter | SummaryWriter


def is_logger(logger: Any) -> bool:
    """Whether `fit` can log to an object."""
    return callable(logger) or isinstance(logger, MetricWriter | SummaryWriter)


def log_function(logger: Logger) -> LogFunction:
    """A function ``(step, row)`` that hands rows to a logger."""
    if isinstance(logger, MetricWriter):
        return lambda step, row: logger.write_scalars(step, _grouped_row(row))
    if isinstance(logger, SummaryWriter) and not callable(logger):
        return lambda step, row: _add_scalars(logger, step, row)
    return logger


def _add_scalars(writer: SummaryWriter, step: int, row: Mapping[str, float]) -> None:
    for name, value in _grouped_row(row).items():
        writer.add_scalar(name, value, step)


def _grouped_row(row: Mapping[str, float]) -> dict[str, float]:
    return {grouped_name(name): x for name, x in row.items() if name != "step"}


def grouped_name(name: str) -> str:
    """The name of a value with its group (grad, guard, train or val), if it has one.

    TensorBoard shows the values of a group side by side.

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
