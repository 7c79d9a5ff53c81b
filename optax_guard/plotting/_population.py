"""The figure of a population: evaluations of all members, and how many still run."""

from collections.abc import Sequence

import numpy as np

from optax_guard._checks import check_kind
from optax_guard._records.history import History
from optax_guard.loops._population import PopulationResult
from optax_guard.plotting import _marks as marks

_QUARTILES = (25, 50, 75)


def plot_population(
    population: PopulationResult,
    *,
    key: str = "value",
    labels: Sequence[str] = (),
    title: str = "",
) -> marks.Figure:
    """Draws the evaluations of all members, and how many of them still train.

    Up to five members have a curve with a name each. More members have thin curves; in
    front are the median and the quartiles of those that still train, and the member
    with the lowest value. A dot marks a member that stopped before the end. Values that
    are not finite are crosses at the upper edge.

    Args:
      population: The result of `optax_guard.loops.train_population`.
      key: Column of the history to draw.
      labels: A name for each member; their numbers if empty.
      title: Title of the figure.

    Returns:
      The figure.

    Raises:
      TypeError: If an argument is of another type.
      ValueError: If the history has no column ``key``, or the number of ``labels`` is
        not that of members.

    Examples:
      >>> import numpy as np
      >>> from optax_guard import loops, plotting
      >>> losses = {"step": np.array([[1, 2]] * 2), "value": np.array([[3.0, 2.0]] * 2)}
      >>> found = loops.PopulationResult(None, None, None, losses, np.array([2, 1]))
      >>> figure = plotting.plot_population(found, labels=["0.1", "0.3"])
      >>> [text.get_text() for text in figure.axes[0].get_legend().texts][:2]
      ['0.1', '0.3']
    """
    expected = "the result of `train_population`"
    check_kind("population", population, PopulationResult, expected)
    check_kind("key", key, str, "a string")
    check_kind("labels", labels, Sequence, "a list of names")
    if key not in population.history:
        raise ValueError(
            f"`key` must be a column of the history, one of "
            f"{sorted(population.history)}, got {key!r}."
        )
    counts = np.asarray(population.num_rows)
    if labels and len(labels) != len(counts):
        raise ValueError(
            f"`labels` must name each of {len(counts)} members, got {len(labels)}."
        )
    members = [_member_rows(population, i, key) for i in range(len(counts))]
    names = list(labels) or [f"member {i}" for i in range(len(counts))]
    all_rows = [row for rows in members for row in rows]
    figure, (above, below) = marks.two_panels(all_rows, title)
    if len(members) <= len(marks.STYLES):
        for i, (name, rows) in enumerate(zip(names, members, strict=True)):
            marks.line(above, rows, key, name, marks.STYLES[i], edge=1 - 0.07 * i)
    else:
        _draw_crowd(above, members, names, key)
    last = max(rows[-1]["step"] for rows in members)
    ends = [rows[-1] for rows in members if rows[-1]["step"] < last]
    ends = [row for row in ends if np.isfinite(row[key])]
    if ends:
        steps, values = marks.column(ends, "step"), marks.column(ends, key)
        above.plot(steps, values, label="stopped", **marks.END)
    if marks.spans_decades(all_rows, [key]):
        marks.log_scale(above)
    above.set_ylabel(key)
    steps = np.unique([row["step"] for row in all_rows])
    running = [sum(rows[-1]["step"] >= step for rows in members) for step in steps]
    below.step(steps, running, where="pre", color=marks.BLUE, linewidth=2)
    below.set_ylim(0, 1.05 * len(members))
    below.yaxis.get_major_locator().set_params(integer=True)
    below.set_ylabel("members that train")
    marks.finish(above, below)
    return figure


def _member_rows(population: PopulationResult, i: int, key: str) -> History:
    history = History()
    columns = {name: np.asarray(population.history[name][i]) for name in ("step", key)}
    history.extend(columns, int(population.num_rows[i]))
    return history


def _draw_crowd(
    panel: marks.Axes, members: Sequence[History], names: Sequence[str], key: str
) -> None:
    thin = marks.style(marks.SKY, "", "-", 0.8) | {"zorder": 1.5}
    for rows in members:
        # These have no names: a hundred of them would hide the curves.
        marks.line(panel, rows, key, "", thin)
    steps = np.unique([row["step"] for rows in members for row in rows])
    at = {step: j for j, step in enumerate(steps)}
    values = np.full((len(members), len(steps)), np.nan)
    for i, rows in enumerate(members):
        for row in rows:
            values[i, at[row["step"]]] = row[key]
    values[~np.isfinite(values)] = np.nan
    known = np.isfinite(values).any(0)
    low, middle, high = np.nanpercentile(values[:, known], _QUARTILES, axis=0)
    panel.fill_between(
        steps[known],
        low,
        high,
        color=marks.BLUE,
        alpha=0.25,
        linewidth=0,
        label="quartiles of those that train",
    )
    panel.plot(
        steps[known],
        middle,
        label="median of those that train",
        **marks.style(marks.BLUE, "", "--", 2),
    )
    if known.any():
        best = int(np.argmin(np.min(np.where(np.isfinite(values), values, np.inf), 1)))
        label = f"lowest: {names[best]}"
        marks.line(
            panel, members[best], key, label, marks.style(marks.BLACK, "", "-", 2)
        )
