"""The metrics of MLflow, each a series of its own, as the rows of a run."""

from collections.abc import Iterable, Mapping

from optax_guard._records.readers.raw import RawRow

# MLflow watches the machine, too, and numbers its samples.
_SYSTEM = "system/"


def rows_of_series(
    place: str,
    metrics: Mapping[str, Iterable[tuple[int, float]]],
    run: str | None = None,
) -> list[RawRow]:
    """The rows of metrics, by step.

    Args:
      place: The file, for messages.
      metrics: Steps and values of each metric, in the order of time. A step that comes
        again counts from there on, as in a run that was resumed.
      run: The name of the run.
    """
    steps: dict[int, dict[str, float]] = {}
    for name, found in metrics.items():
        series: dict[int, float] = {}
        for step, value in found:
            if series and step < next(reversed(series)):
                series = {k: v for k, v in series.items() if k < step}
            series.pop(step, None)
            series[step] = value
        if not name.startswith(_SYSTEM):
            for step, value in series.items():
                steps.setdefault(step, {})[name] = value
    return [
        RawRow(f"{place}, step {step}", {"step": step, **steps[step]}, run)
        for step in sorted(steps)
    ]
