"""Copies the notebooks into the pages; Sphinx reads nothing outside of its folder."""

import shutil
from pathlib import Path


def write(notebooks: Path, folder: Path) -> None:
    """Copies them anew, with the outputs that are stored in them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in notebooks.glob("*.ipynb"):
        shutil.copy(path, folder)
