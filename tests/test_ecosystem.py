"""Trackers, as their own readers see what `fit` logs to them: `make test-ecosystem`.

Each test is skipped where its library is not installed.
"""

import importlib
import math
import re
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flax")

from optax_guard._records.writers import log_function
from optax_guard.analysis import History
from tests import pages

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "trackers.md"
NAN, INF = math.nan, math.inf
# Evaluations of a clipped run that works until a norm is infinite and a loss is lost.
LOSSES, NORMS = [4.0, 3.0, 2.0, 1.0, NAN], [2.0, INF, 2.0, 2.0, NAN]
ROWS = [
    {"step": 10 * i, "train_loss": loss, "grad_norm": norm, "clip_threshold": 1.0}
    for i, (loss, norm) in enumerate(zip(LOSSES, NORMS, strict=True), start=1)
]
ALERTS = [
    ("NONFINITE_BATCH", "WARN"),
    ("CLIPPING_WORKS", "INFO"),
    ("NONFINITE_LOSS_DESPITE_CLIPPING", "ERROR"),
]

# These libraries and what they need warn of each other's future.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _nothing_outside_of_the_folder(tmp_path, monkeypatch):
    # trackio reads it when it is imported, by whichever test is first.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def log_rows(logger: Any, rows=ROWS) -> None:
    log = log_function(logger)
    for row in rows:
        log(row["step"], dict(row))


def same(found: Iterable[tuple[Any, Any]], numbers: list[float]) -> bool:
    """Whether these are the numbers of `ROWS`, NaN being equal to itself."""
    wanted = [(10 * i, x) for i, x in enumerate(numbers, start=1)]
    return repr([(int(step), float(x)) for step, x in found]) == repr(wanted)


def records_of_wandb(path: Path) -> Iterator[Any]:
    """The records of an offline file: frames of LevelDB's log, each a protobuf."""
    wandb_internal_pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # The rest of a block is empty.
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def kind_of(record: Any) -> str:
    return record.WhichOneof("record_type")


def test_offline_file_of_wandb_holds_rows_and_alerts(tmp_path):
    wandb = pytest.importorskip("wandb")
    run = wandb.init(project="p", dir=tmp_path, mode="offline")
    path = Path(run.settings.sync_file)
    log_rows(run, [*ROWS, {"step": 20, "train_loss": 9.0}])
    run.finish()
    deadline = time.monotonic() + 60
    # Another process writes the file, and ends it with this record.
    while "exit" not in map(kind_of, records := list(records_of_wandb(path))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rows, alerts = [], []
    for record in records:
        if kind_of(record) == "history":
            items = {
                (x.key or x.nested_key[0]): x.value_json for x in record.history.item
            }
            rows.append((record.history.step.num, items))
        elif kind_of(record) == "alert":
            alerts.append((record.alert.title, record.alert.level))
            assert record.alert.title in record.alert.text
    # A row of an earlier step is not taken: the page says so.
    assert same([(step, x["train/loss"]) for step, x in rows], LOSSES)
    assert same([(step, x["grad/norm"]) for step, x in rows], NORMS)
    assert alerts == ALERTS


@pytest.mark.parametrize("is_module", [False, True], ids=["run", "module"])
def test_database_of_trackio_holds_rows_and_alerts(is_module):
    trackio = pytest.importorskip("trackio")
    name = f"alerts-{'module' if is_module else 'run'}"
    run = trackio.init(project=name, name="first", embed=False)
    log_rows(trackio if is_module else run)
    trackio.finish()
    storage = importlib.import_module("trackio.sqlite_storage")
    path = storage.SQLiteStorage.get_project_db_path(name)
    history = History.read(path)
    assert same([(row["step"], row["train_loss"]) for row in history], LOSSES)
    assert same([(row["step"], row["grad_norm"]) for row in history], NORMS)
    query = "SELECT title, level, step FROM alerts ORDER BY id"
    with sqlite3.connect(path) as database:
        found = database.execute(query).fetchall()
    assert [(title, level.upper()) for title, level, _ in found] == ALERTS
    assert [step for *_, step in found] == [20, 40, 50]


@pytest.mark.parametrize("store", ["sqlite:///{}/m.db", "file://{}/mlruns"])
def test_mlflow_has_every_number(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(store.format(tmp_path))
    with mlflow.start_run() as run:
        log_rows(mlflow)
    client = mlflow.MlflowClient()

    def found(name: str) -> list[tuple[int, float]]:
        history = client.get_metric_history(run.info.run_id, name)
        return [(x.step, x.value) for x in history]

    assert same(found("train/loss"), LOSSES)
    # A database has no infinity: the page says so.
    largest = INF if store.startswith("file") else 1.7976931348623157e308
    norms = [largest if x == INF else x for x in NORMS]
    assert same(found("grad/norm"), norms)


def test_tensorboard_reads_what_a_backend_of_metrax_gets(tmp_path):
    backends = pytest.importorskip("metrax.logging")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    backend = backends.TensorboardBackend(str(tmp_path))
    log_rows(backend)
    backend.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    found = {
        x: [(e.step, e.value) for e in events.Scalars(x)]
        for x in events.Tags()["scalars"]
    }
    assert found.keys() == {"train/loss", "grad/norm", "grad/clip_threshold"}
    assert same(found["train/loss"], LOSSES)
    assert same(found["grad/norm"], NORMS)


def test_page_runs_and_prints_its_text():
    for name in ("wandb", "trackio", "mlflow", "metrax", "tensorboardX"):
        pytest.importorskip(name)
    text = PAGE.read_text(encoding="utf-8")
    text, num_marks = re.subn(r"<!-- not run: needs \w+ -->\n", "", text)
    assert num_marks == 4
    assert pages.run(text, str(PAGE)) == 8
