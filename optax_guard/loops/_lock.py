"""One run at a time in a directory: two would overwrite each other's checkpoints."""

import contextlib
import os
from collections.abc import Iterator

import jax

from optax_guard.loops._intact import agreed

# The directories that this process holds: its own locks do not keep it out.
_held: set[str] = set()


@contextlib.contextmanager
def hold(directory: str) -> Iterator[None]:
    """Holds the directory for one run. The system lets go of it if the process dies.

    The first process of a run holds it, for all. Where files cannot be locked, as in a
    bucket, nothing is held.

    Raises:
      RuntimeError: If another run holds it.
    """
    is_first = jax.process_index() == 0 and "://" not in directory
    is_free, file = _lock(directory) if is_first else (True, None)
    if not agreed(is_free):
        raise RuntimeError(
            f"`directory` is in use by another run: {directory}. Two runs in one "
            "directory would overwrite each other's checkpoints. Give each its own."
        )
    try:
        yield
    finally:
        if is_first:
            _held.discard(directory)
        if file is not None:
            os.close(file)


def _lock(directory: str) -> tuple[bool, int | None]:
    """Whether the directory was free, and the open file that is locked, if any."""
    if directory in _held:
        return False, None
    _held.add(directory)
    try:
        import fcntl

        os.makedirs(directory, exist_ok=True)
        file = os.open(os.path.join(directory, ".lock"), os.O_CREAT | os.O_RDWR)
    except (ImportError, OSError):
        # Windows, or a finished run that is read where nothing may be written.
        return True, None
    try:
        # Not `flock`, which the worker processes of a data loader would hold too.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        _held.discard(directory)
        return False, None
    except OSError:  # A file system without locks.
        os.close(file)
        return True, None
    return True, file
