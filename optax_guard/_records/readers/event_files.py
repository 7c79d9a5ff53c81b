"""Event files of TensorBoard, by the messages of tensorboardX."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from optax_guard._records.readers.raw import RawLog, RawRow, unfinished

# In the first record of every event file.
SIGNATURE = b"brain.Event:"
# Folders that hold one part of a run, as Keras' callback writes them.
_SPLITS = {"train", "val", "valid", "validation", "eval", "test"}
# TensorFlow's numbers of types: float, double, int32, half, int64.
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 19: "<f2", 9: "<i8"}


def has_signature(path: Path) -> bool:
    """Whether a file is an event file."""
    with path.open("rb") as file:
        return SIGNATURE in file.read(64)


def read_events(path: Path) -> RawLog:
    """Reads an event file, or those of a folder and its folders."""
    try:
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ImportError(
            "Reading event files of TensorBoard needs tensorboardX: pip install "
            "'optax-guard[log]'",
            name=error.name,
        ) from error
    Event = vars(event_pb2)["Event"]  # Protobuf makes the class at run time.
    files = [path] if path.is_file() else event_files(path)
    top = path.parent if path.is_file() else path
    folders = {file.parent.relative_to(top).as_posix() for file in files}
    is_one_run = all(_is_split(x) or x == "." for x in folders)
    found: list[tuple[float, RawRow]] = []
    notes: list[str] = []
    for file in files:
        folder = file.parent.relative_to(top).as_posix()
        prefix = f"{folder.rpartition('/')[2]}/" if _is_split(folder) else ""
        run = None if is_one_run else folder.rpartition("/")[0] if prefix else folder
        for i, record in enumerate(_records(file, notes)):
            place = f"{file}, record {i}"
            try:
                event = Event.FromString(record)
            except (
                Exception
            ) as error:  # Of protobuf, whose kind depends on its version.
                raise ValueError(f"{place}: no event: {error}.") from None
            for value in event.summary.value:
                number = _scalar(value)
                if number is not None:
                    cells = {"step": event.step, f"{prefix}{value.tag}": number}
                    found.append((event.wall_time, RawRow(place, cells, run)))
    # The parts of a run are in files of their own. The order in a file stays.
    found.sort(key=lambda x: x[0])
    return RawLog("event files of TensorBoard", [row for _, row in found], notes)


def event_files(path: Path) -> list[Path]:
    """The event files of a folder and its folders, in the order of their names."""
    return sorted(
        file
        for file in path.rglob("*tfevents*")
        if file.is_file() and has_signature(file)
    )


def _is_split(folder: str) -> bool:
    return folder.rpartition("/")[2].lower() in _SPLITS


def _records(path: Path, notes: list[str]) -> Iterator[bytes]:
    """The records: a length and its checksum, the bytes and theirs."""
    with path.open("rb") as file:
        size, i = path.stat().st_size, 0
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            if length > size - file.tell() - 4:
                notes.append(unfinished(f"{path.name}, record {i}"))
                return
            yield file.read(length)
            file.read(4)
            i += 1


def _scalar(value: Any) -> float | None:
    """The number of a summary, in the old form or as a tensor; None if it has none."""
    if value.WhichOneof("value") == "simple_value":
        return value.simple_value
    if value.WhichOneof("value") != "tensor" or value.tensor.dtype not in _TYPES:
        return None
    tensor = value.tensor
    if len(tensor.tensor_shape.dim):
        return None
    kind = _TYPES[tensor.dtype]
    if len(tensor.tensor_content) == np.dtype(kind).itemsize:
        return np.frombuffer(tensor.tensor_content, kind)[0].item()
    for values in (
        tensor.float_val,
        tensor.double_val,
        tensor.int_val,
        tensor.int64_val,
    ):
        if len(values) == 1:
            return values[0]
    return None
