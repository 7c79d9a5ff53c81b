"""Readers of logs: faults, odd shapes and folders. Whole logs are in `test_logs.py`."""

import json
import random
import shutil
import sqlite3
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_guard._records.readers import find_file, read_log
from optax_guard._records.readers.names import sources_of
from optax_guard._records.writers import log_function
from optax_guard.analysis import History

LOGS = Path(__file__).parent / "data" / "logs"
LOSS = {"loss": 1.0}

# Names -----------------------------------------------------------------------------

NAMES = ["loss", "train_loss", "train_loss_step", "train_loss_epoch", "Loss"]
NAMES += ["iter", "_step", "run", "epoch", "val_loss", "test_loss", "eval_a_loss"]
NAMES += ["grad_norm", "raw_grad_norm", "value", "val/value", "grad/norm", "note"]
NUMBERS = st.sampled_from([0.5, -1, 0, float("nan"), float("inf"), 3e-40, True])
ROWS = st.lists(
    st.tuples(
        st.integers(0, 6) | st.just(2**40),
        st.dictionaries(st.sampled_from(NAMES), NUMBERS, max_size=4),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_what_was_appended_is_read_back(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "history.jsonl"
    history = History(path)
    for step, row in rows:
        history.append(step, row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of rows that replace each other.
        read = History.read(path) if path.exists() else []
    assert [repr(sorted(x.items())) for x in read] == [
        repr(sorted(x.items())) for x in history
    ]


def test_no_name_of_a_metric_vanishes():
    history = History()
    history.append(3, {"iter": 7, "_step": 8, "run": 9, "global_step": 10})
    assert list(history) == [
        {"step": 3, "iter": 7, "_step": 8, "run": 9, "global_step": 10}
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # The tags of Megatron, and of NeMo.
        (
            ("lm loss", "lm loss validation", "grad-norm", "learning-rate"),
            {
                "train_loss": "lm loss",
                "val_loss": "lm loss validation",
                "grad_norm": "grad-norm",
                "learning_rate": "learning-rate",
            },
        ),
        (
            ("reduced_train_loss", "val_loss", "global_step", "grad_norm"),
            {
                "step": "global_step",
                "train_loss": "reduced_train_loss",
                "val_loss": "val_loss",
                "grad_norm": "grad_norm",
            },
        ),
        (
            ("optim/total_grad_norm", "train/CrossEntropyLoss"),
            {
                "train_loss": "train/CrossEntropyLoss",
                "grad_norm": "optim/total_grad_norm",
            },
        ),
        # The mean of an epoch only where there is no loss of steps.
        (("train_loss_epoch", "train_loss_step"), {"train_loss": "train_loss_step"}),
        (("train_loss_epoch",), {"train_loss": "train_loss_epoch"}),
        # Before the clip, and after it.
        (
            ("learning/grad_norm", "learning/raw_grad_norm"),
            {
                "grad_norm": "learning/raw_grad_norm",
                "clipped_norm": "learning/grad_norm",
            },
        ),
        # What only looks alike.
        (("param_norm", "leaf_norm/a", "box_loss", "num_updates", "norm"), {}),
    ],
)
def test_columns_of_other_tools_are_known(names, expected):
    assert sources_of(names) == expected


def test_first_loss_names_the_series_of_rows_that_come_one_by_one():
    history = History()
    history.append(1, train_loss_step=2.0)
    history.append(1, train_loss_epoch=5.0)
    history.append(2, train_loss_step=1.5)
    assert [row["train_loss"] for row in history] == [2.0, 1.5]
    assert history[0]["train_loss_epoch"] == 5.0


# Steps -----------------------------------------------------------------------------


def steps(*rows: dict[str, Any], tmp_path: Path) -> list[dict[str, float]]:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(History.read(path))


def test_late_evaluation_belongs_to_its_step_and_a_repeated_loss_goes_back(tmp_path):
    train = [{"step": i, "loss": float(i)} for i in (1, 2, 3)]
    late = {"step": 2, "val_loss": 9.0, "time": 5}
    found = steps(*train, late, tmp_path=tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[1] == {"step": 2, "train_loss": 2.0, "val_loss": 9.0, "time": 5}
    found = steps(*train, late, {"step": 2, "loss": 7.0}, tmp_path=tmp_path)
    assert [row["train_loss"] for row in found] == [1.0, 7.0]
    # What was dropped does not make a later evaluation early.
    dropped = {"step": 3, "val_loss": 8.0}
    with pytest.warns(UserWarning, match="3 rows, perhaps of an earlier run"):
        found = steps(*train, dropped, *train, late, tmp_path=tmp_path)
    assert [row.get("val_loss") for row in found] == [None, 9.0, None]


def test_row_without_a_step_belongs_to_the_step_before(tmp_path):
    found = steps(
        {"val_loss": 3.0}, {"step": 5, **LOSS}, {"val_loss": 2.0}, tmp_path=tmp_path
    )
    assert [(row["step"], row["val_loss"]) for row in found] == [(0, 3.0), (5, 2.0)]


def test_steps_that_begin_anew_in_each_epoch_are_counted_on(tmp_path):
    rows = [{"epoch": e, "step": s, **LOSS} for e in (0, 1, 2) for s in (0, 10, 20)]
    with pytest.warns(UserWarning, match="`step` begins anew in each epoch"):
        found = steps(*rows, tmp_path=tmp_path)
    assert [row["step"] for row in found] == [0, 10, 20, 21, 31, 41, 42, 52, 62]
    # A resumed run goes back in both.
    rows = [{"epoch": s // 20, "step": s, **LOSS} for s in (0, 10, 20, 30, 10, 20)]
    assert [row["step"] for row in steps(*rows, tmp_path=tmp_path)] == [0, 10, 20]


def test_epochs_are_steps_where_each_is_told_once(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"epoch": e, **x} for e in (1, 2, 3, 2, 3) for x in (LOSS, {"val_loss": e})]
    assert [row["step"] for row in steps(*rows, tmp_path=tmp_path)] == [1, 2, 3]
    path.write_text("Epoch 1/2\nloss: 3.0\nEpoch 2/2\nloss: 2.0\n")
    assert [row["step"] for row in History.read(path)] == [1, 2]
    path.write_text("Epoch 1/2\nloss: 3.0\nloss: 2.5\nEpoch 2/2\nloss: 2.0\n")
    with pytest.warns(UserWarning, match="there is no step"):
        assert [row["step"] for row in History.read(path)] == [0, 1, 2]


def test_chart_over_epochs_has_the_steps_of_its_run(tmp_path):
    path = tmp_path / "chart.csv"
    path.write_text(
        '"epoch","a - _step","a - _step__MIN","a - eval/loss"\n'
        '"1","100","100","2.5"\n"2","200","200","2.0"\n'
    )
    wanted = [{"step": 100 * e, "epoch": e, "val_loss": 3 - e / 2} for e in (1, 2)]
    assert list(History.read(path)) == wanted


def test_rows_of_one_step_that_differ_are_told(tmp_path):
    rows = [{"step": 5000, "loss": 1 - i / 10} for i in range(4)]
    with pytest.warns(UserWarning, match="4 rows of step 5000 became one"):
        assert len(steps(*rows, tmp_path=tmp_path)) == 1
    with pytest.warns(UserWarning, match="there is no step; rows are numbered from 0"):
        found = steps(LOSS, LOSS, tmp_path=tmp_path)
    assert [row["step"] for row in found] == [0, 1]


# Cells -----------------------------------------------------------------------------


def test_numbers_are_what_they_say(tmp_path):
    path = tmp_path / "log.csv"
    for cell in ('"2\n3"', "1_000", "high", "1,5"):
        path.write_text(f"step;loss\n0;1\n1;{cell}\n".replace("1,5", "1 5"))
        with pytest.raises(
            ValueError, match=r"line [34]: `train_loss` must be a number"
        ):
            History.read(path)
    path.write_text("step,loss,grad norm\n0,NA,1e-3\n1,NaN,None\n2,-inf,\n")
    history = History.read(path)
    assert repr(history[:]) == repr(
        [
            {"step": 0, "grad_norm": 1e-3},
            {"step": 1, "train_loss": float("nan")},
            {"step": 2, "train_loss": -float("inf")},
        ]
    )


def test_short_series_of_evaluations_are_spread_over_the_epochs(tmp_path):
    path = tmp_path / "history.json"
    series = {"loss": [4, 3, 2, 1], "val_loss": [3.5, 1.5], "odd": [1, 2, 3]}
    path.write_text(json.dumps({"config": {"lr": 0.1}, "history": series}))
    with pytest.warns(UserWarning, match="'odd' has 3 values of 4"):
        history = History.read(path)
    assert [row.get("val_loss") for row in history] == [None, 3.5, None, 1.5]


# Text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Epoch: 3 | train_loss: 4.02 | test_loss: 3.9", (None, 4.02, 3.9, None)),
        ("Iter  7 | train loss 10.9 | val loss 10.8 | lr 1e-3", (7, 10.9, 10.8, None)),
        ("step 1,250/9,000 loss=2.5e-1 gnorm: inf", (1250, 0.25, None, float("inf"))),
        ("step 9 params norm 311.2 grad norm 0.5 best loss 0.1", (9, None, None, 0.5)),
        ("step 9: loss nan, norm 3", (9, float("nan"), None, 3.0)),
        ('INFO {"step": "12", "loss": "1.5"}', (12, 1.5, None, None)),
        ("step 4 aux_loss 3.0 grad_norm_clip 1.0 loss 2", (4, 2.0, None, None)),
        ("\rstep 3 loss 9\rstep 4 loss 8\r", (4, 8.0, None, None)),
        ("step 4 loss = 8\n    val_loss = 0.0  # code", (4, 8.0, None, None)),
        # OLMo-core: the loss of an evaluation set is no training loss.
        ("[step=4/9]\nc4_en-validation/CE loss=2", (4, None, 2.0, None)),
        ("step 4: eval/a/loss: 2, eval/b/loss: 3", (4, None, 2.0, None)),
    ],
)
def test_lines_of_text_are_read(tmp_path, line, expected):
    path = tmp_path / "log.txt"
    path.write_text(f"Loading...\n{line}\n{line}\n", newline="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # One of them has no step.
        row = read_log(path).rows[-1]
    names = ("step", "train_loss", "val_loss", "grad_norm")
    found = [row.get(name) for name in names[0 if expected[0] else 1 :]]
    wanted = expected[0 if expected[0] else 1 :]
    assert found == pytest.approx(list(wanted), nan_ok=True)


def test_losses_of_other_names_are_told(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("ITER 5 loss_vae: 3.5; loss_kl: 1.9; Grad_norm: 5.6e-01\n" * 2)
    with pytest.warns(UserWarning, match="not read: 'loss_vae', 'loss_kl'; give a"):
        assert list(History.read(path)) == [{"step": 5, "grad_norm": 0.56}]


@pytest.mark.parametrize("text", ["Dear reader,\nloss of 3 % is\n", "1,2\n3,4\n", "{'"])
def test_what_is_no_log_is_refused_with_a_remedy(tmp_path, text):
    path = tmp_path / "letter.txt"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"letter\.txt: no log was recognised.*pattern"
    ):
        History.read(path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "must be a regular expression, got '\\('"),
        ("it (.*)", "must have named groups"),
        ("it (?P<step>x)", "must be found in a line of"),
    ],
)
def test_bad_pattern_is_told(tmp_path, pattern, message):
    path = tmp_path / "log.txt"
    path.write_text("it 5 cost 3\n")
    with pytest.raises(ValueError, match=f"`pattern` {message}"):
        History.read(path, pattern=pattern)


# Files of bytes, and folders ---------------------------------------------------------


def test_rows_written_to_event_files_are_read_back(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    row = {"grad_norm": 2.5, "clip_rate": 0.25, "val_loss": 0.5, "num_skipped": 1.0}
    for start in (0, 2):  # Resumed from step 20.
        with tensorboardx.SummaryWriter(str(tmp_path), filename_suffix=str(start)) as w:
            for i in range(start, 4):
                row["learning_rate"] = start + 1.0
                log_function(w)(10 * i, row)
    history = History.read(tmp_path)
    rates = [1.0, 1.0, 3.0, 3.0]
    assert list(history) == [
        {"step": 10 * i, **row, "learning_rate": rates[i]} for i in range(4)
    ]
    file = max(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"record \d+: the last line is unfinished"):
        assert len(History.read(tmp_path)) == 4


def write_events(path: Path, events: list[Any]) -> None:
    """An event file: of each record its length, two checksums and its bytes."""
    event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [event_pb2.Event(file_version="brain.Event:2"), *events]
    data = [event.SerializeToString() for event in records]
    path.write_bytes(b"".join(struct.pack("<Q4x", len(x)) + x + bytes(4) for x in data))


def test_tensors_of_tensorflow_are_numbers_and_folders_are_runs(tmp_path):
    event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")

    def write(path: Path, values: list[Any], kind: int, dtype: str) -> None:
        events = []
        for i, value in enumerate(values):
            event = event_pb2.Event(wall_time=i, step=i + 2**31)
            one = event.summary.value.add(tag="loss")
            one.tensor.dtype = kind
            one.tensor.tensor_content = np.array(value, dtype).tobytes()
            events.append(event)
        write_events(path, events)

    write(tmp_path / "a/train/events.out.tfevents.1", [2, 1], 2, "<f8")
    write(tmp_path / "b/events.out.tfevents.1", [3, [4, 5]], 1, "<f4")
    with pytest.raises(ValueError, match="several runs: a, b"):
        History.read(tmp_path)
    # The second value is a vector, which is none of a series.
    assert [row["train_loss"] for row in History.read(tmp_path, run="b")] == [3.0]
    found = History.read(tmp_path, run="a")
    assert [(r["step"], r["train_loss"]) for r in found] == [(2**31, 2), (2**31 + 1, 1)]


def test_parts_of_a_run_that_was_resumed_are_read_in_the_order_of_time(tmp_path):
    event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
    for session, steps in enumerate([(0, 1, 2), (1, 2, 3)]):
        for folder in (".", "eval"):
            events = []
            for step in steps:
                event = event_pb2.Event(wall_time=10 * session + step, step=step)
                event.summary.value.add(tag="loss", simple_value=10 * session + step)
                events.append(event)
            write_events(tmp_path / folder / f"events.tfevents.{session}", events)
    history = History.read(tmp_path)
    assert [row["train_loss"] for row in history] == [0, 11, 12, 13]
    assert [row["val_loss"] for row in history] == [0, 11, 12, 13]


def test_metrics_of_mlflow_that_come_again_count(tmp_path):
    folder = tmp_path / "metrics" / "train"
    folder.mkdir(parents=True)
    (folder / "loss").write_text("1 3.0 0\n2 2.0 10\n3 1.0 20\n4 1.5 10\n")
    (tmp_path / "metrics" / "notes.txt").write_text("hello\n")
    history = History.read(tmp_path)
    assert [(r["step"], r["train_loss"]) for r in history] == [(0, 3.0), (10, 1.5)]


def test_databases_and_offline_runs_of_others_are_told(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metrics (key TEXT)")
    database.close()
    with pytest.raises(ValueError, match="a database, but none of MLflow or trackio"):
        History.read(path)
    path.write_bytes(b":W&B\x1b\xfe\0")
    with pytest.raises(ValueError, match="`wandb sync` it"):
        History.read(path)


def test_content_tells_the_format_and_not_the_name(tmp_path):
    for source in ("keras/history.json", "own_loops/semicolon.csv", "nanogpt/log.txt"):
        path = tmp_path / "log.jsonl"
        shutil.copy(LOGS / source, path)
        assert History.read(path)[:] == History.read(LOGS / source)[:]
    rows = [{"step": i, "train_loss": 1.0, "reward": 2} for i in (1, 2)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    # As a job leaves it whose log was emptied while it wrote.
    path.write_bytes(bytes(100) + content)
    assert list(History.read(path)) == rows
    path.write_bytes((LOGS / "keras/csv_logger.csv").read_text().encode("utf-16"))
    assert History.read(path)[:] == History.read(LOGS / "keras/csv_logger.csv")[:]


def test_folder_is_searched(tmp_path):
    for k in (500, 1000):
        folder = tmp_path / f"checkpoint-{k}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"log_history": []}')
    (tmp_path / "notes.md").write_text("")
    assert find_file(tmp_path).parent.name == "checkpoint-1000"
    (tmp_path / "train.log").write_text("step 1 loss 2\n")
    assert find_file(tmp_path).parent.name == "checkpoint-1000"
    (tmp_path / "a.csv").write_text("step,loss\n")
    assert find_file(tmp_path).name == "a.csv"
    (tmp_path / "b.csv").write_text("step,loss\n")
    with pytest.raises(FileNotFoundError, match=r"several files: a\.csv, b\.csv"):
        find_file(tmp_path)
    shutil.copytree(LOGS / "tensorboard/logs", tmp_path / "tb")
    assert find_file(tmp_path / "tb") == tmp_path / "tb"


# Anything --------------------------------------------------------------------------

PIECES = [b",", b";", b"\t", b"\n", b"\r\n", b'"', b"{", b"}", b"[", b"nan", b"1e999"]
PIECES += [b"\0", b"\xff", b"\xe2\x80\xa8", b"step", b"loss", b"9" * 400, b"null"]


def tried(path: Path) -> tuple[History | None, ValueError | None]:
    try:
        return History.read(path), None
    except ValueError as error:
        return None, error


def test_every_file_is_a_history_or_a_clear_error(tmp_path):
    files = [p for p in sorted(LOGS.rglob("*")) if p.is_file()]
    path = tmp_path / "log.csv"
    kinds = {"read": 0, "refused": 0}
    for seed in range(250):
        rng = random.Random(seed)
        data = bytearray(rng.choice(files).read_bytes()[: rng.choice([300, 3000])])
        for _ in range(rng.randint(0, 6)):
            i = rng.randrange(len(data) + 1)
            data[i : i + rng.choice([0, 0, 1, 40])] = rng.choice(PIECES)
        path.write_bytes(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history, error = tried(path)
        kinds["refused" if history is None else "read"] += 1
        if history is None:
            assert str(path) in str(error)
            assert len(str(error)) < 3000
            continue
        found = [row["step"] for row in history]
        assert found == sorted(set(found)), seed
        values = [x for row in history for x in row.values()]
        assert all(isinstance(x, int | float) for x in values), seed
    assert min(kinds.values()) > 50
