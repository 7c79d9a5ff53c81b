"""The record of a run: on disk line by line, back again, and from other systems."""

import enum
import json
import math
import struct
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import monitoring

import optax_guard as og
from optax_guard._records.grouped import grouped_name
from optax_guard._records.writers import log_function
from optax_guard.analysis import Diagnosis, History, diagnose, replay, table
from optax_guard.loops._host import Record

NAN, INF = math.nan, math.inf
ODD = [0.1, 1e-310, -0.0, NAN, INF, -INF, 3, np.float32(0.1), jnp.bfloat16(1.5)]


def same(a, b):
    """Whether rows are equal, NaN being equal to itself, with types and signs."""
    return [repr(sorted(x.items())) for x in a] == [repr(sorted(x.items())) for x in b]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_rows_are_read_back_as_they_were(tmp_path):
    history = History(tmp_path / "new" / "h.jsonl")
    for i, x in enumerate(ODD):
        history.append(i, loss=x, accuracy=x)
    assert [row["accuracy"] for row in history][:3] == [0.1, 1e-310, 0.0]
    assert history[7]["accuracy"] == float(np.float32(0.1))
    assert same(History.read(tmp_path / "new" / "h.jsonl"), history)
    assert same(History.read(tmp_path / "new"), history)


def test_every_line_is_strict_json_and_on_disk_at_once(tmp_path):
    path = tmp_path / "h.jsonl"
    history = History(path)
    for i, x in enumerate(ODD):
        history.append(i, loss=x)
        lines = path.read_text().splitlines()
        assert len(lines) == i + 1
        written = json.loads(lines[-1], parse_constant=refuse)["train_loss"]
        assert float(written) == pytest.approx(float(x), nan_ok=True)


def test_values_of_one_step_are_one_row_and_an_earlier_step_goes_back(tmp_path):
    history = History(tmp_path / "h.jsonl")
    for step, row in [
        (1, {"loss": 3.0}),
        (2, {"loss": 2.0}),
        (2, {"val_loss": 2.5}),
        (3, {"loss": NAN}),
        (2, {"loss": 1.5}),
    ]:
        history(step, row)
    expected = [
        {"train_loss": 3.0, "step": 1},
        {"train_loss": 1.5, "step": 2, "val_loss": 2.5},
    ]
    assert list(history) == expected
    # Nothing was removed from the disk.
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 5
    assert list(History.read(tmp_path)) == expected


def test_killed_run_loses_its_last_line_only(tmp_path):
    path = tmp_path / "h.jsonl"
    history = History(path)
    for i in range(3):
        history.append(i, loss=float(i))
    whole = path.read_bytes()
    cut = whole.splitlines(keepends=True)
    for size in range(len(whole) - len(cut[-1]) + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.warns(UserWarning, match=r"h\.jsonl: line 3: the last line is"):
            assert same(History.read(path), history[:2])
    resumed = History(path)
    resumed.append(2, loss=2.0)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    History(path).append(3, loss=1.0)
    assert len(History.read(path)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"loss": 1}\n{"loss": \n{"loss": 2}\n', r"h\.jsonl, line 2: not JSON"),
        ('{"loss": 1}\n{"loss": \n', r"h\.jsonl, line 2: not JSON"),
        ("[1]\n", r"h\.jsonl: JSON, but no log"),
        ('{"loss": 1}\n[1]\n', r"line 2: must be a JSON object"),
        ('{"loss": "high"}\n', r"line 1: `train_loss` must be a number, got 'high'"),
        ('{"step": -1, "loss": 1}\n', r"line 1: `step` must be a whole number"),
    ],
)
def test_broken_line_is_named(tmp_path, text, message):
    path = tmp_path / "h.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        History.read(path)


def test_buffers_of_a_device_loop_are_rows():
    history = History()
    history.extend({"loss": jnp.array([3.0, 2.0, 0.0]), "grad_norm": np.ones(3)}, 2)
    history.extend({"step": np.array([10, 20]), "loss": np.array([1.0, 0.5])})
    assert [row["step"] for row in history] == [1, 2, 10, 20]
    np.testing.assert_array_equal(history.column("train_loss"), [3.0, 2.0, 1.0, 0.5])
    np.testing.assert_array_equal(history.column("grad_norm"), [1, 1, NAN, NAN])
    with pytest.raises(ValueError, match="`buffers` must be vectors of one length"):
        history.extend({"loss": np.ones((2, 3))})


def test_bad_values_name_the_argument():
    history = History()
    with pytest.raises(ValueError, match=r"`loss` must be a scalar, got .* \(2,\)"):
        history.append(1, loss=np.ones(2))
    with pytest.raises(TypeError, match="`note` must be a number, got 'x'"):
        history.append(1, note="x")
    with pytest.raises(ValueError, match="`step` must be a whole number"):
        history.append(1.5)
    with pytest.raises(ValueError, match=r"`path` must end in \.jsonl"):
        History("trainer_state.json")
    assert len(history) == 0


