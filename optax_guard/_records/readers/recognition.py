"""Which format a file has, by its content."""

from pathlib import Path

from optax_guard._records.readers.databases import read_database
from optax_guard._records.readers.delimited import read_delimited
from optax_guard._records.readers.event_files import SIGNATURE, read_events
from optax_guard._records.readers.json_files import read_json
from optax_guard._records.readers.metric_folders import read_metric_folder
from optax_guard._records.readers.raw import RawLog
from optax_guard._records.readers.text_logs import read_pattern, read_text_log

_SQLITE = b"SQLite format 3\0"
_WANDB = b":W&B"
_HEAD = 64


def read_raw(path: Path, pattern: str | None) -> RawLog:
    """Reads a file, or a folder that `find_file` has found.

    Args:
      path: File or folder.
      pattern: Regular expression for the lines of a text, with named groups.
    """
    if path.is_dir():
        is_mlflow = path.name == "metrics"
        return read_metric_folder(path) if is_mlflow else read_events(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if SIGNATURE in head:
        return read_events(path)
    if head.startswith(_SQLITE):
        return read_database(path)
    if head.startswith(_WANDB):
        raise ValueError(
            f"{path}: a run that Weights & Biases kept offline. Only its own library "
            "reads it: `wandb sync` it, and export its history or a chart as CSV."
        )
    text = read_text(path)
    if pattern is not None:
        return read_pattern(path, text, pattern)
    for reader in (read_json, read_delimited, read_text_log):
        log = reader(path, text)
        if log is not None:
            return log
    if not text.strip():
        return RawLog("an empty file", [], [])
    raise ValueError(
        f"{path}: no log was recognised in it: no JSON, no CSV with a heading, no "
        "lines such as `step 10 loss 2.5 norm 0.7`. Give a `pattern=` for its lines, a "
        "regular expression such as '(?P<step>\\d+) .*cost (?P<train_loss>\\S+)'."
    )


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 as Windows writes it."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text: {error}.") from None
    # A log that was emptied while a job wrote to it begins with zeros. Spreadsheets
    # write a byte order mark, which `utf-8-sig` removes. Other bytes stand in names and
    # words, not in numbers.
    return content.replace(b"\0", b"").decode("utf-8-sig", errors="replace")
