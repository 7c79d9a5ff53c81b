"""The arguments of each command of `optax-guard`."""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

from optax_guard._cli import commands

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_FORMATS = (
    "Reads JSON Lines, CSV, Hugging Face's trainer_state.json, Keras' history, event "
    "files of TensorBoard, exports of Weights & Biases, metrics or mlflow.db of "
    "MLflow, trackio's database, and text such as `step 10 loss 2.5 norm 0.7`."
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``run_command`` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="optax-guard", description="The safety layer of a JAX training step."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    group = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(group)
    _add_report(group)
    _add_watch(group)
    _add_replay(group)
    _add_suggest(group)
    return parser


def _version() -> str:
    try:
        return version("optax-guard")
    except PackageNotFoundError:
        return "(not installed)"


def _add_demo(group: Commands) -> None:
    demo = group.add_parser(
        "demo",
        help="train on real text with and without the guard",
        description="Trains a small recurrent network on the text of Python's own "
        "documentation, four times: unguarded, with Optax's clip, with that in "
        "`apply_if_finite`, and guarded with early stopping. Some batches are corrupt. "
        "Takes at most 90 s on two free cores.",
    )
    demo.add_argument("--quick", action="store_true", help="a short version, 40 s")
    demo.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    demo.add_argument(
        "--out",
        type=Path,
        help="folder for the history and the plots; default: runs/demo, and "
        "runs/demo-quick for the short version",
    )
    demo.set_defaults(run_command=commands.run_demo)


def _add_report(group: Commands) -> None:
    report = group.add_parser(
        "report",
        help="table, findings and plots of a recorded run",
        description="Says what the norms and losses of a run mean, and what to try. "
        "Several runs, in a file or in folders beside each other, stand side by side. "
        f"{_FORMATS} Exit code: 0 if nothing is worse than an info, 3 if there "
        "is a warning, 4 if there is an error; 1 if the run could not be read.",
    )
    report.add_argument(
        "--out",
        type=Path,
        help="folder for report.md and the plots; nothing else is written to; "
        "default: `report` beside the file",
    )
    report.add_argument(
        "--html", action="store_true", help="also write report.html, one page"
    )
    report.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object and nothing else; writes no files without --out",
    )
    _add_reading(report)
    report.add_argument(
        "--max-norm", type=float, help="threshold of the clip, if the file lacks it"
    )
    report.set_defaults(run_command=commands.run_report)


def _add_watch(group: Commands) -> None:
    watch = group.add_parser(
        "watch",
        help="the findings of a run while it runs",
        description="Follows a growing file or folder, and prints each finding when it "
        f"first holds, until it is interrupted. {_FORMATS}",
    )
    _add_reading(watch)
    watch.set_defaults(run_command=commands.run_watch)


def _add_replay(group: Commands) -> None:
    replay = group.add_parser(
        "replay",
        help="where stop rules would have stopped a recorded run",
        description="Plays the evaluations of a run to stop rules. Tells where each "
        "would have stopped, the steps that it would have saved, and the loss that it "
        "gives up. Exit code: 0, or 1 if the run could not be read or a rule cannot be "
        "played.",
    )
    _add_reading(replay)
    replay.add_argument(
        "--rule",
        metavar="RULE",
        action="append",
        default=[],
        help="a rule of optax_guard.stop as in Python, such as 'patience(5)' or "
        "'any_of(lag(3), target(0.1))'; repeatable; default: patience from 1 to 20",
    )
    replay.add_argument("--key", help="column of the value; default: val_loss or value")
    replay.add_argument(
        "--mode",
        choices=("min", "max"),
        help="whether smaller or larger values are better; default: min, but a column "
        "that is called accuracy, reward or the like needs it",
    )
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    replay.add_argument(
        "--out", type=Path, help="folder for replay.txt and the plot; default: none"
    )
    replay.set_defaults(run_command=commands.run_replay)


def _add_suggest(group: Commands) -> None:
    suggest = group.add_parser(
        "suggest",
        help="a threshold for the norm, from the norms of a recorded run",
        description="Suggests a threshold that clips a share of the recorded norms, "
        "and gives its reasons. Exit code: 0, or 1 if the run could not be read or has "
        "too few norms.",
    )
    _add_reading(suggest)
    suggest.add_argument(
        "--clip-rate",
        type=float,
        default=0.1,
        help="share of the steps to clip; default: %(default)s",
    )
    suggest.add_argument("--json", action="store_true", help="print one JSON object")
    suggest.set_defaults(run_command=commands.run_suggest)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of `History.read`."""
    command.add_argument(
        "--pattern",
        metavar="REGEX",
        help="for other lines of text, a regular expression with named groups, as in "
        r"'it (?P<step>\d+) cost (?P<train_loss>\S+)'",
    )
    command.add_argument("path", metavar="RUN", type=Path, help="a file, or its folder")
    command.add_argument("--run", metavar="NAME", help="which of several runs")
    command.add_argument(
        "--column",
        metavar="NAME=THEIRS",
        action="append",
        type=_column,
        default=[],
        help="the name of a column in the file, as in grad_norm=my/norm; repeatable",
    )


def _column(text: str) -> tuple[str, str]:
    name, equals, theirs = text.partition("=")
    if not (name and equals and theirs):
        raise argparse.ArgumentTypeError(f"must be NAME=THEIRS, got {text!r}")
    return name, theirs


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 0 and below 2**32, got {text!r}"
        )
    return seed
