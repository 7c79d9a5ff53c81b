"""The report as one page of HTML that needs no other file and no network."""

import base64
import re
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
h3 {{ margin: .5rem 0; font-size: 1rem }}
p {{ margin: .5rem 0; overflow-wrap: anywhere }}
code {{ background: var(--soft); padding: 0 .25em; border-radius: 3px }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
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
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 4px }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .15rem .7rem; white-space: nowrap;
  border-bottom: 1px solid var(--line) }}
th {{ border-bottom-width: 2px; position: sticky; top: 0; background: var(--back) }}
@media print {{
  :root {{ --text: #000; --back: #fff; --soft: #fff; --line: #999 }}
  body {{ max-width: none; margin: 0; font-size: 11pt }}
  section, figure, tr {{ break-inside: avoid }}
  .scroll {{ overflow: visible }}
  table {{ font-size: 8pt }}
}}
</style>
</head>
"""


def page(
    title: str,
    note: str,
    findings: Sequence[Finding] | str,
    rows: Iterable[Mapping[str, Any]],
    images: Mapping[str, bytes],
    summary: Mapping[str, str],
) -> str:
    """The page.

    Args:
      title: Heading of the page, the name of the run.
      note: A line below it.
      findings: The findings, or a sentence if there are none.
      rows: Rows of the table.
      images: PNG files by caption.
      summary: What the box at the top says, by its headings.

    Returns:
      A document of HTML; all texts are escaped.
    """
    parts = [_HEAD.format(title=escape(title)), "<body>"]
    parts += [f"<h1>{escape(title)}</h1>", f"<p>{escape(note)}</p>", "<dl>"]
    parts += [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in summary.items()
    ]
    parts += ["</dl>", "<h2>Findings</h2>"]
    if isinstance(findings, str):
        parts.append(f"<p>{escape(findings)}</p>")
    else:
        parts += map(_finding_section, findings)
    parts += ["<h2>Figures</h2>"] if images else []
    for words, image in images.items():
        data = base64.b64encode(image).decode()
        parts.append(
            f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    heading, *lines = history_cells(rows)
    parts += ['<h2>Table</h2>\n<div class="scroll"><table>']
    parts.append(f"<thead>{_table_line('th', heading)}</thead>")
    parts += [_table_line("td", line) for line in lines]
    parts.append("</table></div>\n</body>\n</html>\n")
    return "\n".join(parts)


def _finding_section(finding: Finding) -> str:
    severity = escape(finding.severity)
    heading = f"{severity}: {escape(finding.code)}, step {finding.step}"
    return (
        f'<section class="{severity}"><h3>{heading}</h3>\n'
        f"<p>{_prose(finding.code.meaning)}</p>\n<p>{escape(finding.numbers())}</p>\n"
        f"<p><b>Try:</b> {_prose(finding.advice)}</p></section>"
    )


def _prose(text: str) -> str:
    """Escaped text, in which backticks mark code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table_line(tag: str, line: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(x)}</{tag}>" for x in line) + "</tr>"
