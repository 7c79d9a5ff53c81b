"""Which file of a folder holds the history."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from optax_guard._records.readers.event_files import event_files
from optax_guard._records.readers.metric_folders import is_metric_folder

# What this library, Transformers, Lightning, LLaMA-Factory, detectron2 and YOLO write.
_FILES = (
    *("history.jsonl", "trainer_state.json", "metrics.csv", "trainer_log.jsonl"),
    *("metrics.json", "results.csv"),
)
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
_TEXTS = (".log", ".txt")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_file(path: Path) -> Path:
    """The path of a file, or of what holds the history in a folder.

    That is a file, or a folder of event files, or one of metrics of MLflow.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
        return path
    found = _candidates(path)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(x.name for x in found[:10])
        raise FileNotFoundError(
            f"The folder {str(path)!r} must hold one of {', '.join(_FILES)}, or a "
            "single file that could be a history; it holds several files: "
            f"{names}. Name the file."
        )
    raise FileNotFoundError(
        f"The folder {str(path)!r} must hold one of {', '.join(_FILES)}, another "
        f"{', '.join(_TABLES + _TEXTS)} file, event files of TensorBoard or metrics of "
        "MLflow; it holds no file that could be a history. Name the file."
    )


def find_files(path: Path) -> dict[str, Path]:
    """The file of `find_file`, by an empty name, or all runs of a folder by name.

    A run is then a file, or, in a folder without any, what a folder in it holds.
    """
    found = _candidates(path) if path.is_dir() else []
    if len(found) > 1:
        return {file.name: file for file in found}
    if not found and path.is_dir():
        runs = {}
        for folder in sorted(x for x in path.iterdir() if x.is_dir()):
            with contextlib.suppress(FileNotFoundError):
                runs[folder.name] = find_file(folder)
        if runs:
            return runs
    return {"": find_file(path)}


def _candidates(path: Path) -> list[Path]:
    """The files of a folder that could be its history, of the first kind there is."""
    found = (list(kind(path)) for kind in _KINDS)
    return next(filter(None, found), [])


def _known_files(path: Path) -> Iterator[Path]:
    found = [path / name for name in _FILES if (path / name).is_file()]
    yield from found[:1]


def _last_checkpoint(path: Path) -> Iterator[Path]:
    found = [
        (int(match[1]), folder / "trainer_state.json")
        for folder in path.iterdir()
        if (match := _CHECKPOINT.fullmatch(folder.name))
    ]
    found = [x for x in found if x[1].is_file()]
    if found:
        yield max(found)[1]


def _metric_folders(path: Path) -> Iterator[Path]:
    wanted = (path, path / "metrics")
    yield from (x for x in wanted if x.is_dir() and is_metric_folder(x))


def _event_folder(path: Path) -> Iterator[Path]:
    if event_files(path):
        yield path


def _with_ending(endings: tuple[str, ...]) -> Callable[[Path], Iterator[Path]]:
    def found(path: Path) -> Iterator[Path]:
        yield from sorted(x for x in path.iterdir() if x.suffix.lower() in endings)

    return found


_KINDS = (
    _known_files,
    _metric_folders,
    _with_ending(_TABLES),
    _last_checkpoint,
    _event_folder,
    _with_ending(_TEXTS),
)
