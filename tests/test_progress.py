"""The display: a bar and a growing table on a terminal, plain lines elsewhere."""

import io
import subprocess
import sys
import time

import pytest

from optax_guard._records.progress import Progress

pytest.importorskip("rich")

ROW = {
    "step": 200,
    "train_loss": 2.25,
    "grad_norm": 3123.4567,
    "clipped_norm": 1.0,
    "clip_threshold": 1.0,
    "clip_rate": 0.125,
    "skip_rate": 0.01,
    "num_skipped": 2,
    "val_loss": 2.5,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_have_the_columns_in_their_order():
    file = io.StringIO()
    with Progress(400, "guarded", file) as progress:
        progress.advance(200)
        progress.row(ROW)
        progress.row({**ROW, "step": 400})
    title, heading, *rows = file.getvalue().splitlines()
    assert title == "guarded"
    assert heading.split("  ")[-1].strip() == "val loss"
    names = "step grad norm after clip clipped skipped train loss val loss"
    assert heading.split() == names.split()
    assert rows[0].split() == ["200", "3123", "1", "12.5%", "2", "2.25", "2.5"]
    assert rows[1].split()[0] == "400"
    assert len(heading) == len(rows[0]) == len(rows[1]) <= 80


def test_rows_appear_at_once():
    file = io.StringIO()
    with Progress(2, file=file) as progress:
        progress.row(ROW)
        assert "3123" in file.getvalue()


def test_epoch_is_beside_step_and_other_values_have_their_own_column():
    file = io.StringIO()
    with Progress(2, file=file) as progress:
        progress.row({"step": 20, "epoch": 1.5, "val_accuracy": 0.75})
    heading, row = file.getvalue().splitlines()
    assert heading.split() == ["step", "epoch", "val", "accuracy"]
    assert row.split() == ["20", "1.5", "0.75"]


def test_value_that_is_missing_later_leaves_a_gap():
    file = io.StringIO()
    with Progress(2, file=file) as progress:
        progress.row({"step": 1, "value": 0.5})
        progress.row({"step": 2})
    assert file.getvalue().splitlines()[-1].split() == ["2"]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def wait_for(text, terminal):
    """The bar is drawn ten times a second, by a thread."""
    end = time.monotonic() + 60
    while text not in terminal.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    assert text in terminal.getvalue()


@pytest.mark.parametrize("done", [200, 400])
def test_bar_compiles_first_and_stays_only_if_it_is_full(terminal, done):
    with Progress(400, "guarded", terminal) as progress:
        assert "compiling" in terminal.getvalue()
        progress.advance(done)
        wait_for(f"{done}/400", terminal)
    # This stands after the bar was erased for the last time.
    last = terminal.getvalue().rpartition("\x1b[2K")[2]
    assert ("400/400" in last) == (done == 400)
    assert "compiling" not in last


def test_terminal_has_a_bar_below_the_rows(terminal):
    with Progress(400, "guarded", terminal) as progress:
        progress.advance(200)
        progress.row(ROW)
        wait_for("200/400", terminal)
    shown = terminal.getvalue()
    assert "50%" in shown
    assert shown.index("grad norm") < shown.index("3123") < shown.rindex("200/400")


def test_without_rich_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['rich'] = None\n"
        "from optax_guard._records.progress import Progress\n"
        "try: Progress(1)\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "pip install 'optax-guard[demo]'" in result.stdout
