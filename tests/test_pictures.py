"""The pictures of the studies are drawn from their JSON, and can be read at 830 px."""

import importlib
import json

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks._results import FOLDER
from benchmarks.pictures import DPI, PICTURES, WIDTH, draw
from benchmarks.pictures._style import FONTS

# In points; at 8.3 inches for 830 pixels 7.2 points are 10 pixels.
SMALLEST = 7.2


@pytest.mark.parametrize("name", PICTURES)
def test_texts_are_large_enough_and_the_title_fits(name):
    module = importlib.import_module(f"benchmarks.pictures.{PICTURES[name]}")
    with matplotlib.rc_context(FONTS):
        figure = module.figure_of(json.loads((FOLDER / f"{name}.json").read_text()))
    assert figure.get_figwidth() == WIDTH
    texts = [x for x in figure.findobj(Text) if x.get_visible() and x.get_text()]
    assert min(x.get_fontsize() for x in texts) >= SMALLEST
    # A sentence, in at most two lines.
    [title] = [x for x in texts if x.get_text() == figure.get_suptitle()]
    assert len(title.get_text().split()) >= 8
    box = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert box.width <= figure.bbox.width


def test_picture_lies_beside_its_results(tmp_path):
    results = tmp_path / "neutral.json"
    results.write_text((FOLDER / "neutral_round1.json").read_text())
    path = draw("neutral", results)
    assert path == tmp_path / "neutral.png"
    header = path.read_bytes()[:24]
    assert int.from_bytes(header[16:20]) == round(WIDTH * DPI)
