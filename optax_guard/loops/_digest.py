"""A digest beside each checkpoint, which tells whether its files are as they were.

The digest of a file is its size and its CRC-32. This finds every bit that flips by
itself, every 32 bits in a row, and of other changes all but one in four thousand
million. It is no defence against somebody who wants to change a checkpoint.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Its name in the directory of a checkpoint. Orbax takes no file for an item.
DIGEST = "optax_guard_digest.json"
# Orbax writes the time into this file when the checkpoint gets its name.
_CHANGES = "_CHECKPOINT_METADATA"
# Files that are hashed at a time: CRC-32 runs outside of Python's lock.
_NUM_THREADS = 4
_CHUNK = 1 << 22


def write_digest(checkpoint: Any) -> None:
    """Writes the digest of the files that are in this directory now.

    Args:
      checkpoint: The directory, an `epath.Path`.
    """
    skipped = DIGEST, _CHANGES
    files = {name: path for name, path in _files(checkpoint) if name not in skipped}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = list(pool.map(_digest, files.values()))
    found = {"algorithm": "crc32", "files": dict(zip(files, digests, strict=True))}
    (checkpoint / DIGEST).write_text(json.dumps(found))


def damage(checkpoint: Any, needs_digest: bool) -> str | None:
    """The first damage of a checkpoint in words, or ``None`` if it is intact.

    Args:
      checkpoint: The directory, an `epath.Path`.
      needs_digest: Whether it was saved with a digest. Version 0.1.0 wrote none.
    """
    path = checkpoint / DIGEST
    if not path.exists():
        return f"{DIGEST} is missing" if needs_digest else None
    try:
        expected = json.loads(path.read_text())["files"]
        expected = {name: list(digest) for name, digest in expected.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{DIGEST} cannot be read"
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        paths = [checkpoint / name for name in expected]
        found = pool.map(lambda p: _digest(p) if p.exists() else None, paths)
        for name, digest in zip(expected, found, strict=True):
            if digest is None:
                return f"{name} is missing"
            if digest != expected[name]:
                return f"{name} is not as it was saved"
    return None


def _files(directory: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}", path


def _digest(path: Any) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