# As the Trainer of Transformers 4 writes it: training and evaluation apart, and at the
# end a sum of the whole run.
TRAINER_STATE = """{"best_metric": null, "global_step": 20, "log_history": [
 {"epoch": 0.5, "grad_norm": 12.5, "learning_rate": 5e-05, "loss": 2.5, "step": 10},
 {"epoch": 0.5, "eval_loss": 2.25, "eval_runtime": 1.5, "step": 10},
 {"epoch": 1.0, "grad_norm": NaN, "learning_rate": 0.0, "loss": 1.5, "step": 20},
 {"epoch": 1.0, "step": 20, "total_flos": 1e12, "train_loss": 2.0,
  "train_runtime": 3.0}]}"""
# As Lightning's CSVLogger does: one line a call of `log`.
METRICS = """epoch,grad_2.0_norm_total,lr-AdamW,step,train_loss_step,val_loss
0,3.5,,9,2.5,
0,,0.001,9,,
0,,,9,,2.25
1,nan,,19,1.5,
"""


def test_trainer_state_of_hugging_face_is_read(tmp_path):
    (tmp_path / "trainer_state.json").write_text(TRAINER_STATE)
    first, last = History.read(tmp_path, max_norm=1.0)
    assert first == {
        "step": 10,
        "epoch": 0.5,
        "train_loss": 2.5,
        "val_loss": 2.25,
        "grad_norm": 12.5,
        "clip_threshold": 1.0,
        "learning_rate": 5e-05,
        "eval_runtime": 1.5,
    }
    assert last["train_loss"] == 1.5
    assert math.isnan(last["grad_norm"])


