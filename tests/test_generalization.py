"""The studies of stopping and of verdicts measure what they say, on known cases."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_guard as og
from benchmarks import _verdict_runs, generalization, verdicts
from benchmarks._faults import TOO_LONG, TREATMENTS, Fault
from benchmarks._small_runs import CONTEXT, Data, Task, characters, digits
from optax_guard.analysis import FindingCode

ROWS = 40


def noisy_curves(seeds: int = 3) -> dict[str, np.ndarray]:
    """Losses that fall and rise again, noisy; a test score that is none of them."""
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 2, ROWS)
    val = 1 + 0.2 * x**2 + 0.05 * rng.normal(size=(seeds, ROWS))
    test = 1 + 0.3 * (x - 0.2) ** 2 + 0.01 * rng.normal(size=(seeds, ROWS))
    train = np.exp(-x) * np.ones((seeds, 1))
    curves = {"val_loss": val, "train_loss": train, "test_loss": test}
    return {name: x.astype(np.float32) for name, x in curves.items()}


def by_hand(fires, losses):
    """Where a plain loop stops, and the best until there."""
    last = len(losses) - 1
    stopped = next((i for i in range(last) if fires(losses[: i + 1])), last)
    return stopped, int(np.argmin(losses[: stopped + 1]))


def has_waited(n, past):
    return len(past) - 1 - np.argmin(past) >= n


def is_above_third_last(past):
    return len(past) > 3 and past[-1] > past[-4]


def test_rules_are_played_as_a_plain_loop_would():
    curves = noisy_curves()
    vals, trains = curves["val_loss"], curves["train_loss"]
    numbers = generalization.FAMILIES["patience"][1]
    played = generalization.play(
        og.stop.patience, None, np.array(numbers), vals, trains
    )
    stopped, best, _ = jax.device_get(played)
    for n, *row in zip(numbers, stopped, best, strict=True):
        for losses, *found in zip(vals, *row, strict=True):
            assert tuple(found) == by_hand(functools.partial(has_waited, n), losses)
    stopped, best, _ = generalization.play(
        generalization.LAGS[3], None, None, vals, trains
    )
    for losses, *found in zip(vals, stopped[0], best[0], strict=True):
        assert tuple(found) == by_hand(is_above_third_last, losses)


def test_regret_is_that_of_what_is_handed_back():
    val = np.array([[3, 2, 2.5, 2.6, 1, 1.5, 1.5, 1.5]], np.float32)
    test = np.array([[4, 3, 2.9, 2.8, 2.2, 2.0, 2.5, 3.0]], np.float32)
    curves = {"val_loss": val, "train_loss": val, "test_loss": test}
    played = generalization.play(og.stop.patience, None, np.array([2, 3]), val, val)
    stops = {
        ("patience", n, "raw"): generalization.Stops(*row)
        for n, *row in zip((2, 3), *jax.device_get(played), strict=True)
    }
    found = generalization.measure(curves, stops, "test_loss")
    two, three = found["rules"]
    # Patience 2 stops at the fourth and hands back the second.
    assert two["evaluations"][0] == 4
    assert two["percent_saved"] == 50
    assert two["percent_above_oracle"][0] == pytest.approx(50)
    assert two["last_percent_above_oracle"][0] == pytest.approx(40)
    # Patience 3 lives to see the fifth, and stops at the last.
    assert three["evaluations"][0] == 8
    assert three["percent_above_oracle"][0] == pytest.approx(10)
    references = found["references"]
    above = {name: row["percent_above_oracle"][0] for name, row in references.items()}
    assert above == pytest.approx(
        {"oracle": 0, "best_of_all_by_validation": 10, "end": 50}
    )


def test_digits_are_noisy_where_one_learns_and_clean_where_one_tests():
    noisy, clean = digits(), digits(label_noise=0.0)
    for seed in (0, 1):
        parts, truth = noisy.split(seed), clean.split(seed)
        wrong = {
            name: np.mean(parts[name].targets != truth[name].targets) for name in parts
        }
        # Of labels drawn at random one in ten is right.
        assert wrong["train"] == pytest.approx(0.27, abs=0.05)
        assert wrong["val"] == pytest.approx(0.27, abs=0.08)
        assert wrong["test"] == 0
        assert sum(len(part.targets) for part in parts.values()) == 1797
    first, second = (noisy.split(seed)["train"].inputs for seed in (0, 1))
    assert (first != second).any()


def test_characters_are_those_that_follow_and_parts_do_not_meet():
    parts = characters().split(0)
    train = parts["train"]
    np.testing.assert_array_equal(train.targets[:-CONTEXT], train.inputs[CONTEXT:, 0])
    text = {
        name: set(map(bytes, np.c_[part.inputs, part.targets].astype(np.uint8)))
        for name, part in parts.items()
    }
    # What is said twice is in two parts; most is not.
    assert len(text["val"] & text["test"]) < 0.5 * len(text["val"])
    assert {name: len(part.targets) for name, part in parts.items()} == {
        "train": 16_000,
        "val": 500,
        "test": 4_000,
    }


# Verdicts -----------------------------------------------------------------------------


def test_every_finding_is_due_in_some_treatment():
    treatments = [*TREATMENTS.values(), TOO_LONG]
    due = frozenset().union(*(treatment.due for treatment in treatments))
    # Of a rate that is too high, the norms say which of two findings is due.
    assert any(treatment.is_rate for treatment in treatments)
    # Runs of the policy have gradients of exactly zero without any treatment.
    others = {"EXPLODING", "RATE_TOO_HIGH", "ZERO_GRADIENTS"}
    assert due | others == set(map(str, FindingCode))


def judged(treatment, seed, *found):
    due, true = TREATMENTS[treatment].due, TREATMENTS[treatment].true
    run = verdicts.Run(treatment, "digits", seed, [], due, true)
    return verdicts.Judged(run, frozenset(found))


def test_precision_and_recall_count_what_is_due_and_leave_out_what_is_also_true():
    tight, loose = "clip 100 times too tight", "clip 100 times too loose"
    seen = [
        judged(tight, 0, "OVER_CLIPPED"),
        judged(tight, 1),
        # Also true of a clip by value that is too tight.
        judged("values clipped far too tight", 0, "OVER_CLIPPED"),
        judged(loose, 0, "OVER_CLIPPED", "NEVER_CLIPPED"),
        judged(loose, 1, "NEVER_CLIPPED"),
    ]
    row = verdicts.by_code(seen)["OVER_CLIPPED"]
    assert (row["due"], row["found"], row["recall"]) == (2, 1, 0.5)
    assert (row["others"], row["false_alarms"], row["precision"]) == (2, 1, 0.5)
    assert row["false_alarms_by_treatment"] == {loose: 1}
    wrongly = verdicts.by_treatment(seen)[loose]
    assert wrongly["share_wrongly_warned"] == 0.5
    assert wrongly["found"] == {"NEVER_CLIPPED": 1.0, "OVER_CLIPPED": 0.5}
    assert math.isnan(verdicts.by_code(seen)["VANISHING"]["recall"])


def ended(ends, few, full):
    """What is recorded of a run with these losses, by the treatment that ends so."""
    title = next(k for k, treatment in TREATMENTS.items() if treatment.ends == ends)
    rows = [
        {"step": i, "val_few": few[i], "val_loss": full[i]} for i in range(len(few))
    ]
    return _verdict_runs.ended(verdicts.Run(title, "digits", 0, rows))


def test_patience_was_short_only_where_the_run_would_have_gone_on_to_fall():
    few = [3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5]
    (run,) = ended("patience", few, [3, 2.9, 2.8, 2.7, 2.6, 2, 1])
    assert [row["val_loss"] for row in run.rows] == few[:5]
    assert "val_few" not in run.rows[0]
    assert ended("patience", few, [2.5] * 7) == []
    assert ended("patience", few[:4], [3, 2, 1, 0.5]) == []
    (run,) = ended("cut", few[:6], [3, 2, 2, 2, 2, 1])
    assert len(run.rows) == 2
    assert ended("cut", few[:6], few[:6]) == []


def test_bad_batches_are_bad_in_the_way_and_at_the_time_that_was_asked_for():
    # Parameters of NumPy: to compile how they are drawn takes longer than all else.
    rng = np.random.default_rng(0)
    params = [
        {"kernel": rng.normal(size=size).astype(np.float32) / 8, "bias": jnp.zeros(10)}
        for size in ((64, 10), (10, 10))
    ]
    subject = verdicts.SUBJECTS["digits"]()._replace(init=lambda key: params)
    data = jax.tree.map(jnp.asarray, subject.data)
    faults = [
        Fault(clip=1.0, end=0.5, share=0.3),
        Fault(clip=1.0, end=0.5, loss_offset=2.0),
        Fault(clip=1.0, end=0.5, loss_factor=4.0),
        Fault(clip=1.0, end=0.5, shuffled=1.0),
    ]

    @jax.jit
    @jax.vmap
    def take(fault):
        member = {"seed": 0, "fault": fault}
        run = _verdict_runs.build(subject, "clip", 100, 4, data, member)
        batch, is_bad = jax.vmap(run["batches"])(jnp.arange(100))
        first = jax.tree.map(lambda x: x[0], batch)
        state, loss = run["train_step"](run["state"], (first, fault.share == 1))
        return is_bad, loss, og.metrics(state)["grad_norm"], state.params

    stacked = Fault(*np.array(faults, np.float32).T)
    is_bad, losses, norms, params = jax.device_get(take(stacked))
    assert is_bad[1:, :50].all()
    assert 5 <= is_bad[0, :50].sum() <= 25
    assert not is_bad[:, 50:].any()
    # The first one's step was good.
    assert losses[1] == pytest.approx(losses[0] + 2)
    assert norms[1] == norms[0]
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf[1], leaf[0])
    assert losses[2] == pytest.approx(4 * losses[0])
    assert norms[2] == pytest.approx(4 * norms[0], rel=1e-4)
    assert losses[3] != losses[0]


def test_averages_are_those_of_the_parameters_of_the_last_evaluations():
    rng = np.random.default_rng(0)
    parts = {
        name: Data(rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 2, 8))
        for name in ("train", "val", "test")
    }
    task = Task(
        init=lambda key: {"w": jax.random.normal(key, (3, 2))},
        logits=lambda params, inputs, factor: factor * inputs @ params["w"],
        split=lambda seed: parts,
        learning_rate=0.1,
        batch_size=2,
        eval_every=2,
    )
    made = generalization.build(task, parts | {"seed": 0}, averages=True)
    step, seen, state = jax.jit(made["train_step"]), [], made["state"]
    for i in range(26):
        state, _ = step(state, made["batches"](i))
        if i % 2 == 1:
            seen.append(np.asarray(state.params["w"], np.float64))
            for number in generalization.AVERAGED if i in (5, 25) else ():
                expected = np.mean(seen[-number:], 0)
                found = state.average(number, 2)["w"]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Of 13 evaluations, two blocks of five were full.
    found = state.average(generalization.BUILT_IN, 2)["w"]
    np.testing.assert_allclose(found, np.mean(seen[-8:], 0), rtol=1e-5, atol=1e-6)
    scores = made["evaluate"](state)
    logits = parts["test"].inputs @ np.mean(seen[-5:], 0)
    wrong = np.mean(logits.argmax(1) != parts["test"].targets)
    assert float(scores["test_error_5"]) == pytest.approx(wrong)


def test_average_wins_if_it_gains_with_both_patiences_on_all_tasks():
    test = np.array([[3.0, 2.0, 2.0], [3.0, 2.2, 2.1], [3.0, 2.1, 2.0]])
    curves = {"test_loss": test}
    for number in generalization.CONTENDERS:
        # By 10 % better, but at the stop, where one is and the others are not.
        curves[f"test_loss_{number}"] = 0.9 * test
        curves[f"test_loss_{number}"][:, 2] = [1.0, 9.0, 9.0]
        curves[f"val_loss_{number}"] = np.array([[9.0, 1.0, 0.5]] * 3)
    # The last evaluation is not seen by the one that chooses by validation.
    seen = generalization.Stops(np.full(3, 1), np.full(3, 1), np.full(3, True))
    stops = {("patience", n, "raw"): seen for n in (5.0, 10.0)}
    rows = generalization.measure_averages(curves, stops, "test_loss")
    assert all(row["percent_gained"][0] == pytest.approx(10) for row in rows)
    late = seen._replace(stopped=np.full(3, 2))
    stops["patience", 10, "raw"] = late
    rows = generalization.measure_averages(curves, stops, "test_loss")
    assert generalization.winners({"a": rows}) == [
        (n, "at the best") for n in (3, 5, 10, "5 to 9")
    ]
