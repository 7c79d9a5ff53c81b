"""The command `optax-guard`, also `python -m optax_guard`."""

import argparse
import sys
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
      was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="optax-guard", description="The safety layer of a JAX training step."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit:
        # argparse ends the process: right for a script, not for who calls `main`.
        return exit.code if isinstance(exit.code, int) else 2
    try:
        return arguments.run(arguments)
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
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from optax_guard import _demo
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
