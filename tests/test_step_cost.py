"""The benchmark's own arithmetic: what a step must move, and what it reports."""

import argparse
import json
import sys

import jax
import numpy as np
import optax
import pytest

from benchmarks import step_cost
from benchmarks.step_cost import Case, Run, by_update, cases_of, measure


def test_adamw_moves_seven_arrays_and_a_clip_one_more():
    case = Case("adamw", 4000, 4, "float32")
    grads = step_cost.make_tree(case, 1e-2)
    run = Run(case, *by_update(optax.adamw(1e-3)), grads)
    # Besides, the count of steps, in and out.
    assert run.least_bytes() == 7 * 4 * 4000 + 2 * 4
    rows = measure(case, rounds=3, steps=2, torch=False, only="clip_by_global_norm")
    assert {row["floor"] for row in rows} == {round(8 / 7, 3)}


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("TPU v5 lite", 819e9),
        ("TPU v5", 2765e9),
        ("NVIDIA H100 80GB HBM3", 3352e9),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak_is_the_one_of_the_longest_name(monkeypatch, kind, bandwidth):
    device = argparse.Namespace(device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert step_cost.peak_bandwidth() == bandwidth


def test_all_is_every_case_once():
    cases = cases_of(argparse.Namespace(all=True))
    assert len(cases) == len(set(cases)) == 4 * 2 + 9 - 1


def test_command_writes_every_variant_and_draws_it(tmp_path, monkeypatch, capsys):
    args = "--params 2000 --leaves 2 --rounds 3 --out r.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["step_cost", *args.split()])
    step_cost.main()
    assert "No accelerator was found" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["rows"]
    assert result["backend"] == "cpu"
    assert [r["variant"] for r in rows] == list(
        step_cost.variants(step_cost.OPTIMIZERS["adamw"])
    )
    for row in rows:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high
        least = 7 * 4 * 2000 + 8
        speed = least / (row["milliseconds"] * 1e-3) / 1e9
        np.testing.assert_allclose(row["gigabytes_per_second"], speed, atol=0.02)
    assert (tmp_path / "r.png").stat().st_size > 10_000
