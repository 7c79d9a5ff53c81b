"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries, in a file.

E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", the test part,
UCI Machine Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0. Pixels and order
are those of `sklearn.datasets.load_digits`, whole numbers from 0 to 16.
"""

import pathlib

import numpy as np

_FILE = pathlib.Path(__file__).parent / "digits.npz"


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images, float32[1797, 64] from 0 to 1, and classes, int32[1797]."""
    with np.load(_FILE) as found:
        images, labels = found["images"], found["labels"]
    return (images / 16).astype(np.float32), labels.astype(np.int32)
