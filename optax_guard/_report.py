"""The report on a run: table, findings and figure, for people and machines."""

import io
import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from optax_guard._diagnosis import diagnose
from optax_guard._findings import Finding, Severity
from optax_guard._history import History, Row
from optax_guard._history_readers import find_file
from optax_guard._history_table import table
from optax_guard._report_html import page

# A longer table is thinned out.
_MOST_ROWS = 40
_NOTHING = "Nothing was found that needs attention."


class Report(NamedTuple):
    """What there is to say about a run.

    Attributes:
      source: The file that was read.
      history: Its rows.
      findings: What `diagnose` found.
    """

    source: Path
    history: History
    findings: list[Finding]


def make_report(path: Path, **how: Any) -> Report:
    """Reads and diagnoses a run; arguments as those of `History.read`."""
    source = find_file(path)
    history = History.read(source, **how)
    if not history:
        raise ValueError(f"{source} holds no rows.")
    return Report(source, history, diagnose(history))


def exit_code(report: Report) -> int:
    """0 if nothing is worse than an info, 3 for a warning, 4 for an error."""
    severities = {finding.severity for finding in report.findings}
    if Severity.ERROR in severities:
        return 4
    return 3 if Severity.WARNING in severities else 0


def as_json(report: Report) -> str:
    """One object of strict JSON."""
    return json.dumps(
        {
            "history": str(report.source),
            "num_rows": len(report.history),
            "findings": [finding.as_dict() for finding in report.findings],
        },
        indent=2,
        allow_nan=False,
    )


def as_text(report: Report) -> str:
    """Table and findings for a terminal."""
    parts = [_note(report), table(_thinned(report)), ""]
    for finding in report.findings:
        parts.append(textwrap.fill(str(finding), 80, subsequent_indent="  "))
    return "\n".join(parts if report.findings else [*parts, _NOTHING])


def write(report: Report, out: Path, *, html: bool) -> list[Path]:
    """Writes the report into a folder, and nowhere else.

    Args:
      report: What to write.
      out: The folder, made if missing.
      html: Whether to write ``report.html`` too: one page, the figure in it.

    Returns:
      The files: ``report.md``, and ``history.png`` if matplotlib is installed.
    """
    image = _figure(report)
    files = {"report.md": _as_markdown(report, image is not None).encode()}
    if image is not None:
        files["history.png"] = image
    if html:
        files["report.html"] = page(
            str(report.source),
            _note(report),
            report.findings or _NOTHING,
            _thinned(report),
            image,
        ).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        # What a link points to may be outside of the folder.
        if (out / name).is_symlink():
            (out / name).unlink()
        (out / name).write_bytes(content)
    return [out / name for name in files]


def _figure(report: Report) -> bytes | None:
    try:
        from optax_guard.plotting import plot_history
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    image = io.BytesIO()
    title = report.source.name
    # A dollar sign would begin a formula.
    figure = plot_history(
        report.history, findings=report.findings, title=title.replace("$", r"\$")
    )
    figure.savefig(image, format="png")
    return image.getvalue()


def _as_markdown(report: Report, has_figure: bool) -> str:
    parts = [f"# Report on `{report.source.name}`", _note(report)]
    if has_figure:
        parts.append("![Norms, losses and shares over the steps](history.png)")
    parts += ["## Findings", *(f"* {finding}" for finding in report.findings)]
    if not report.findings:
        parts.append(_NOTHING)
    parts += ["## Table", table(_thinned(report), markdown=True)]
    return "\n\n".join(parts) + "\n"


def _note(report: Report) -> str:
    num_rows, num_shown = len(report.history), len(_thinned(report))
    shown = "" if num_shown == num_rows else f", {num_shown} of them in the table"
    return f"{report.source.name}: {num_rows} rows{shown}"


def _thinned(report: Report) -> list[Row]:
    """Rows at equal distances, with the last and those in which something was found."""
    rows = list(report.history)
    stride = -(-len(rows) // _MOST_ROWS)
    steps = {finding.step for finding in report.findings}
    return [
        row
        for i, row in enumerate(rows)
        if (len(rows) - 1 - i) % stride == 0 or row["step"] in steps
    ]
