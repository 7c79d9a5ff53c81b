"""Writing into a folder that was asked for, and nowhere else."""

from pathlib import Path


def fresh(path: Path) -> Path:
    """The path, in a folder that exists, and no longer a link.

    What a link points to may be outside of the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    return path
