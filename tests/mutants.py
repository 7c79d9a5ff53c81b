"""Tries mutants of the core, by `mutants.toml`; `make mutants` runs it in a clone."""

# Only `make mutants` installs what it imports.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import ast
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import toml
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

CONFIG = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PYTEST = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider "


def run(command: str, *args: str) -> None:
    """Runs a command that was installed beside Python."""
    subprocess.run([Path(sys.executable).with_name(command), *args], check=True)


def choose(db: WorkDB, path: Path, most: int) -> int:
    """Leaves a sample pending of all that change the program; returns how many do."""
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

    items = list(db.pending_work_items)
    made = [item for item in items if changes_program(item.mutations[0].start_pos)]
    kept = random.Random(CONFIG["seed"]).sample(made, min(most, len(made)))
    for item in items:
        if item not in kept:
            db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
    return len(made)


def try_mutants(name: str, most: int, tests: str) -> None:
    """Prints the mutants of a module that survived, and how many did not."""
    path = Path("optax_guard", f"{name}.py")
    file = name.replace("/", "-")
    config, session = f"build/{file}.toml", f"build/{file}.sqlite"
    filters = {"operators-filter": {"exclude-operators": CONFIG["exclude-operators"]}}
    settings = {
        "module-path": str(path),
        "timeout": CONFIG["timeout"],
        "test-command": f"{PYTEST} {tests} {path}",
        "distributor": {"name": "local"},
        "filters": filters,
    }
    Path(config).write_text(toml.dumps({"cosmic-ray": settings}))
    run("cosmic-ray", "baseline", config)
    run("cosmic-ray", "init", config, session)
    run("cr-filter-operators", session, config)
    with use_db(session) as db:
        made = choose(db, path, most)
    run("cosmic-ray", "exec", config, session)
    with use_db(session) as db:
        results = [r for _, r in db.results if r.worker_outcome == WorkerOutcome.NORMAL]
    survived = [r.diff for r in results if r.test_outcome == TestOutcome.SURVIVED]
    num_late = sum(r.output == "timeout" for r in results)
    print(*survived, sep="\n")
    print(
        f"{name}: {made} made, {len(results)} tried, {len(survived)} survived, "
        f"{num_late} not in time",
        flush=True,
    )


if __name__ == "__main__":
    Path("build").mkdir(exist_ok=True)
    for name in sys.argv[1:] or CONFIG["modules"]:
        try_mutants(name, *CONFIG["modules"][name])
