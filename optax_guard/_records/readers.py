"""Reading rows from JSON Lines, CSV and Hugging Face's trainer state."""

import csv
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Name in a history -> its names in other records, in the order of the search. Capitals
# do not matter.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "_step", "iteration", "iter"),
    "epoch": ("epoch", "train/epoch"),
    "train_loss": (
        *("train_loss", "loss", "train/loss", "training_loss", "loss/train"),
        *("train_loss_step", "train_loss_epoch"),
    ),
    "val_loss": (
        *("val_loss", "eval_loss", "valid_loss", "validation_loss", "val/loss"),
        *("eval/loss", "valid/loss", "loss/val"),
    ),
    "grad_norm": (
        *("grad_norm", "gradient_norm", "grad/norm", "train/grad_norm", "gnorm"),
        *("global_norm", "global_grad_norm", "total_norm", "grad_2.0_norm_total"),
    ),
    "clipped_norm": ("clipped_norm", "grad_norm_clipped", "grad/clipped_norm"),
    "clip_threshold": ("clip_threshold", "grad/clip_threshold", "max_grad_norm"),
    "clip_rate": ("clip_rate", "grad/clip_rate"),
    "learning_rate": (
        *("learning_rate", "lr", "train/learning_rate", "train/lr"),
        *("lr-sgd", "lr-adam", "lr-adamw"),
    ),
}
# JSON has no such numbers: a record holds them as these strings.
NOT_FINITE = {
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
_FILES = ("history.jsonl", "trainer_state.json", "metrics.csv")
_JSON_LINES = (".jsonl", ".ndjson")

Row = dict[str, float]


def rename(
    row: Mapping[str, float], columns: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Changes the names of a row to those of `COLUMN_NAMES`; others stay."""
    lower = {name.lower(): name for name in row}
    named = dict(row)
    for name, others in COLUMN_NAMES.items():
        theirs = (columns or {}).get(name)
        found = theirs or next((lower[x] for x in others if x in lower), None)
        if found is not None and found in named:
            named[name] = named.pop(found)
    for name, theirs in (columns or {}).items():
        if name not in COLUMN_NAMES and theirs in named:
            named[name] = named.pop(theirs)
    return named


def read_rows(
    path: str | Path,
    *,
    run: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Reads the rows of a file; see `History.read`."""
    path = find_file(Path(path))
    if path.suffix in _JSON_LINES:
        found = list(_json_lines(path))
    elif path.suffix == ".json":
        found = _trainer_state(path)
    elif path.suffix == ".csv":
        found = list(_csv(path))
    else:
        raise ValueError(
            f"`path` must end in .jsonl, .ndjson, .json or .csv, got {str(path)!r}."
        )
    found = _select_run(path, found, run)
    for name, theirs in (columns or {}).items():
        if found and not any(theirs in raw for _, raw in found):
            known = sorted({x for _, raw in found for x in raw})
            raise ValueError(
                f"`columns` must name columns of {path}, got {theirs!r} for {name!r}. "
                f"There are {known}."
            )
    return [
        {"step": i, **_read_numbers(place, raw, columns)}
        for i, (place, raw) in enumerate(found)
    ]


def find_file(path: Path) -> Path:
    """The path of a file, or of the file in a folder that holds a history."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {str(path)!r}.")
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    others = sorted(p for p in path.iterdir() if p.suffix in (*_JSON_LINES, ".csv"))
    if len(others) == 1:
        return others[0]
    found = "several files" if others else "no file"
    raise FileNotFoundError(
        f"The folder {str(path)!r} must hold one of {', '.join(_FILES)}, or a single "
        f".jsonl or .csv file; it holds {found} that could be a history. Name the file."
    )


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            place = f"{path}, line {i}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    _warn_of_half_line(place)
                    return
                raise ValueError(f"{place}: not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{place}: must be a JSON object, got {str(row)[:40]!r}."
                )
            yield place, row


def _trainer_state(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}.") from None
    log = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ValueError(
            f"{path}: must be Hugging Face's trainer state, an object with a list of "
            "objects `log_history`. Write rows of your own to a .jsonl file."
        )
    # The last entry is a summary: its loss is the mean over all steps.
    steps = [row for row in log if "train_runtime" not in row]
    return [(f"{path}, entry {i} of `log_history`", row) for i, row in enumerate(steps)]


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # Spreadsheets write a byte order mark, which `utf-8-sig` removes.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}.") from None
    lines = _cells(path, text)
    _, heading = next(lines, (0, []))
    num_lines = text.count("\n")
    for line, cells in lines:
        place = f"{path}, line {line}"
        if not cells:
            continue
        if len(cells) != len(heading):
            if line > num_lines and len(cells) < len(heading):
                _warn_of_half_line(place)
                return
            raise ValueError(
                f"{place}: must have {len(heading)} cells like the heading, got "
                f"{len(cells)}."
            )
        yield (
            place,
            {k: v for k, v in zip(heading, cells, strict=True) if v.strip()},
        )


def _cells(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the last line of each row, and its cells."""
    lines = csv.reader(text.splitlines())
    try:
        for cells in lines:
            yield lines.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: not CSV: {error}.") from None


def _select_run(
    path: Path, rows: list[tuple[str, dict[str, Any]]], run: str | None
) -> list[tuple[str, dict[str, Any]]]:
    runs = list(dict.fromkeys(str(row["run"]) for _, row in rows if "run" in row))
    if run is None and len(runs) > 1:
        raise ValueError(
            f"{path} holds several runs: {', '.join(runs)}. Choose one with `run=`, or "
            "`--run` on the command line."
        )
    if run is not None and run not in runs:
        raise ValueError(f"`run` must be one of {runs} in {path}, got {run!r}.")
    return [x for x in rows if run is None or str(x[1].get("run")) == run]


def _read_numbers(
    place: str, raw: Mapping[str, Any], columns: Mapping[str, str] | None
) -> Row:
    row = {}
    for name, value in rename(raw, columns).items():
        number = _as_number(value)
        if number is not None:
            row[name] = number
        elif name in COLUMN_NAMES and value is not None:
            # In other columns, texts and lists are left out: a date, a tag.
            raise ValueError(f"{place}: `{name}` must be a number, got {value!r}.")
    if "step" in row:
        if not row["step"] >= 0 or row["step"] % 1:
            raise ValueError(
                f"{place}: `step` must be a whole number >= 0, got {row['step']}."
            )
        row["step"] = int(row["step"])
    return row


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        value = _parse_number(value)
    if not isinstance(value, int | float):
        return None
    # Integers of JSON and Python may be too large for a float.
    if abs(value) > sys.float_info.max:
        return float("inf") if value > 0 else float("-inf")
    return int(value) if isinstance(value, bool) else value


def _parse_number(text: str) -> float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _warn_of_half_line(place: str) -> None:
    warnings.warn(
        f"{place}: the last line is unfinished, as a killed run leaves it. It is left "
        "out.",
        stacklevel=6,
    )
