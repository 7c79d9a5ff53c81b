"""The kinds of loggers. Their methods tell them: none of the libraries is imported."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from optax_guard._records.diagnosis import Diagnosis
from optax_guard._records.findings import FindingCode, Severity
from optax_guard._records.grouped import grouped_row

LogFunction = Callable[[int, dict[str, float]], Any]
# Severity of a finding -> level of an alert, in W&B and in trackio.
_LEVELS = {Severity.INFO: "INFO", Severity.WARNING: "WARN", Severity.ERROR: "ERROR"}


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


@runtime_checkable
class AlertingRun(Protocol):
    """A run of W&B or trackio; or the module `trackio`, which logs to its run."""

    @property
    def log(self) -> Callable[..., Any]:
        """``log(row, step=)``."""
        ...

    @property
    def alert(self) -> Callable[..., Any]:
        """``alert(title=, text=, level=)``."""
        ...


@runtime_checkable
class MetricsLogger(Protocol):
    """The module `mlflow`, or a logger of Lightning or Comet."""

    @property
    def log_metrics(self) -> Callable[..., Any]:
        """``log_metrics(row, step=)``."""
        ...


@runtime_checkable
class LoggingBackend(Protocol):
    """A backend of metrax."""

    def log_scalar(self, event: str, value: float, /, **kwargs: Any) -> Any:
        """Logs one scalar; ``step`` is among the keywords."""
        ...


Writer = MetricWriter | SummaryWriter | AlertingRun | MetricsLogger | LoggingBackend
Logger = LogFunction | Writer


def is_logger(logger: Any) -> bool:
    """Whether `fit` can log to an object."""
    return callable(logger) or isinstance(logger, Writer)


def log_function(logger: Logger, past: Iterable[Mapping[str, Any]] = ()) -> LogFunction:
    """A function ``(step, row)`` that hands rows to a logger.

    Args:
      logger: A function, which gets the rows as they are; or anything else of `Logger`,
        which gets names in groups.
      past: Rows before a resumption, whose findings were told.
    """
    if isinstance(logger, MetricWriter):
        return lambda step, row: logger.write_scalars(step, grouped_row(row))
    if callable(logger):
        return logger
    if isinstance(logger, SummaryWriter):
        return lambda step, row: _add_scalars(logger, step, row)
    if isinstance(logger, AlertingRun):
        return _WithAlerts(logger, past)
    if isinstance(logger, MetricsLogger):
        return lambda step, row: logger.log_metrics(grouped_row(row), step=step)
    return lambda step, row: _log_scalars(logger, step, row)


def _add_scalars(writer: SummaryWriter, step: int, row: Mapping[str, float]) -> None:
    for name, value in grouped_row(row).items():
        writer.add_scalar(name, value, step)


def _log_scalars(backend: LoggingBackend, step: int, row: Mapping[str, float]) -> None:
    for name, value in grouped_row(row).items():
        backend.log_scalar(name, value, step=step)


class _WithAlerts:
    """Logs rows, and each kind of finding once, as an alert of its severity."""

    def __init__(self, run: AlertingRun, past: Iterable[Mapping[str, Any]]):
        self._run = run
        self._diagnosis = Diagnosis()
        self._told: set[FindingCode] = set()
        for row in past:
            self._told |= {x.code for x in self._diagnosis.update(row)}

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(grouped_row(row), step=step)
        for finding in self._diagnosis.update({**row, "step": step}):
            if finding.code not in self._told:
                self._told.add(finding.code)
                level = _level(self._run, _LEVELS[finding.severity])
                self._run.alert(title=str(finding.code), text=str(finding), level=level)


def _level(run: AlertingRun, name: str) -> Any:
    """The level of an alert, as the run's library writes it."""
    # trackio takes only its own kind. Whoever made a run has imported its library.
    library = sys.modules.get(run.alert.__module__.partition(".")[0])
    levels = getattr(library, "AlertLevel", None)
    return name if levels is None else levels[name]
