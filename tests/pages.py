"""Runs the Python blocks of a page of Markdown, in order, in one namespace.

Every ```python block runs. If a ```text block follows it, the block must print that
text. A block whose first line is ``# norm.py`` is run as that file. Two comments,
invisible to readers, change this::

    <!-- not run: the reason -->     before a block that is only to be read

    <!-- setup                       names that a block uses but does not define
    import flax.linen as nn
    -->
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?P<reason>^<!-- not run: [^\n]+ -->\n\s*)?^```python\n(?P<shown>.*?)^```$"
    r"(\s*^```text\n(?P<printed>.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    """A block to run.

    Attributes:
      line: The line of the page that it starts on.
      source: Its code.
      printed: The text that it must print; None if the page does not say.
    """

    line: int
    source: str
    printed: str | None


def runnable_blocks(markdown: str) -> list[Block]:
    """The blocks to run."""
    blocks = []
    for match in BLOCK.finditer(markdown):
        if match["reason"] is None:
            group = "shown" if match["setup"] is None else "setup"
            line = markdown.count("\n", 0, match.start(group)) + 1
            blocks.append(Block(line, match[group], match["printed"]))
    return blocks


def compiled(block: Block, filename: str):
    """Its code, whose traceback shows the line of the page, or of its own file."""
    if named := FILE.match(block.source):
        Path(named[1]).write_text(block.source, encoding="utf-8")
        return compile(block.source, named[1], "exec")
    return compile("\n" * (block.line - 1) + block.source, filename, "exec")


def run(markdown: str, filename: str) -> int:
    """Runs the blocks and returns how many there were."""
    namespace = {"__name__": "__page__"}
    blocks = runnable_blocks(markdown)
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled(block, filename), namespace)
        where = f"{filename}, line {block.line}"
        assert block.printed in (None, printed.getvalue()), where
    return len(blocks)
