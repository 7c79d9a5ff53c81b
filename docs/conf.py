"""How `make docs` builds these pages.

Sphinx with MyST is what JAX, Optax and Flax use: pages are Markdown that GitHub shows,
too, and docstrings become the reference. MyST-NB shows the notebooks with the outputs
that are stored in them. Furo has no settings to keep, loads nothing from the network,
and is readable on a telephone.
"""

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import api_pages  # noqa: E402  (It lies in the folder that the line above adds.)
import notebook_pages  # noqa: E402

api_pages.write(DOCS / "api")
notebook_pages.write(DOCS.parent / "notebooks", DOCS / "notebooks")

project = "optax_guard"
copyright = "the optax_guard authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
html_theme = "furo"
html_title = "optax_guard"
html_copy_source = False
html_show_sphinx = False

# Every heading down to the third level can be linked, as on GitHub.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"
# A loop prints line by line; its lines are one output.
nb_merge_streams = True
# Notebooks print figures as text, too.
nb_mime_priority_overrides = [("html", "image/png", 0)]
suppress_warnings = ["config.cache"]

default_role = "literal"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "none"
python_use_unqualified_type_names = True

# Strict for public names of this library. No network is needed to ask other libraries.
nitpick_ignore_regex = [(r"py:.*", r"(?!optax_guard).*|.*\._.*")]

_TARGETS = api_pages.targets()


def _link_names(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
):
    inside = False
    for number, line in enumerate(lines):
        # Examples stay as they are typed, and tables keep their widths.
        inside = line.lstrip().startswith((">>>", "...")) or (inside and line.strip())
        if not inside and not name.endswith("diagnose"):
            lines[number] = api_pages.linked(line, _TARGETS)


def setup(app: Any) -> None:
    """Registers what docstrings need."""
    app.connect("autodoc-process-docstring", _link_names)
