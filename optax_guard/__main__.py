"""The command `optax-guard`, also `python -m optax_guard`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

_EXTRA = "optax-guard[demo]"
_OPTIONAL = ("flax", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments without the command's name; those of the process if ``None``.

    Returns:
      The exit code: 0, 1 if the command failed, 2 if it was called wrongly, 130 if it
      was interrupted; of `report`, 3 if the worst finding is a warning, 4 if it is an
      error.
    """
    parser = argparse.ArgumentParser(
        prog="optax-guard", description="The safety layer of a JAX training step."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_report(commands)
    _add_replay(commands)
    _add_suggest(commands)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit:
        # argparse ends the process: right for a script, not for who calls `main`.
        return exit.code if isinstance(exit.code, int) else 2
    try:
        return arguments.run_command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train on real text with and without the guard",
        description="Trains a small recurrent network on the text of Python's own "
        "documentation, three times: unguarded, with Optax's clip, and guarded with "
        "early stopping. Less than two minutes on two cores.",
    )
    demo.add_argument("--quick", action="store_true", help="a short version, 20 s")
    demo.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs", "demo"),
        help="folder for the history and the plots; default: %(default)s",
    )
    demo.set_defaults(run_command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from optax_guard._cli import demo as _demo
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        print(
            f"optax-guard demo: {missing} is missing: pip install '{_EXTRA}'",
            file=sys.stderr,
        )
        return 1
    recipe = _demo.QUICK if arguments.quick else _demo.FULL
    return 130 if _demo.run(recipe, arguments.seed, arguments.out) is None else 0


def _add_report(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    report = commands.add_parser(
        "report",
        help="table, findings and plots of a recorded run",
        description="Says what norms and losses of a run mean, and what to try. Reads "
        "JSON Lines, CSV such as Lightning's metrics.csv, and Hugging Face's "
        "trainer_state.json. Exit code: 0 if nothing is worse than an info, 3 if there "
        "is a warning, 4 if there is an error; 1 if the run could not be read.",
    )
    report.add_argument(
        "--out",
        type=Path,
        help="folder for report.md and the plot, and the only one that is written to; "
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
    report.set_defaults(run_command=_report)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """What `History.read` takes."""
    command.add_argument("path", metavar="RUN", type=Path, help="a file, or its folder")
    command.add_argument(
        "--run", metavar="NAME", help="which of several runs in a file"
    )
    command.add_argument(
        "--column",
        metavar="NAME=THEIRS",
        action="append",
        type=_column,
        default=[],
        help="what a column is called in the file, as in grad_norm=my/norm; repeatable",
    )


def _report(arguments: argparse.Namespace) -> int:
    from optax_guard._cli import report as _report

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = _report.make_report(
                arguments.path,
                run=arguments.run,
                columns=dict(arguments.column),
                max_norm=arguments.max_norm,
            )
    except ValueError as error:
        print(f"optax-guard report: {error}", file=sys.stderr)
        return 1
    for warning in caught:
        print(f"optax-guard report: {warning.message}", file=sys.stderr)
    print(_report.as_json(report) if arguments.json else _report.as_text(report))
    if not arguments.json or arguments.html or arguments.out is not None:
        out = arguments.out or report.source.parent / "report"
        written = _report.write(report, out, html=arguments.html)
        if all(path.suffix != ".png" for path in written):
            print(
                "optax-guard report: no plot, for matplotlib is missing: pip install "
                "'optax-guard[plot]'",
                file=sys.stderr,
            )
        if not arguments.json:
            print(f"\nFiles in {out}: {', '.join(path.name for path in written)}")
    return _report.exit_code(report)


def _add_replay(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    replay = commands.add_parser(
        "replay",
        help="where stop rules would have stopped a recorded run",
        description="Plays the evaluations of a run to stop rules: where each would "
        "have stopped, what it would have saved, and what it gives up. Exit code: 0, "
        "or 1 if the run could not be read or a rule cannot be played.",
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
    replay.add_argument("--mode", choices=("min", "max"), default="min")
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    replay.add_argument(
        "--out", type=Path, help="folder for replay.txt and the plot; default: none"
    )
    replay.set_defaults(run_command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from optax_guard._cli import replay as _replay_command

    try:
        history, replayed = _replay_command.play(
            arguments.path,
            arguments.rule,
            key=arguments.key,
            mode=arguments.mode,
            run=arguments.run,
            columns=dict(arguments.column),
        )
    except ValueError as error:
        print(f"optax-guard replay: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(_replay_command.as_json(replayed))
    else:
        print(_replay_command.table(replayed))
    if arguments.out is not None:
        _replay_command.write(history, replayed, arguments.out, key=arguments.key)
    return 0


def _add_suggest(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    suggest = commands.add_parser(
        "suggest",
        help="a threshold for the norm, from the norms of a recorded run",
        description="Suggests a threshold that a share of the recorded norms is above, "
        "with its reasons. Exit code: 0, or 1 if the run could not be read or has too "
        "few norms.",
    )
    _add_reading(suggest)
    suggest.add_argument(
        "--clip-rate",
        type=float,
        default=0.1,
        help="share of the norms to clip; default: %(default)s",
    )
    suggest.add_argument("--json", action="store_true", help="print one JSON object")
    suggest.set_defaults(run_command=_suggest)


def _suggest(arguments: argparse.Namespace) -> int:
    import json

    from optax_guard.analysis import History, suggest_max_norm

    try:
        history = History.read(
            arguments.path, run=arguments.run, columns=dict(arguments.column)
        )
        suggestion = suggest_max_norm(history, clip_rate=arguments.clip_rate)
    except ValueError as error:
        print(f"optax-guard suggest: {error}", file=sys.stderr)
        return 1
    print(json.dumps(suggestion._asdict()) if arguments.json else suggestion)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