def test_metrics_of_lightning_are_read(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    first, last = History.read(tmp_path)
    assert first == {
        "step": 9,
        "epoch": 0,
        "train_loss": 2.5,
        "val_loss": 2.25,
        "grad_norm": 3.5,
        "learning_rate": 0.001,
    }
    assert last["step"] == 19
    assert math.isnan(last["grad_norm"])
    (tmp_path / "metrics.csv").write_text(METRICS[:-5])
    with pytest.warns(UserWarning, match="line 5: the last line is unfinished"):
        assert len(History.read(tmp_path)) == 1
    (tmp_path / "metrics.csv").write_text(METRICS + "1,2,3\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 6: must have 6 cells"):
        History.read(tmp_path)


def test_other_names_can_be_given(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "Iteration,cost,my/norm,when\n5,2.5,1.0,monday\n6,2.0,0.5,tuesday\n"
    )
    columns = {"train_loss": "cost", "grad_norm": "my/norm"}
    assert History.read(tmp_path, columns=columns)[1] == {
        "step": 6,
        "train_loss": 2.0,
        "grad_norm": 0.5,
    }
    with pytest.raises(ValueError, match=r"`columns` must name columns .* got 'cots'"):
        History.read(path, columns={"train_loss": "cots"})
    with pytest.warns(UserWarning, match="not used are 'my/norm'"):
        history = History.read(path)
    with pytest.raises(ValueError, match="`history` must have a loss or a gradient"):
        diagnose(history)


def test_row_without_a_step_is_told_the_order():
    row = {f"name_{i}": np.float32(0) for i in range(20)}
    with pytest.raises(TypeError, match=r"`append\(step, row\)`") as caught:
        History().append(row)
    assert len(str(caught.value)) < 160


def test_one_of_several_runs_is_chosen(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"run": "a", "step": 1, "loss": 1}\n{"run": "b", "loss": "NaN"}\n')
    assert math.isnan(History.read(path, run="b")[0]["train_loss"])
    with pytest.raises(ValueError, match="several runs: a, b"):
        History.read(path)
    with pytest.raises(ValueError, match=r"`run` must be one of \['a', 'b'\]"):
        History.read(path, run="c")


def test_folder_without_a_history_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl, trainer_state\.json"):
        History.read(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="`log_history`"):
        History.read(tmp_path)


ROWS = [
    {"step": 1, "grad_norm": 15.2, "clip_threshold": 5.0, "loss": 2.3, "val_loss": NAN},
    {"step": 2, "grad_norm": 3.2, "clip_threshold": 5.0, "loss": 0.7},
]


def test_table_as_text_and_as_markdown():
    heading, first, last = table(ROWS).splitlines()
    names = "step grad norm after clip clipped train loss val loss"
    assert heading.split() == names.split()
    assert first.split() == ["1", "15.2", "5", "100.0%", "2.3", "nan"]
    assert last.split() == ["2", "3.2", "3.2", "0.0%", "0.7"]
    assert len(heading) == len(first)
    lines = table(ROWS, markdown=True).splitlines()
    assert lines[0].startswith("| step | grad norm |")
    assert lines[1] == "| ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3] == "| 2 | 3.2 | 3.2 | 0.0% | 0.7 |  |"


def test_a_bar_in_a_name_stays_in_its_cell():
    rows = [{"step": 1, "loss": 2.0}]
    rule = og.stop.target(1.0)
    outcomes = replay([{"step": 1, "val_loss": 2.0}], {"a | b": rule})
    *_, line = table(outcomes, markdown=True).splitlines()
    assert line == r"| a \| b | 1 | 0 | 1 | 2 | 0 |  | RUNNING |"
    mixed: Any = [*rows, *outcomes]
    with pytest.raises(TypeError, match="each a dict of numbers, got a `Replayed`"):
        table(mixed)


def test_rates_of_metrics_become_shares_since_the_row_before():
    # 5 of the first 10 updates clipped, then none, then all; as `og.metrics` counts.
    rows = [
        {"num_updates": n, "clip_rate": k / n, "grad_norm": 2.0}
        for n, k in [(10, 5), (20, 5), (30, 15)]
    ]
    shares = [line.split()[-1] for line in table(rows).splitlines()[1:]]
    assert shares == ["50.0%", "0.0%", "100.0%"]


class Clu:
    def __init__(self):
        self.written = []

    def write_scalars(self, step, scalars):
        self.written.append((step, scalars))


def test_names_are_grouped_for_clu():
    writer = Clu()
    row = {"step": 3, "grad_norm": 1.0, "clip_rate_1": 0.5, "train_accuracy": 0.25}
    log_function(writer)(3, row)
    scalars = {"grad/norm": 1.0, "grad/clip_rate_1": 0.5, "train/accuracy": 0.25}
    assert writer.written == [(3, scalars)]
    assert grouped_name("skip_rate") == "guard/skip_rate"
    assert log_function(print) is print


def test_clus_event_files_hold_the_grouped_names(tmp_path):
    reason = "CLU's writer of event files needs TensorFlow and TensorBoard"
    metric_writers = pytest.importorskip(
        "clu.metric_writers", reason=reason, exc_type=ImportError
    )
    tensorflow = pytest.importorskip("tensorflow")
    writer = metric_writers.SummaryWriter(str(tmp_path))
    row = {"step": 10, "grad_norm": 2.5, "clip_rate": 0.25, "val_loss": 0.5}
    log_function(writer)(10, row)
    writer.close()
    (path,) = tmp_path.iterdir()
    events = map(
        tensorflow.compat.v1.Event.FromString,
        tensorflow.data.TFRecordDataset(str(path)).as_numpy_iterator(),
    )
    assert [
        (event.step, value.tag, float(tensorflow.make_ndarray(value.tensor)))
        for event in events
        for value in event.summary.value
    ] == [(10, "grad/norm", 2.5), (10, "grad/clip_rate", 0.25), (10, "val/loss", 0.5)]


def event_scalars(path):
    """(step, name, value) of an event file: framed records, each a protobuf."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            yield event.step, value.tag, value.simple_value
        data = data[12 + length + 4 :]


def test_tensorboard_files_hold_the_grouped_names(tmp_path):
    tensorboardx = pytest.importorskip("tensorboardX")
    with tensorboardx.SummaryWriter(str(tmp_path)) as writer:
        log = log_function(writer)
        log(10, {"step": 10, "grad_norm": 2.5, "clip_rate": 0.25, "val_loss": 0.5})
        log(20, {"step": 20, "grad_norm": INF, "num_skipped": 3})
    (path,) = tmp_path.iterdir()
    assert list(event_scalars(path)) == [
        (10, "grad/norm", 2.5),
        (10, "grad/clip_rate", 0.25),
        (10, "val/loss", 0.5),
        (20, "grad/norm", INF),
        (20, "guard/num_skipped", 3.0),
    ]


class AlertLevel(enum.Enum):
    """As trackio's; found, as there, beside the class of the run."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class Run:
    """As a run of W&B or trackio."""

    def __init__(self):
        self.rows, self.alerts = {}, []

    def log(self, metrics, step=None):
        self.rows[step] = metrics

    def alert(self, title, text, level):
        self.alerts.append((title, level, text))


def test_run_gets_each_kind_of_finding_once_as_an_alert_of_its_severity(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__.partition(".")[0], sys.modules[__name__])
    # The clip works, then does not, then does again; then the loss is lost.
    losses = [8, 7, 6, 5, 4, 4, 8, 8, 8, 7, 6, 5, 4, 3, 2, 1, NAN]
    run, past = Run(), Run()
    log = log_function(run)
    rows = [
        {"step": i, "grad_norm": 2.0, "clip_threshold": 1.0, "train_loss": loss}
        for i, loss in enumerate(losses)
    ]
    for row in rows:
        log(row["step"], row)
    assert run.rows[0] == {
        "grad/norm": 2.0,
        "grad/clip_threshold": 1.0,
        "train/loss": 8,
    }
    assert [(title, level) for title, level, _ in run.alerts] == [
        ("CLIPPING_WORKS", AlertLevel.INFO),
        ("NONFINITE_LOSS_DESPITE_CLIPPING", AlertLevel.ERROR),
        ("NONFINITE_BATCH", AlertLevel.WARN),
    ]
    assert run.alerts[1][2].startswith(
        "ERROR NONFINITE_LOSS_DESPITE_CLIPPING (step 16)"
    )
    # A run that is resumed at its last row has told the first.
    record = Record([past], SimpleNamespace(row=lambda row: None), rows[:-1])
    record.put(16, rows[-1], flags={})
    record.read()
    assert past.alerts == run.alerts[1:]
    assert list(past.rows) == [16]


def test_backend_of_metrax_and_mlflow_get_the_grouped_names():
    calls = []

    class Backend:
        def log_scalar(self, event, value, **kwargs):
            calls.append((event, value, kwargs))

    class Mlflow:
        def log_metrics(self, metrics, step=None):
            calls.append((metrics, step))

    row = {"step": 3, "grad_norm": INF, "val_loss": 2.0}
    log_function(Backend())(3, row)
    log_function(Mlflow())(3, row)
    assert calls == [
        ("grad/norm", INF, {"step": 3}),
        ("val/loss", 2.0, {"step": 3}),
        ({"grad/norm": INF, "val/loss": 2.0}, 3),
    ]


def test_history_hears_scalars_that_have_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "_scalar_listeners", [])
    history = History(tmp_path / "h.jsonl")
    jax.monitoring.register_scalar_listener(history.log_scalar)
    for step in (1, 2):
        jax.monitoring.record_scalar("/train/loss", float(step), step=step)
        jax.monitoring.record_scalar("/train/tokens", 7, step=step, host=0)
    jax.monitoring.record_scalar("/jax/checkpoint/write/gbytes", 1.5)
    jax.monitoring.record_scalar("eval/loss", jnp.float32(NAN), step=2)
    history.close()
    rows = [
        {"step": 1, "train_loss": 1.0, "train/tokens": 7},
        {"step": 2, "train_loss": 2.0, "train/tokens": 7, "val_loss": NAN},
    ]
    assert same(history, rows)
    assert same(History.read(tmp_path), rows)


