"""Choosing a threshold, against plain NumPy."""

import json

import numpy as np
import pytest

from optax_guard.__main__ import main
from optax_guard.analysis import History, suggest_max_norm

RNG = np.random.default_rng(0)
NORMS = np.exp(RNG.normal(size=400))


def rows(norms):
    return [{"step": i + 1, "grad_norm": float(x)} for i, x in enumerate(norms)]


@pytest.mark.parametrize("clip_rate", [0.5, 0.1, 0.01])
def test_share_above_it_is_the_one_asked_for(clip_rate):
    suggestion = suggest_max_norm(rows(NORMS), clip_rate=clip_rate)
    late = np.sort(NORMS[200:])
    # Two digits are right to 5 % at worst.
    wanted = late[int((1 - clip_rate) * 199)]
    assert suggestion.max_norm == pytest.approx(wanted, rel=0.05)
    assert suggestion.clip_rate == np.mean(suggestion.max_norm < NORMS)
    assert suggestion.num_norms == 400
    assert suggestion.quantiles[0.5] == pytest.approx(np.median(NORMS))
    assert suggestion.quantiles[1.0] == NORMS.max()


def test_start_of_a_run_does_not_count():
    norms = np.concatenate([50 * NORMS[:100], NORMS[100:]])
    assert (
        suggest_max_norm(rows(norms)).max_norm == suggest_max_norm(rows(NORMS)).max_norm
    )


def said(norms) -> str:
    return str(suggest_max_norm(rows(norms)))


def test_reasons_say_what_was_seen():
    calm = 1 + 0.1 * RNG.random(100)
    assert "no step stands out" in said(calm)
    spiky = calm.copy()
    spiky[70] = 500
    assert "500 at step 71" in said(spiky)
    assert "is for such steps" in said(spiky)
    assert "changed by a factor" not in said(calm)
    assert "changed by a factor of 8" in said(np.repeat([1.0, 8.0], 50))
    assert "not finite" not in said(calm)
    assert "2 norms were 0 or not finite" in said([*calm, np.nan, 0.0])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"must have 20 rows.* got 19"):
        suggest_max_norm(rows([*NORMS[:19], np.inf, np.nan, 0.0]))
    for clip_rate in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`clip_rate` must be"):
            suggest_max_norm(rows(NORMS), clip_rate=clip_rate)


def test_command(tmp_path, capsys):
    history = History(tmp_path / "history.jsonl")
    for row in rows(NORMS):
        history.append(row["step"], row)
    assert main(["suggest", str(tmp_path)]) == 0
    wanted = suggest_max_norm(rows(NORMS))
    assert capsys.readouterr().out.startswith(f"max_norm {wanted.max_norm:g}\n")
    assert main(["suggest", str(tmp_path), "--json", "--clip-rate", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clip_rate"] == pytest.approx(0.5, abs=0.05)
    assert main(["suggest", str(tmp_path), "--clip-rate", "2"]) == 1
    assert "`clip_rate` must be" in capsys.readouterr().err
