"""The report as one page of HTML that needs no other file and no network."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from optax_guard._records.findings import Finding
from optax_guard._records.table import history_cells

# The policy forbids scripts and requests. A name in a history may hold anything.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #1a1a1a; background: #fff }}
img {{ max-width: 100%; height: auto }}
section {{ border-left: 5px solid; padding: .1rem 1rem; margin: 1rem 0 }}
.error {{ border-color: #d55e00 }}
.warning {{ border-color: #e69f00 }}
.info {{ border-color: #0072b2 }}
h3 {{ margin: .5rem 0 }}
p {{ margin: .5rem 0 }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .15rem .7rem; border-bottom: 1px solid #ddd }}
th {{ border-bottom: 2px solid #888 }}
</style>
</head>
"""


def page(
    title: str,
    note: str,
    findings: Sequence[Finding] | str,
    rows: Iterable[Mapping[str, Any]],
    images: Mapping[str, bytes],
) -> str:
    """The page.

    Args:
      title: Heading of the page.
      note: A line below it.
      findings: The findings, or a sentence if there are none.
      rows: Rows of the table.
      images: PNG files by caption.

    Returns:
      A document of HTML; all texts are escaped.
    """
    parts = [_HEAD.format(title=escape(title)), "<body>"]
    parts += [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(note)}</p>",
        "<h2>Findings</h2>",
    ]
    if isinstance(findings, str):
        parts.append(f"<p>{escape(findings)}</p>")
    else:
        parts += map(_finding_section, findings)
    parts += ["<h2>Figures</h2>"] if images else []
    for words, image in images.items():
        data = base64.b64encode(image).decode()
        parts.append(f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">')
    heading, *lines = history_cells(rows)
    parts += ['<h2>Table</h2>\n<div class="scroll"><table>']
    parts.append(_table_line("th", heading))
    parts += [_table_line("td", line) for line in lines]
    parts.append("</table></div>\n</body>\n</html>\n")
    return "\n".join(parts)


def _finding_section(finding: Finding) -> str:
    severity = escape(finding.severity)
    heading = f"{severity}: {escape(finding.code)}, step {finding.step}"
    return (
        f'<section class="{severity}"><h3>{heading}</h3>\n'
        f"<p>{escape(finding.code.meaning)}</p>\n<p>{escape(finding.numbers())}</p>\n"
        f"<p><b>Try:</b> {escape(finding.advice)}</p></section>"
    )


def _table_line(tag: str, line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(x)}</{tag}>" for x in line) + "</tr>"