def test_fit_logs_into_a_history_and_a_diagnosis(tmp_path, capsys):
    pytest.importorskip("flax")
    from optax_guard.flax import TrainState, fit

    state = TrainState.create(
        apply_fn=lambda p: p,
        params=jnp.array(8.0),
        tx=og.guard(optax.sgd(1.0), clip=2.0),
    )

    def train_step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: p**2)(state.params)
        return state.apply_gradients(grads=grads, value=loss), loss

    history = History(tmp_path / "h.jsonl")
    result = fit(
        state,
        train_step,
        lambda step: None,
        num_steps=5,
        eval_every=1,
        loggers=[history, Diagnosis()],
    )
    assert same(history, result.history)
    assert same(History.read(tmp_path), result.history)
    # 8, 6, 4, 2 and 0: the gradient is twice that, the step at most 2.
    np.testing.assert_array_equal(history.column("grad_norm"), [16, 12, 8, 4, 0])
    np.testing.assert_array_equal(history.column("train_loss"), [64, 36, 16, 4, 0])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("INFO CLIPPING_WORKS (step 4)")


def test_a_writer_that_can_be_called_is_called():
    rows = []

    class Both:
        def __call__(self, step: int, row: dict[str, float]) -> None:
            rows.append((step, row))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise AssertionError

    log_function(Both())(3, {"grad_norm": 1.0})
    assert rows == [(3, {"grad_norm": 1.0})]


def test_rows_of_an_earlier_run_in_the_same_file_are_told(tmp_path):
    path = tmp_path / "history.jsonl"

    def log(*steps):
        history = History(path)
        for step in steps:
            history.append(step, train_loss=1.0 / step)

    log(1, 2, 3)
    # A run that is resumed goes back, too, but not to its first row.
    log(2, 3, 4, 5)
    assert len(History.read(path)) == 5
    log(1, 2, 3)
    with pytest.warns(
        UserWarning, match="5 rows, perhaps of an earlier run, were left"
    ):
        assert len(History.read(path)) == 3
