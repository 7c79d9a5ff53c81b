"""The report as one page of HTML that needs no other file and no network."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from optax_guard._cli.report_figures import Drawn
from optax_guard._cli.report_summary import side_by_side
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
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1a1a1a; --back: #fff; --soft: #f3f4f6; --line: #d4d4d8;
  --error: #d55e00; --warning: #e69f00; --info: #0072b2 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6e6e6; --back: #16181d; --soft: #23262d; --line: #42464f;
    --info: #56b4e9 }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; color: var(--text); background: var(--back) }}
h1 {{ overflow-wrap: anywhere; margin-bottom: .2rem }}
h2 {{ overflow-wrap: anywhere; margin-top: 2rem }}
h2[id] {{ border-top: 1px solid var(--line); padding-top: 1.5rem }}
h3, h4 {{ margin: .5rem 0; font-size: 1rem }}
a {{ color: var(--info) }}
p {{ margin: .5rem 0; overflow-wrap: anywhere }}
code {{ background: var(--back); padding: 0 .25em; border-radius: 3px;
  overflow-wrap: anywhere }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr));
  gap: .8rem 1.5rem; background: var(--soft); border-radius: 6px; padding: 1rem }}
dt {{ font-size: .85rem; opacity: .75 }}
dd {{ margin: 0; font-weight: 600; overflow-wrap: anywhere }}
section {{ border-left: 5px solid; padding: .1rem 1rem; margin: 1rem 0;
  background: var(--soft) }}
.error {{ border-color: var(--error) }}
.warning {{ border-color: var(--warning) }}
.info {{ border-color: var(--info) }}
figure {{ margin: 1.5rem 0 }}
figcaption {{ font-size: .9rem; opacity: .8 }}
img {{ display: block; width: 100%; max-width: 60rem; min-width: 36rem;
  border-radius: 4px }}
/* In the dark a figure keeps its hues: what was light is dark, and dark is light. */
@media (prefers-color-scheme: dark) {{
  img {{ filter: invert(1) hue-rotate(180deg) brightness(1.2);
    mix-blend-mode: screen }}
}}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .15rem .7rem; white-space: nowrap;
  border-bottom: 1px solid var(--line) }}
th {{ border-bottom-width: 2px }}
.words td, .words th {{ text-align: left }}
@media print {{
  :root {{ --text: #000; --back: #fff; --soft: #fff; --line: #999 }}
  body {{ max-width: none; margin: 0; font-size: 11pt }}
  section, img, dl, tr {{ break-inside: avoid }}
  h1, h2, h3, h4 {{ break-after: avoid }}
  h2[id] {{ break-before: page; border: none; margin: 0; padding: 0 }}
  thead {{ display: table-header-group }}
  .scroll {{ overflow: visible }}
  img {{ min-width: 0; max-height: 23cm; width: auto; max-width: 100%;
    filter: none; mix-blend-mode: normal }}
  table {{ font-size: 7.5pt }}
  th, td {{ padding: .1rem .4rem }}
}}
</style>
</head>
"""


class Part(NamedTuple):
    """The part of one run.

    Attributes:
      name: The run's name.
      note: A line below it.
      summary: What its box says, by its headings.
      findings: The findings, or a sentence if there are none.
      rows: Rows of the table.
      images: Its figures.
    """

    name: str
    note: str
    summary: Mapping[str, str]
    findings: Sequence[Finding] | str
    rows: Iterable[Mapping[str, Any]]
    images: Iterable[Drawn]


def page(title: str, parts: Sequence[Part], together: Iterable[Drawn]) -> str:
    """The page.

    Args:
      title: Heading of the page; of one run its name.
      parts: The part of each run. Of several, a table of all comes first.
      together: Figures of all runs.

    Returns:
      A document of HTML; all texts are escaped.
    """
    lines = [_HEAD.format(title=escape(title)), "<body>", f"<h1>{escape(title)}</h1>"]
    if len(parts) == 1:
        lines += _run(parts[0], "h2")
    else:
        heading, *runs = side_by_side({part.name: part.summary for part in parts})
        lines += ['<div class="scroll"><table class="words">']
        lines.append(f"<thead>{_table_line('th', heading)}</thead>")
        for i, (name, *cells) in enumerate(runs):
            link = f'<td><a href="#run{i}">{escape(name)}</a></td>'
            lines.append(f"<tr>{link}{_cells('td', cells)}</tr>")
        lines.append("</table></div>")
        lines += _figures(together)
        for i, part in enumerate(parts):
            lines.append(f'<h2 id="run{i}">{escape(part.name)}</h2>')
            lines += _run(part, "h3")
    lines.append("</body>\n</html>\n")
    return "\n".join(lines)


def _run(part: Part, level: str) -> list[str]:
    """The part of a run below its name; `level` is that of its headings."""
    lines = [f"<p>{escape(part.note)}</p>", "<dl>"]
    lines += [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in part.summary.items()
    ]
    lines += ["</dl>", f"<{level}>Findings</{level}>"]
    if isinstance(part.findings, str):
        lines.append(f"<p>{escape(part.findings)}</p>")
    else:
        below = f"h{int(level[1]) + 1}"
        lines += [_finding_section(finding, below) for finding in part.findings]
    if figures := _figures(part.images):
        lines += [f"<{level}>Figures</{level}>", *figures]
    heading, *rows = history_cells(part.rows)
    lines.append(f'<{level}>Table</{level}>\n<div class="scroll"><table>')
    lines.append(f"<thead>{_table_line('th', heading)}</thead>")
    lines += [_table_line("td", row) for row in rows]
    lines.append("</table></div>")
    return lines


def _figures(images: Iterable[Drawn]) -> list[str]:
    lines = []
    for words, image in images:
        data = base64.b64encode(image).decode()
        lines.append(
            f'<figure><div class="scroll"><img alt="{escape(words)}" '
            f'src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    return lines


def _finding_section(finding: Finding, level: str) -> str:
    severity = escape(finding.severity)
    heading = f"{severity}: {escape(finding.code)}, step {finding.step}"
    return (
        f'<section class="{severity}"><{level}>{heading}</{level}>\n'
        f"<p>{_prose(finding.code.meaning)}</p>\n<p>{escape(finding.numbers())}</p>\n"
        f"<p><b>Try:</b> {_prose(finding.advice)}</p></section>"
    )


def _prose(text: str) -> str:
    """Escaped text, in which backticks mark code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table_line(tag: str, line: Sequence[str]) -> str:
    return f"<tr>{_cells(tag, line)}</tr>"


def _cells(tag: str, line: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(x)}</{tag}>" for x in line)
