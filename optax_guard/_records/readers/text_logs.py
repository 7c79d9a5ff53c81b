"""Logs made of lines for people: nanoGPT, llm.c, torchtitan, Megatron and their kin."""

import re
from collections.abc import Iterator
from pathlib import Path

from optax_guard._records.readers.raw import RawLog, RawRow
from optax_guard._records.readers.values import as_number

_NUMBER = (
    r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan\b|inf\b)"
)
# Column -> what stands before its number. A name in quotes is of a printed dict.
FIELDS = {
    "step": r"(?:global[_ ]|completed )?(?:step|iter(?:ation)?|num_updates)",
    "epoch": r"epoch",
    "train_loss": r"(?:train(?:ing)?|lm|total|avg|average|reduced_train)[_ /]loss|"
    r"train/crossentropyloss|train/ce loss|loss",
    "val_loss": r"(?:val|valid|validation|eval|dev|test)[_ /](?:\w+[_ /])?loss",
    "grad_norm": r"(?:(?:total|global)[_ ])?(?:grad(?:ient)?s?[_ -])?norm|gnorm|"
    r"optim/total[_ ]grad[_ ]norm",
    "raw_grad_norm": r"raw[_ ]grad[_ ]norm",
    "learning_rate": r"lr|learning[_ ]rate",
}
_LABELED = {
    name: re.compile(
        rf"(?<![\w/.-])(?:{label})['\"]?(?: value)?\s*[:=#\[]?\s*['\"]?({_NUMBER})",
        re.IGNORECASE,
    )
    for name, label in FIELDS.items()
}
# Lines without labels, or with labels of one letter: llm.c, and its twin in Python.
LINES = tuple(
    re.compile(line)
    for line in (
        r"s:(?P<step>\d+) tel:(?P<val_loss>\S+)",
        r"s:(?P<step>\d+) trl:(?P<train_loss>\S+)"
        r"(?: lr:(?P<learning_rate>\S+) norm:(?P<grad_norm>\S+))?",
        r"(?P<step>\d+) train (?P<train_loss>[\d.]+|nan|inf)",
        r"(?P<step>\d+) val (?P<val_loss>[\d.]+|nan|inf)",
    )
)
_EVALUATION = re.compile(
    r"(?<![\w/.-])(?:validat\w*|valid|val|eval\w*|test)(?![\w/.-])", re.IGNORECASE
)
# A loss, but none of now.
_NOT_NOW = re.compile(
    r"(?:best|lowest|minimum|previous|target|final)[ _](?:\w+[ _/])?(?:loss|norm)",
    re.IGNORECASE,
)
_NO_NORM = re.compile(
    r"(?:params?|weights?|updates?|layer|batch)[_ ]norm", re.IGNORECASE
)
# A line that only tells where the run is: `Epoch 3/10`, `[step=100/556000,epoch=0]`.
_PLACE = re.compile(r"(?:.*[\]\s])?\[?(?:step|iter|iteration|epoch)\b", re.IGNORECASE)
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_VALUES = ("train_loss", "val_loss", "grad_norm", "raw_grad_norm")
_LONGEST = 4000


def read_text_log(path: Path, text: str) -> RawLog | None:
    """Reads lines that name a loss or a norm; None if there are none of a run."""
    rows, place = [], {}
    for number, line in _lines(text):
        cells = _cells(line)
        if not any(name in cells for name in _VALUES):
            if _PLACE.match(line) and len(line) < 200:
                place |= {k: x for k, x in cells.items() if k in ("step", "epoch")}
            continue
        if "step" in cells or "epoch" in cells:
            place |= {k: x for k, x in cells.items() if k in ("step", "epoch")}
        rows.append(RawRow(f"{path}, line {number}", {**place, **cells}))
    if len(rows) < 2 and not any("step" in row.cells for row in rows):
        return None
    return RawLog("lines of text", _one_row_an_epoch(rows), [])


def read_pattern(path: Path, text: str, pattern: str) -> RawLog:
    """Reads the lines in which a pattern is found, by its named groups."""
    try:
        wanted = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"`pattern` must be a regular expression, got {pattern!r}: {error}."
        ) from None
    if not wanted.groupindex:
        raise ValueError(
            "`pattern` must have named groups, as in '(?P<step>\\d+) .* "
            f"(?P<train_loss>\\S+)', got {pattern!r}."
        )
    rows = [
        RawRow(
            f"{path}, line {number}", {k: x for k, x in found.items() if x is not None}
        )
        for number, line in _lines(text)
        if (match := wanted.search(line)) and (found := match.groupdict())
    ]
    if not rows:
        raise ValueError(
            f"`pattern` must be found in a line of {path}, got {pattern!r}."
        )
    return RawLog("lines of a pattern", rows, [])


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Each line as a terminal shows it: without colours, and what came last on it."""
    for number, line in enumerate(text.split("\n"), start=1):
        shown = line.rstrip("\r").rpartition("\r")[2]
        yield number, _ESCAPE.sub("", shown[-_LONGEST:]).strip()


def _cells(line: str) -> dict[str, float]:
    for pattern in LINES:
        if found := pattern.fullmatch(line):
            texts = found.groupdict().items()
            return _numbers({k: x for k, x in texts if x is not None})
    if "train_runtime" in line:
        return {}  # The summary of Hugging Face's trainer: means of the whole run.
    line = _NOT_NOW.sub("", line)
    found = {
        name: match[1]
        for name, label in _LABELED.items()
        if (match := label.search(line)) is not None
    }
    if "loss" not in line.lower() and "norm" not in line.lower():
        return _numbers(found)
    if "grad_norm" in found and _NO_NORM.search(line) and "grad" not in line.lower():
        del found["grad_norm"]
    loss = _LABELED["train_loss"].search(line)
    word = _EVALUATION.search(line)
    # `validate step: 1 loss: 7.7`: a bare loss after such a word is that of evaluation.
    is_bare = loss and word and word.start() < loss.start() and "train" not in loss[0]
    if is_bare and "val_loss" not in found:
        found["val_loss"] = found.pop("train_loss")
    return _numbers(found)


def _numbers(texts: dict[str, str]) -> dict[str, float]:
    numbers = {k: as_number(x.replace(",", "")) for k, x in texts.items()}
    return {k: x for k, x in numbers.items() if x is not None}


def _one_row_an_epoch(rows: list[RawRow]) -> list[RawRow]:
    """Takes the epoch for the step, where lines have whole epochs, and each once."""
    if any("step" in row.cells for row in rows):
        return rows
    seen = set()
    for row in rows:
        epoch = row.cells.get("epoch")
        named = {(epoch, name) for name in _VALUES if name in row.cells}
        if epoch is None or epoch % 1 or named & seen:
            return rows
        seen |= named
    return [
        row._replace(cells={**row.cells, "step": row.cells["epoch"]}) for row in rows
    ]
