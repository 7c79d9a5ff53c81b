"""The command: `python -m benchmarks.pictures`."""

import argparse

from benchmarks._results import FOLDER
from benchmarks.pictures import PICTURES, __doc__, draw

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}"
)
names = parser.parse_args().names or list(PICTURES)
for name in names:
    if name not in PICTURES:
        parser.error(f"`NAME` must be one of {', '.join(PICTURES)}, got {name!r}")
    print(draw(PICTURES[name], FOLDER / f"{name}.json"))
