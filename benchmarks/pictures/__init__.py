"""The pictures of the studies, drawn from the JSON that those have written.

`python -m benchmarks.pictures` draws all of `results/` anew, without running a study;
with names, such as `bad_batches`, only those. A picture is 8.3 inches wide, as GitHub
shows it in 830 pixels.
"""

import importlib
import json
import pathlib

# Each picture, and the module that draws it.
PICTURES = {
    "bad_batches": "bad_batches",
    "stability": "stability",
    "generalization": "generalization",
    "neutral_round1": "neutral",
    "step_cost": "step_cost",
    "verdicts": "verdicts",
}
WIDTH, DPI = 8.3, 160


def draw(kind: str, results: pathlib.Path) -> pathlib.Path:
    """Draws the results of a study beside them: `x.json` gives `x.png`.

    Args:
      kind: The module of this package that draws.
      results: The JSON that the study has written.
    """
    import matplotlib

    from benchmarks.pictures._style import FONTS

    module = importlib.import_module(f"{__name__}.{kind}")
    path = results.with_suffix(".png")
    with matplotlib.rc_context(FONTS):
        module.figure_of(json.loads(results.read_text())).savefig(path, dpi=DPI)
    return path
