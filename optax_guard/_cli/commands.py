"""The commands of `optax-guard`: each takes its arguments and returns an exit code.

A command imports its modules itself: `demo` needs extras that others do not need.
"""

import argparse
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from optax_guard._cli.words import complain, say

_EXTRA = "optax-guard[demo]"
_OPTIONAL = ("flax", "matplotlib", "rich")


def run_demo(arguments: argparse.Namespace) -> int:
    """Trains with and without the guard."""
    try:
        from optax_guard._cli import demo
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        complain("demo", f"{missing} is missing: pip install '{_EXTRA}'")
        return 1
    recipe, name = (
        (demo.QUICK, "demo-quick") if arguments.quick else (demo.FULL, "demo")
    )
    out = arguments.out or Path("runs", name)
    return 130 if demo.run(recipe, arguments.seed, out) is None else 0


def run_report(arguments: argparse.Namespace) -> int:
    """Prints and writes the report on a run."""
    from optax_guard._cli import report
    from optax_guard._records.runs import run_name

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = report.make_reports(
                arguments.path, max_norm=arguments.max_norm, **_how(arguments)
            )
    except (ImportError, ValueError) as error:
        complain("report", error)
        return 1
    for warning in caught:
        complain("report", warning.message)
    say(report.as_json(made) if arguments.json else report.as_text(made))
    if not arguments.json or arguments.html or arguments.out is not None:
        out = arguments.out or report.own_folder(arguments.path)
        if arguments.out is None and out.is_symlink():
            complain("report", f"{out} is a link; name a folder with `--out`")
            return 1
        if not _is_folder("report", out):
            return 1
        title = run_name(arguments.path)
        written = report.write(made, out, title=title, html=arguments.html)
        if importlib.util.find_spec("matplotlib") is None:
            complain(
                "report",
                "no plot, for matplotlib is missing: pip install 'optax-guard[plot]'",
            )
        if not arguments.json:
            say(f"\nFiles in {out}: {', '.join(path.name for path in written)}")
    return report.exit_code(made)


def run_replay(arguments: argparse.Namespace) -> int:
    """Prints where stop rules would have stopped a run."""
    from optax_guard._cli import replay
    from optax_guard.analysis._table import table

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history, outcomes = replay.play(
                arguments.path,
                arguments.rule,
                key=arguments.key,
                mode=arguments.mode,
                **_how(arguments),
            )
    except (ImportError, ValueError) as error:
        complain("replay", error)
        return 1
    for warning in caught:
        complain("replay", warning.message)
    say(replay.as_json(outcomes) if arguments.json else table(outcomes))
    if arguments.out is not None:
        if not _is_folder("replay", arguments.out):
            return 1
        replay.write(history, outcomes, arguments.out, key=arguments.key)
    return 0


def run_suggest(arguments: argparse.Namespace) -> int:
    """Prints a threshold for the norms of a run."""
    from optax_guard.analysis import History, suggest_max_norm

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = History.read(arguments.path, **_how(arguments))
            suggestion = suggest_max_norm(history, clip_rate=arguments.clip_rate)
    except (ImportError, ValueError) as error:
        complain("suggest", error)
        return 1
    for warning in caught:
        complain("suggest", warning.message)
    say(json.dumps(suggestion._asdict()) if arguments.json else suggestion)
    return 0


def run_watch(arguments: argparse.Namespace) -> int:
    """Prints the findings of a run while it runs, until it is interrupted."""
    from optax_guard._cli import watch
    from optax_guard._records.findings import Finding

    try:
        for each in watch.follow(arguments.path, **_how(arguments)):
            if isinstance(each, Finding):
                say(each)
            else:
                complain("watch", each)
    except ImportError as error:
        complain("watch", error)
    return 1


def _is_folder(command: str, out: Path) -> bool:
    """Whether a folder may be made there; complains if it may not."""
    if out.exists() and not out.is_dir():
        complain(command, f"`--out` must be a folder, got the file {out}")
        return False
    return True


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `History.read`."""
    return {
        "run": arguments.run,
        "columns": dict(arguments.column),
        "pattern": arguments.pattern,
    }
