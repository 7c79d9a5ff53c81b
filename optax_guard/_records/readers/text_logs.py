"""Logs made of lines for people: nanoGPT, llm.c, torchtitan, Megatron and their kin."""

import re
from collections.abc import Iterator
from pathlib import Path

from optax_guard._records.readers.raw import RawLog, RawRow
from optax_guard._records.readers.values import as_number

_NUMBER = (
    r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan\b|inf\b)"
)
# Column -> what stands before its number, in small letters. Where several fit, the
# first does. What begins with an underscore is no column: a loss, but none of now; a
# norm, but none of gradients.
FIELDS = {
    "_past": r"(?:best|lowest|minimum|previous|target|final)[ _](?:\w+[ _/])?loss",
    "_other": r"(?:param(?:eter)?s?|weights?|updates?|layer|batch)[ _]norm",
    "val_loss": r"(?:val|valid|validation|eval|dev|test)[_ /](?:\w+[_ ])?loss",
    "train_loss": r"train(?:ing)?[_ /]loss|train/crossentropyloss|train/ce loss",
    "loss": r"(?:(?:lm|total|avg|average|reduced_train)[_ /])?loss|xent",
    "raw_grad_norm": r"raw[_ ]grad[_ ]norm",
    "grad_norm": r"(?:(?:total|global)[_ ])?(?:grad(?:ient)?s?[_ -])?norm|gnorm|"
    r"optim/total[_ ]grad[_ ]norm",
    "step": r"(?:global[_ ])?(?:step|iter(?:ation)?|num_updates)",
    "epoch": r"epoch",
    "learning_rate": r"lr|learning[_ ]rate",
}
_LABELS = "|".join(f"(?P<{name}>{label})" for name, label in FIELDS.items())
# Quotes are those of a printed dict.
_LABELED = re.compile(
    rf"(?<![\w/.-])(?:{_LABELS})['\"]?(?: value)?\s*[:=#\[]?\s*['\"]?({_NUMBER})"
)
# The loss of one of several evaluation sets: `eval/c4_en-validation/CrossEntropyLoss`.
# OLMo-core leaves out `eval/`, and such a line holds nothing else.
_LOSS_OF_SET = r"(?:cross_?entropy_?loss|ce[ _]loss|loss)"
_SET = re.compile(
    rf"(?<![\w/.-])((?:val|valid|validation|eval|dev|test)/(?:[\w.+-]+/)+{_LOSS_OF_SET})"
    rf"\s*[:=]\s*({_NUMBER})",
    re.IGNORECASE,
)
_BARE_SET = re.compile(rf"((?!train/)[\w.+-]+/ce loss)=({_NUMBER})", re.IGNORECASE)
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
    r"(?<![\w/.-])(?:validat\w*|valid|val|eval\w*|test)(?![\w/.-])"
)
# Some scripts write themselves into their log.
_CODE = re.compile(r"\w \+?= ")
# A line that only tells where the run is: `Epoch 3/10`, `[step=100/556000,epoch=0]`.
_PLACE = re.compile(r"(?:.*[\]\s])?\[?(?:step|iter|iteration|epoch)\b")
_ANY_LOSS = re.compile(r"\b(\w*[Ll]oss\w*)['\"]?\s*[:=]\s*[-+\d.]")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_VALUES = ("train_loss", "loss", "val_loss", "grad_norm", "raw_grad_norm")
_LONGEST = 4000


def read_text_log(path: Path, text: str) -> RawLog | None:
    """Reads lines that name a loss or a norm; None if there are none of a run."""
    rows, place = [], {}
    for number, line in _lines(text):
        cells = _cells(line)
        if not any(name in _VALUES or "/" in name for name in cells):
            if _PLACE.match(line.lower()) and len(line) < 200:
                place |= {k: x for k, x in cells.items() if k in ("step", "epoch")}
            continue
        is_placed = "step" in cells or "epoch" in cells
        if not is_placed and _CODE.search(line):
            continue
        if is_placed:
            place |= {k: x for k, x in cells.items() if k in ("step", "epoch")}
        rows.append(RawRow(f"{path}, line {number}", {**place, **cells}))
    if len(rows) < 2 and not any("step" in row.cells for row in rows):
        return None
    rows = _before_clip(_one_loss(rows))
    return RawLog("lines of text", rows, _other_losses(text, rows))


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
    if bare := _BARE_SET.fullmatch(line):
        return _numbers({f"eval/{bare[1]}": bare[2].lower()})
    sets = {name: number.lower() for name, number in _SET.findall(line)}
    line = line.lower()
    for pattern in LINES:
        if whole := pattern.fullmatch(line):
            texts = whole.groupdict().items()
            return _numbers({k: x for k, x in texts if x is not None})
    if "train_runtime" in line:
        return {}  # The summary of Hugging Face's trainer: means of the whole run.
    found: dict[str, str] = {}
    for match in _LABELED.finditer(line):
        name = next(name for name in FIELDS if match[name] is not None)
        # `validate step: 1 loss: 7.7`: this is the loss of the evaluation.
        if name == "loss" and _EVALUATION.search(line[: match.start()]):
            name = "val_loss"
        found.setdefault(name, match[match.lastindex or 0])
    return _numbers({k: x for k, x in found.items() if not k.startswith("_")} | sets)


def _numbers(texts: dict[str, str]) -> dict[str, float]:
    numbers = {k: as_number(x.replace(",", "")) for k, x in texts.items()}
    return {k: x for k, x in numbers.items() if x is not None}


def _other_losses(text: str, rows: list[RawRow]) -> list[str]:
    """Says which losses have names that are not known, if no other was read."""
    if any(x in row.cells for row in rows for x in ("train_loss", "loss", "val_loss")):
        return []
    names = list(dict.fromkeys(x.lower() for x in _ANY_LOSS.findall(text)))
    if not names:
        return []
    shown = ", ".join(map(repr, names[:5]))
    return [f"losses were not read: {shown}; give a `pattern=` for such lines"]


def _one_loss(rows: list[RawRow]) -> list[RawRow]:
    """Where the loss of a step and the mean of an evaluation are told, keeps both.

    nanoGPT has `iter 20: loss 2.5` and now and then `step 20: train loss 2.4, ...`.
    """
    counts = [sum(name in row.cells for row in rows) for name in ("loss", "train_loss")]
    if not counts[0] > counts[1] > 0:
        return rows
    names = {"loss": "train_loss", "train_loss": "mean_train_loss"}
    return [_renamed(row, names) for row in rows]


def _before_clip(rows: list[RawRow]) -> list[RawRow]:
    """Where MaxText tells a raw norm, the other one is that after the clip."""
    if not any("raw_grad_norm" in row.cells for row in rows):
        return rows
    names = {"raw_grad_norm": "grad_norm", "grad_norm": "clipped_norm"}
    return [_renamed(row, names) for row in rows]


def _renamed(row: RawRow, names: dict[str, str]) -> RawRow:
    return row._replace(cells={names.get(k, k): x for k, x in row.cells.items()})
