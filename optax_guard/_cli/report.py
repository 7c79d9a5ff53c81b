"""The report on a run: table, findings and figure, for people and machines."""

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from optax_guard._cli.report_html import page
from optax_guard._cli.report_summary import run_name, summary_of
from optax_guard._records.diagnosis import diagnose
from optax_guard._records.findings import Finding, Severity
from optax_guard._records.history import History
from optax_guard._records.readers import find_file
from optax_guard._records.suggest import FEWEST, usable_norms
from optax_guard._records.table import thinned
from optax_guard.analysis._leaf_columns import has_leaves
from optax_guard.analysis._table import table

# A longer table leaves out rows at equal distances.
_MOST_ROWS = 40
# Figure -> its caption.
_CAPTIONS = {
    "history.png": "Norms, losses and shares over the steps",
    "norms.png": "Distribution of the norms, and the share that each threshold clips",
    "stopping.png": "Validation and training loss, and the gap between them",
    "leaves.png": "Norms and updates of each leaf over the steps",
}
_NOTHING = "Nothing needs attention."


class Report(NamedTuple):
    """A run and its findings.

    Attributes:
      source: The file that was read.
      history: Its rows.
      findings: The findings of `diagnose`.
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


def own_folder(path: Path) -> Path:
    """Where the report on a file or folder goes: `report` in it, or beside the file."""
    # In the folder of MLflow's metrics every file is a metric.
    is_folder = path.is_dir() and path.name != "metrics"
    return (path if is_folder else path.parent) / "report"


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
    """Writes the report into a folder, and nothing anywhere else.

    Args:
      report: The report.
      out: The folder, made if missing.
      html: Whether to write ``report.html`` too, one page with the figures in it.

    Returns:
      The files: ``report.md``; ``history.png`` if matplotlib is installed; and
      ``norms.png``, ``stopping.png``, ``leaves.png`` if their values were recorded.
    """
    images = _images(report)
    files = {"report.md": _as_markdown(report, list(images)).encode(), **images}
    if html:
        files["report.html"] = page(
            run_name(report.source),
            _note(report),
            report.findings or _NOTHING,
            _thinned(report),
            {_CAPTIONS[name]: image for name, image in images.items()},
            summary_of(report.history, report.findings),
        ).encode()
    for name, content in files.items():
        fresh(out / name).write_bytes(content)
    return [out / name for name in files]


def _images(report: Report) -> dict[str, bytes]:
    """The figures whose values were recorded, as PNG files by name."""
    try:
        from optax_guard import plotting
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return {}
    history = report.history
    # A dollar sign would begin a formula.
    title = run_name(report.source).replace("$", r"\$")
    names = {name for row in history for name in row}
    figures = {
        "history.png": plotting.plot_history(
            history, findings=report.findings, title=title
        )
    }
    if len(usable_norms(history)) >= FEWEST:
        figures["norms.png"] = plotting.plot_norm_distribution(history, title=title)
    if "train_loss" in names and names & {"val_loss", "value"}:
        figures["stopping.png"] = plotting.plot_early_stopping(history, title=title)
    if has_leaves(names):
        figures["leaves.png"] = plotting.plot_leaves(history, title=title)
    return {name: _as_png(figure) for name, figure in figures.items()}


def _as_png(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _as_markdown(report: Report, figures: Sequence[str]) -> str:
    # Names come from outside, and Markdown may contain HTML.
    parts = [
        f"# Report on {_escaped(run_name(report.source))}",
        _escaped(_note(report)),
    ]
    parts += [f"![{_CAPTIONS[name]}]({name})" for name in figures]
    findings = [f"* {_escaped(str(finding))}" for finding in report.findings]
    parts += ["## Findings", *findings]
    if not report.findings:
        parts.append(_NOTHING)
    parts += ["## Table", table(_thinned(report), markdown=True)]
    return "\n\n".join(parts) + "\n"


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
