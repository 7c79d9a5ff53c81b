"""Tries mutants of the core, by `mutants.toml`; `make mutants` runs it in a clone.

Every mutant of the sample meets the short tier. The full tier holds the short one, so
it only meets the mutants that survived.
"""

# Only `make mutants` installs the packages that this file imports.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import argparse
import ast
import random
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import toml
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import (
    MutationSpec,
    TestOutcome,
    WorkerOutcome,
    WorkItem,
    WorkResult,
)

CONFIG = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PYTEST = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider"
# The marks that a tier selects.
TIERS = {
    "short": "not multihost and not full and not soak",
    "full": "not multihost and not soak",
}


class Count(NamedTuple):
    """Mutants of a module, or of several."""

    tried: int = 0
    killed_by_short: int = 0
    killed_by_full: int = 0
    late: int = 0  # Killed by the limit of time, and counted above as well.

    def __str__(self) -> str:
        share = self.killed_by_short / max(self.killed_by_full, 1)
        return (
            f"{self.tried} tried, {self.killed_by_full} killed by the full tier, "
            f"{self.killed_by_short} by the short tier ({share:.0%}), "
            f"{self.late} not in time"
        )


class Mutant(NamedTuple):
    """A change that is the same one in every session."""

    operator: str
    occurrence: int


def mutant_of(item: WorkItem) -> Mutant:
    change: MutationSpec = item.mutations[0]
    return Mutant(change.operator_name, change.occurrence)


def run(command: str, *args: str) -> None:
    """Runs a command that was installed beside Python."""
    subprocess.run([Path(sys.executable).with_name(command), *args], check=True)


def that_change_the_program(items: list[WorkItem], path: Path) -> list[WorkItem]:
    """The mutants of a file without those of a type or of the syntax."""
    source = path.read_text()
    lines = source.splitlines()
    types = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for owner in ast.walk(ast.parse(source))
        for field in ("annotation", "returns")
        if isinstance(node := getattr(owner, field, None), ast.expr)
    ]

    def changes_program(at: tuple[int, int]) -> bool:
        # The bare star before keyword arguments is taken for a multiplication.
        is_star = lines[at[0] - 1].startswith("*,", at[1])
        return not is_star and not any(start <= at < end for start, end in types)

    return [item for item in items if changes_program(item.mutations[0].start_pos)]


def leave_pending(db: WorkDB, chosen: Collection[Mutant]) -> None:
    for item in list(db.pending_work_items):
        if mutant_of(item) not in chosen:
            db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))


class Session:
    """The mutants of a module before the tests of one tier."""

    def __init__(self, name: str, tests: str, tier: str):
        self.path = Path("optax_guard", f"{name}.py")
        file = f"build/{name.replace('/', '-')}.{tier}"
        self.config, self.session = f"{file}.toml", f"{file}.sqlite"
        command = f"{PYTEST} {tests} {self.path} -m '{TIERS[tier]}'"
        excluded = {"exclude-operators": CONFIG["exclude-operators"]}
        settings = {
            "module-path": str(self.path),
            "timeout": CONFIG["timeout"],
            "test-command": command,
            "distributor": {"name": "local"},
            "filters": {"operators-filter": excluded},
        }
        Path(self.config).write_text(toml.dumps({"cosmic-ray": settings}))
        run("cosmic-ray", "baseline", self.config)
        run("cosmic-ray", "init", self.config, self.session)
        run("cr-filter-operators", self.session, self.config)

    def sample(self, most: int) -> list[Mutant]:
        with use_db(self.session) as db:
            made = that_change_the_program(list(db.pending_work_items), self.path)
        kept = random.Random(CONFIG["seed"]).sample(made, min(most, len(made)))
        return [mutant_of(item) for item in kept]

    def survivors(self, chosen: Collection[Mutant]) -> tuple[dict[Mutant, str], int]:
        """The differences of those that survive, and how many came too late."""
        with use_db(self.session) as db:
            leave_pending(db, chosen)
        run("cosmic-ray", "exec", self.config, self.session)
        with use_db(self.session) as db:
            mutants = {item.job_id: mutant_of(item) for item in db.work_items}
            results = list(db.results)
        survived = {
            mutants[str(job)]: str(result.diff)
            for job, result in results
            if result.test_outcome == TestOutcome.SURVIVED
        }
        return survived, sum(result.output == "timeout" for _, result in results)


def try_mutants(name: str, most: int, tests: str) -> Count:
    """Prints the mutants of a module that survive each tier, and counts the others."""
    short = Session(name, tests, "short")
    chosen = short.sample(most)
    survived, late = short.survivors(chosen)
    left, later = survived, 0
    if survived:
        left, later = Session(name, tests, "full").survivors(survived)
    for mutant, diff in survived.items():
        print("SURVIVED" if mutant in left else "KILLED BY THE FULL TIER ONLY", diff)
    count = Count(
        tried=len(chosen),
        killed_by_short=len(chosen) - len(survived),
        killed_by_full=len(chosen) - len(left),
        late=late + later,
    )
    print(f"{name}: {count}", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--most", type=int, help="mutants of each module at most")
    args = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    counts = []
    for name in args.modules or CONFIG["modules"]:
        most, tests = CONFIG["modules"][name]
        counts.append(try_mutants(name, min(most, args.most or most), tests))
    print(f"all: {Count(*map(sum, zip(*counts, strict=True)))}")


if __name__ == "__main__":
    main()
