"""The parts that run on an accelerator, dry on a CPU: their rows and their counts."""

import gzip
import json
import math
import sys

import jax
import pytest

from benchmarks.on_accelerator import _kit, _trace, laws, loops, steps, transformer


def dry_run(part, monkeypatch, tmp_path, *more):
    monkeypatch.setattr(
        sys, "argv", [part, "--out", str(tmp_path), "--quick", *map(str, more)]
    )
    return _kit.read_arguments(None)


def named(kind, pid, name, tid=None):
    event = {"ph": "M", "pid": pid, "name": kind, "args": {"name": name}}
    return event | ({} if tid is None else {"tid": tid})


def ran(pid, tid, name, start, duration):
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": duration
    }  # fmt: skip


# Two streams of a device, whose work is told a second time by module, and the host.
EVENTS = [
    named("process_name", 1, "/device:GPU:0"),
    named("process_name", 2, "/host:CPU"),
    named("thread_name", 1, "Stream #14(Compute,MemcpyD2D)", 5),
    named("thread_name", 1, "Stream #15(MemcpyH2D)", 6),
    named("thread_name", 1, "XLA Modules", 7),
    named("thread_name", 2, "python", 5),
    ran(1, 5, "loop_fusion_1", 100.0, 10.0),
    ran(1, 5, "loop_fusion_22", 110.0, 20.0),
    ran(1, 6, "MemcpyH2D", 125.0, 10.0),
    ran(1, 5, "input_reduce", 150.0, 5.0),
    ran(1, 7, "jit_step", 100.0, 55.0),
    ran(2, 5, "dispatch", 0.0, 500.0),
]


def test_kernels_are_those_of_the_streams_and_time_counts_once(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    seen = _trace.read(tmp_path)
    assert seen is not None
    assert (seen.kernels, seen.copies) == (3, 1)
    assert seen.busy == pytest.approx(40e-6)
    assert seen.span == pytest.approx(55e-6)
    assert seen.longest[0] == ("loop_fusion", pytest.approx(30e-6))


def test_host_alone_is_no_device(tmp_path):
    assert _trace.summarize([e for e in EVENTS if e["pid"] == 2]) is None
    assert _trace.read(tmp_path) is None


def test_cpu_is_refused_unless_the_run_is_dry(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["steps", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        _kit.read_arguments(None)
    assert "`--quick` is a dry run" in capsys.readouterr().err


def test_case_that_does_not_fit_is_left_out_with_its_reason(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 60e9, "bytes_in_use": 4e9}

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    case = steps.Case("adamw", 1_000_000_000, 20, "float32")
    assert steps.reason_to_skip(case) is None
    larger = case._replace(params=2_000_000_000)
    assert steps.reason_to_skip(larger) == "needs 72 GB, 56 GB are free"


def test_steps_write_a_row_of_each_variant(monkeypatch, tmp_path):
    names = ("plain", "optax clip", "guard, apply_gradients")
    every = steps.variants
    monkeypatch.setattr(
        steps, "variants", lambda make: {name: every(make)[name] for name in names}
    )
    monkeypatch.setattr(steps, "DTYPES", ("float32",))
    args = dry_run("steps", monkeypatch, tmp_path)
    steps.run(args, "steps", leaves=2)
    result = json.loads((tmp_path / "steps.json").read_text())
    assert result["backend"] == "cpu"
    clip, plain, guard = result["rows"]
    assert [row["variant"] for row in (plain, clip, guard)] == list(names)
    size = 4 * 20_000
    assert plain["least_bytes"] == 7 * size + 8
    assert clip["least_bytes"] == 8 * size + 8
    for row in result["rows"]:
        # A CPU shows no kernels: the steps run in one program.
        assert (row["device_from"], row["kernels"]) == ("loop", None)
        speed = row["least_bytes"] / row["device_ms"] / 1e6
        share = speed / result["copy"]["gigabytes_per_second"]
        assert row["share_of_copy"] == pytest.approx(share, rel=1e-3)
    assert guard["state_leaves"] > clip["state_leaves"]
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_without_time_a_case_is_left_out(monkeypatch, tmp_path):
    args = dry_run("many_leaves", monkeypatch, tmp_path, "--seconds", -1)
    steps.run(args, "many_leaves", leaves=400)
    rows = json.loads((tmp_path / "many_leaves.json").read_text())["rows"]
    assert len(rows) == 2
    assert all("no time was left" in row["skipped"] for row in rows)


def test_transformer_skips_what_would_end_it(monkeypatch, tmp_path):
    small = transformer.QUICK._replace(layers=1, width=16, heads=1, length=8)
    monkeypatch.setattr(transformer, "QUICK", small)
    names = ("Optax clip", "guard(clip=1.0)")
    every = transformer.optimizers
    monkeypatch.setattr(
        transformer,
        "optimizers",
        lambda size: {name: every(size)[name] for name in names},
    )
    transformer.run(dry_run("transformer", monkeypatch, tmp_path))
    result = json.loads((tmp_path / "transformer.json").read_text())
    rows = {(row["contender"], row["faults"]): row for row in result["rows"]}
    at = {row["fault"]: row["step"] for row in result["faults"]}
    assert not rows["Optax clip", True]["is_finite"]
    guarded = rows["guard(clip=1.0)", True]
    assert guarded["is_finite"]
    bad = ("NaN in one gradient", "Inf loss", "Inf in one gradient", "NaN loss")
    assert guarded["skipped_steps"] == sorted(at[name] for name in bad)
    # Until the first fault the runs are the same. Without faults nothing is skipped.
    clean = rows["guard(clip=1.0)", False]
    first = min(at.values()) + 1
    assert clean["losses"][:first] == guarded["losses"][:first]
    assert clean["skips"] == 0
    for row in rows.values():
        assert len(row["losses"]) == small.steps
        assert math.isfinite(row["step_ms"])
    assert (tmp_path / "transformer.png").stat().st_size > 10_000


def test_loops_write_a_row_each(monkeypatch, tmp_path):
    args = dry_run("loops", monkeypatch, tmp_path)
    monkeypatch.setattr(loops, "make_population", lambda *_: lambda: None)
    loops.run(args)
    rows = json.loads((tmp_path / "loops.json").read_text())["rows"]
    assert [row["members"] for row in rows] == [1, 1, 1, 2, 4]
    assert (tmp_path / "loops.png").stat().st_size > 5_000


def test_counts_are_those_of_the_file_of_junit(tmp_path):
    path = tmp_path / "laws.xml"
    assert laws.counts_of(path)["passed"] == 0
    path.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.a" name="good"/>'
        '<testcase classname="tests.a" name="few"><skipped message="8 devices"/>'
        '</testcase><testcase classname="tests.a" name="bad">'
        '<failure message="1 is not 2">trace</failure></testcase>'
        '<testcase classname="tests.a" name="ugly"><error message="no"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = laws.counts_of(path)
    counts = [found[kind] for kind in ("passed", "failed", "errors", "skipped")]
    assert counts == [1, 1, 1, 1]
    assert found["not_passed"][0] == {"test": "tests.a.bad", "message": "1 is not 2"}
    assert found["reasons_to_skip"] == ["8 devices"]
