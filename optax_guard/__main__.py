"""The command `optax-guard`, also `python -m optax_guard`."""

import sys
from collections.abc import Sequence

from optax_guard._cli.arguments import make_parser
from optax_guard._cli.words import shown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments without the command's name; those of the process if ``None``.

    Returns:
      The exit code: 0; 1 if the command failed; 2 if its arguments are wrong; 130 if it
      was interrupted. `report` returns 3 if its worst finding is a warning, and 4 if it
      is an error.
    """
    parser = make_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit:
        # argparse ends the process. A script wants that, a caller of `main` does not.
        return exit.code if isinstance(exit.code, int) else 2
    try:
        return arguments.run_command(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{parser.prog}: {shown(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
