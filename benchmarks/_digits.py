"""Scikit-learn's handwritten digits, also on a machine that has no scikit-learn.

`python -m benchmarks._digits` writes them to `build/digits.npz`, which is read where
scikit-learn is missing.
"""

import pathlib
from typing import NamedTuple

import numpy as np

_FILE = pathlib.Path(__file__).parents[1] / "build" / "digits.npz"


class Digits(NamedTuple):
    """1797 images of 8 x 8 pixels from 0 to 16, [images, 64], and what they show."""

    data: np.ndarray
    target: np.ndarray


def load_digits() -> Digits:
    """The images and their labels.

    Raises:
      FileNotFoundError: If there is neither scikit-learn nor the file.
    """
    try:
        from sklearn import datasets
    except ImportError:
        if not _FILE.exists():
            raise FileNotFoundError(
                f"The digits need scikit-learn, or the file {_FILE.name} in build/: "
                "write it with `python -m benchmarks._digits` where scikit-learn is."
            ) from None
        with np.load(_FILE) as found:
            return Digits(found["data"].astype(np.float64), found["target"])
    found = datasets.load_digits()
    return Digits(found.data, found.target)  # pyright: ignore


if __name__ == "__main__":
    digits = load_digits()
    _FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(_FILE, data=digits.data.astype(np.uint8), target=digits.target)
    print(f"wrote {_FILE}")
