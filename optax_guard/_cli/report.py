"""The report on one run or several: tables, findings and figures."""

import json
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from optax_guard._cli.report_figures import Drawn, figure_of_runs, figures_of
from optax_guard._cli.report_html import Part, page
from optax_guard._cli.report_summary import side_by_side, summary_of
from optax_guard._records.diagnosis import diagnose
from optax_guard._records.findings import Finding, Severity
from optax_guard._records.history import History
from optax_guard._records.runs import read_runs
from optax_guard._records.table import aligned, as_markdown, thinned
from optax_guard.analysis._table import table

# A longer table leaves out rows at equal distances, but no evaluation.
_MOST_ROWS = 40
_NOTHING = "Nothing needs attention."


class Report(NamedTuple):
    """A run and its findings.

    Attributes:
      name: The run's name.
      source: The file that was read.
      history: Its rows.
      findings: The findings of `diagnose`.
    """

    name: str
    source: Path
    history: History
    findings: list[Finding]


def make_reports(path: Path, **how: Any) -> list[Report]:
    """Reads and diagnoses a run, or all of a file or folder; as `History.read`.

    Of several runs, those that cannot be judged are left out with a warning.
    """
    runs, found, trouble = read_runs(path, **how), [], []
    for name, source, history in runs:
        try:
            if not history:
                raise ValueError(f"{source} holds no rows.")
            found.append(Report(name, source, history, diagnose(history)))
        except ValueError as error:
            trouble.append((name, error))
    if not found:
        raise trouble[0][1]
    for name, error in trouble:
        warnings.warn(f"{path}: the run {name} is left out: {error}", stacklevel=2)
    return found


def own_folder(path: Path) -> Path:
    """Where the report on a file or folder goes: `report` in it, or beside the file."""
    # In the folder of MLflow's metrics every file is a metric.
    is_folder = path.is_dir() and path.name != "metrics"
    return (path if is_folder else path.parent) / "report"


def exit_code(reports: Sequence[Report]) -> int:
    """0 if nothing is worse than an info, 3 for a warning, 4 for an error."""
    severities = {finding.severity for one in reports for finding in one.findings}
    if Severity.ERROR in severities:
        return 4
    return 3 if Severity.WARNING in severities else 0


def as_json(reports: Sequence[Report]) -> str:
    """One object of strict JSON; of several runs their objects are in ``runs``."""
    objects = [
        {
            "history": str(one.source),
            "run": one.name,
            "num_rows": len(one.history),
            "findings": [finding.as_dict() for finding in one.findings],
        }
        for one in reports
    ]
    told = objects[0] if len(objects) == 1 else {"runs": objects}
    return json.dumps(told, indent=2, allow_nan=False)


def as_text(reports: Sequence[Report]) -> str:
    """Tables and findings for a terminal; of several runs the comparison first."""
    if len(reports) == 1:
        return _text_of(reports[0])
    lines = side_by_side(_summaries(reports))
    parts = [aligned(lines, left=range(len(lines[0])))]
    for one in reports:
        parts.append(f"{one.name}\n{'-' * len(one.name)}\n{_text_of(one)}")
    return "\n\n".join(parts)


def _text_of(report: Report) -> str:
    parts = [_note(report), table(_thinned(report)), ""]
    for finding in report.findings:
        parts.append(textwrap.fill(str(finding), 80, subsequent_indent="  "))
    return "\n".join(parts if report.findings else [*parts, _NOTHING])


def write(
    reports: Sequence[Report], out: Path, *, title: str, html: bool
) -> list[Path]:
    """Writes the report into a folder, and nothing anywhere else.

    Args:
      reports: The report on each run.
      out: The folder, made if missing.
      title: The title of a report on several runs.
      html: Whether to write ``report.html`` too, one page with the figures in it.

    Returns:
      The files: ``report.md``; ``history.png`` if matplotlib is installed; and
      ``norms.png``, ``stopping.png``, ``leaves.png`` if their values were recorded. Of
      several runs, ``runs.png``, and the others with the number of the run before them.
    """
    images = [figures_of(one.history, one.findings) for one in reports]
    several, together = len(reports) > 1, {}
    if several:
        together = figure_of_runs({one.name: one.history for one in reports})
        images = [
            {f"{i}-{name}": image for name, image in its.items()}
            for i, its in enumerate(images, start=1)
        ]
    else:
        title = reports[0].name
    summaries = _summaries(reports)
    text = _as_markdown(reports, title, summaries, together, images)
    files = {"report.md": text.encode()}
    files |= {name: x.png for its in (together, *images) for name, x in its.items()}
    if html:
        parts = [
            _part(one, summaries[one.name], its)
            for one, its in zip(reports, images, strict=True)
        ]
        files["report.html"] = page(title, parts, together.values()).encode()
    for name, content in files.items():
        fresh(out / name).write_bytes(content)
    return [out / name for name in files]


def _part(
    report: Report, summary: Mapping[str, str], images: Mapping[str, Drawn]
) -> Part:
    return Part(
        report.name,
        _note(report),
        summary,
        report.findings or _NOTHING,
        _thinned(report),
        images.values(),
    )


def _summaries(reports: Sequence[Report]) -> dict[str, dict[str, str]]:
    return {one.name: summary_of(one.history, one.findings) for one in reports}


def _as_markdown(
    reports: Sequence[Report],
    title: str,
    summaries: Mapping[str, Mapping[str, str]],
    together: Mapping[str, Drawn],
    images: Sequence[Mapping[str, Drawn]],
) -> str:
    # Names come from outside, and Markdown may contain HTML.
    parts = [f"# Report on {_escaped(title)}"]
    lines = side_by_side(summaries)
    parts.append(_escaped(as_markdown(lines, left=range(len(lines[0])))))
    parts += _linked(together)
    for one, its in zip(reports, images, strict=True):
        level = "##"
        if len(reports) > 1:
            parts.append(f"## {_escaped(one.name)}")
            level = "###"
        parts += [_escaped(_note(one)), *_linked(its), f"{level} Findings"]
        parts += [f"* {_escaped(str(finding))}" for finding in one.findings]
        if not one.findings:
            parts.append(_NOTHING)
        parts += [f"{level} Table", _escaped(_table(one))]
    return "\n\n".join(parts) + "\n"


def _linked(images: Mapping[str, Drawn]) -> list[str]:
    return [f"![{x.caption}]({name})" for name, x in images.items()]


def _table(report: Report) -> str:
    return table(_thinned(report), markdown=True)


def _escaped(text: str) -> str:
    return escape(text, quote=False)


def _note(report: Report) -> str:
    num_rows, num_shown = len(report.history), len(_thinned(report))
    shown = "" if num_shown == num_rows else f", {num_shown} of them in the table"
    return f"{report.source.name}: {num_rows} rows{shown}"


def _thinned(report: Report) -> list[Mapping[str, Any]]:
    """The rows of the table."""
    steps = {finding.step for finding in report.findings}
    return thinned(list(report.history), steps, _MOST_ROWS)


def fresh(path: Path) -> Path:
    """Makes the folder of a path, and removes the path if it is a link.

    A link may point to a file outside of the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    return path
