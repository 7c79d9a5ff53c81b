"""Skip rules: the decisions of published ones, and what becomes of bad values."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import optax_guard as og
from tests.strategies import same_bits, types_of

REFERENCE = json.loads((Path(__file__).parent / "data/skip_step.json").read_text())
REASON = og.SkipReason
BOTH = ("grad_norm", "value")


def start(tx, params) -> Any:
    """The initial state; as `Any`, because what optax declares has no fields."""
    return tx.init(params)


def update(tx, *args, **extra) -> Any:
    """One update, as `Any` for the same reason."""
    return tx.update(*args, **extra)


def published(system, sigma, window, **options):
    """The rule with the settings that make it a published one."""
    is_levanter = system == "levanter"
    options = {"watch": BOTH, **options}
    return og.skip.spike(
        sigma,
        window,
        min_history=max(2, window // 2) - (not is_levanter),
        min_deviation=0,
        skipped="enter",
        ddof=0 if is_levanter else 1,
        **options,
    )


def of_both(sigma=6.0, window=32, **options):
    """A rule that watches norms, too, and judges from half a window on."""
    options = {"watch": BOTH, "min_history": window // 2, **options}
    return og.skip.spike(sigma, window, **options)


@functools.cache
def player(tx, has_value):
    """Norms and losses to reasons and last state, in one compiled loop."""

    def step(state, signals):
        norm, value = signals
        extra = {"value": value} if has_value else {}
        state = update(tx, norm[None], state, **extra)[1]
        return state, state.skip_reason

    def run(norms, values):
        return jax.lax.scan(step, start(tx, jnp.zeros(1)), (norms, values))

    return jax.jit(run)


def play(rule, norms, values=None):
    tx = og.guard(optax.sgd(0.1), skip=rule)
    norms = np.asarray(norms, np.float32)
    given = np.zeros_like(norms) if values is None else np.asarray(values, np.float32)
    state, reasons = player(tx, values is not None)(norms, given)
    return np.asarray(reasons), jax.device_get(state)


def decide(rule, norms, losses):
    """The rule's decisions without a guard around it, which compiles much faster."""
    norms, losses = np.asarray(norms, np.float32), np.asarray(losses, np.float32)

    def step(state, signals):
        signals = og.skip.Signals(*signals)
        fires = rule.judge(signals, state)
        return rule.learn(signals, fires, state), fires

    run = jax.jit(lambda x: jax.lax.scan(step, rule.start(), x)[1])
    return np.asarray(run((norms, losses)))


def sequence(run):
    recorded = REFERENCE["sequences"][run["sequence"]]
    losses = np.array([float(x) for x in recorded["loss"]])
    if recorded["grad_norm"] is None:
        return np.ones_like(losses), losses, ("value",)
    norms = np.array([float(x) for x in recorded["grad_norm"]])
    return norms, losses, ("grad_norm", "value")


def cases(*, peer_wrong=False):
    return [
        pytest.param(run, id=f"{run['system']}-{run['sequence']}")
        for run in REFERENCE["runs"]
        if bool(run.get("peer_wrong")) == peer_wrong
    ]


# As published ----------------------------------------------------------------------


@pytest.mark.parametrize("run", cases())
def test_decisions_are_those_of_the_published_rule(run):
    norms, losses, watch = sequence(run)
    rule = published(run["system"], run["sigma"], run["window"], watch=watch)
    assert np.flatnonzero(decide(rule, norms, losses)).tolist() == run["skipped"]


def test_guard_skips_what_the_rule_says():
    run = REFERENCE["runs"][3]
    norms, losses, _ = sequence(run)
    rule = published(run["system"], run["sigma"], run["window"])
    reasons, _ = play(rule, norms, losses)
    assert np.flatnonzero(reasons).tolist() == run["skipped"]
    assert set(reasons) == {REASON.NONE, REASON.SPIKE}


@pytest.mark.parametrize("run", cases(peer_wrong=True))
def test_faults_of_published_rules_are_not_copied(run):
    norms, losses, watch = sequence(run)
    rule = published(run["system"], run["sigma"], run["window"], watch=watch)
    if run["quirk"] == "zero_std":
        fires = decide(of_both(run["sigma"], run["window"]), norms, losses)
        # A rise of 1e-5, then one from 2 to 3.
        assert run["skipped"] == [40, 50]
        assert np.flatnonzero(fires).tolist() == [50]
        return
    reasons, _ = play(rule, norms, losses)
    is_bad = ~(np.isfinite(norms) & np.isfinite(losses))
    assert (reasons[is_bad] != REASON.NONE).all()
    assert (reasons[is_bad] != REASON.SPIKE).all()
    without = decide(rule, norms[~is_bad], losses[~is_bad])
    assert reasons[~is_bad].astype(bool).tolist() == without.tolist()
    assert reasons.astype(bool).sum() < len(run["skipped"]) / 2


# Against plain NumPy ---------------------------------------------------------------


def oracle(sigma, window, norms, losses, min_history, min_deviation, skipped):
    """The rule in double precision, for finite values."""
    past, decisions = ([], []), []

    def largest_that_passes(values):
        if len(values) < min_history:
            return math.inf
        recent = np.array(values[-window:])
        floor = min_deviation * abs(recent.mean())
        return recent.mean() + sigma * max(recent.std(ddof=1), floor)

    for signals in zip(norms, losses, strict=True):
        tops = [largest_that_passes(values) for values in past]
        is_skipped = any(x > top for x, top in zip(signals, tops, strict=True))
        decisions.append(is_skipped)
        for x, values in zip(signals, past, strict=True):
            if not is_skipped or skipped == "enter":
                values.append(x)
    return decisions


@pytest.mark.parametrize("skipped", ["enter", "nothing"])
def test_skipped_values_enter_as_asked(skipped):
    rng = np.random.default_rng(1)
    norms = np.exp(0.2 * rng.normal(size=300))
    losses = 2 + 0.1 * rng.normal(size=300)
    norms[[60, 61, 62, 120, 200]] *= [10, 8, 30, 1e6, 1e6]
    losses[[90, 125, 201]] += [5, 3, 9]
    settings = {"min_history": 12, "min_deviation": 0.02, "skipped": skipped}
    rule = of_both(5.0, 24, **settings)
    fires = decide(rule, norms, losses)
    expected = oracle(5.0, 24, norms, losses, **settings)
    assert fires.tolist() == expected
    assert sum(expected) == (8 if skipped == "enter" else 9)


# Bad values, lasting changes -------------------------------------------------------

NOISE = np.exp(0.1 * np.random.default_rng(0).normal(size=200)).astype(np.float32)
PHASES = [0, 3, 15, 16, 100]


@functools.cache
def default_runner(skipped):
    tx = og.guard(optax.sgd(0.1), skip=of_both(skipped=skipped))
    return jax.jit(jax.vmap(lambda x: player(tx, False)(x, jnp.zeros_like(x))))


def faults_at(phase):
    faults = [math.nan, math.inf, 1e15, 3e38, 0.0]
    rows = np.stack([NOISE.copy() for _ in faults])
    rows[:, phase] = faults
    # A second spike, once everything has been forgotten that is forgotten at all.
    rows[:, phase + 40] = 50.0
    return rows


@pytest.mark.parametrize("skipped", ["enter", "nothing"])
@pytest.mark.parametrize("phase", PHASES)
def test_bad_value_makes_no_healthy_step_skipped(phase, skipped):
    state, reasons = jax.device_get(default_runner(skipped)(faults_at(phase)))
    is_known = phase >= 16
    for i, at_fault in enumerate(
        [REASON.NONFINITE] * 2 + [REASON.SPIKE * is_known, REASON.OVERFLOW, REASON.NONE]
    ):
        expected = np.zeros(200, int)
        expected[phase], expected[phase + 40] = at_fault, REASON.SPIKE
        assert reasons[i].tolist() == expected.tolist()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.rule_states))


def test_one_spike_does_not_hide_the_next():
    norms = NOISE.copy()
    norms[[100, 101, 105, 120]] = 1e15, 1e15, 50.0, 8.0
    after = {}
    for skipped in ("enter", "nothing"):
        reasons, _ = play(of_both(skipped=skipped), norms)
        after[skipped] = np.flatnonzero(reasons).tolist()
    assert after == {"enter": [100], "nothing": [100, 101, 105, 120]}


@pytest.mark.parametrize(("skipped", "most"), [("enter", 2), ("nothing", 5)])
def test_lasting_rise_costs_a_bounded_number_of_steps(skipped, most):
    norms = np.where(np.arange(200) < 100, 1, 5) * NOISE
    reasons, state = play(of_both(skipped=skipped, max_consecutive=5), norms)
    assert 0 < reasons.astype(bool).sum() <= most
    assert not reasons[100 + most :].any()
    assert state.skip_streak == 0


def as_by_default(losses):
    """The decisions by the documentation, in plain Python; NaN is the guard's."""
    past, row, skips = [], 0, []
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            skips.append(i)
            continue
        recent = np.array(past[-128:], float)
        fires = False
        if len(past) >= 16:
            deviation = max(recent.std(ddof=1), 1e-3 * abs(recent.mean()))
            fires = loss > recent.mean() + 6 * deviation
        if fires and row < 64:
            row += 1
            skips.append(i)
            continue
        past, row = [*([] if fires else past), loss], 0
    return skips


BY_DEFAULT = og.guard(optax.sgd(0.1), skip=og.skip.spike())
LOSSES = 2 * np.exp(0.05 * np.random.default_rng(1).normal(size=320))


@pytest.mark.parametrize(
    "fault",
    [
        ("none", slice(0), 1.0, 0),
        ("before it has seen 16", slice(15, 16), 2.0, 0),
        ("the 17th", slice(16, 17), 2.0, 1),
        ("a row as long as the bound", slice(100, 164), 2.0, 64),
        ("a longer row", slice(100, 165), 2.0, 64),
        ("a row, and soon another", np.r_[100:164, 170:174], 2.0, 68),
        ("a rise for good", slice(100, None), 5.0, 64),
        ("NaN", slice(100, 120), math.nan, 20),
    ],
    ids=lambda fault: fault[0],
)
def test_by_default_a_long_row_of_high_losses_is_skipped_and_a_lasting_one_ends(fault):
    _, where, factor, expected = fault
    losses = LOSSES.astype(np.float32)
    losses[where] *= factor
    state, reasons = player(BY_DEFAULT, True)(np.ones_like(losses), losses)
    assert np.flatnonzero(reasons).tolist() == as_by_default(losses)
    assert np.count_nonzero(reasons) == expected
    assert not state.guard_exhausted


def test_row_of_skips_is_no_alarm_and_nan_in_it_is():
    losses = LOSSES.astype(np.float32)
    losses[100:140] *= 5
    losses[120:138:2] = math.nan  # Nine, and the tenth comes last.
    _, reasons = player(BY_DEFAULT, True)(np.ones_like(losses), losses)
    assert np.flatnonzero(reasons).tolist() == list(range(100, 140))
    for end, is_exhausted in {120: False, 137: False, 138: True, 141: False}.items():
        short = losses[:end].copy()
        if end == 138:
            short[-1] = math.nan
        state, _ = player(BY_DEFAULT, True)(np.ones_like(short), short)
        counted = state.skip_streak - state.rule_streak
        assert counted == int(np.isnan(short).sum()) * (end < 140)
        assert bool(state.guard_exhausted) == is_exhausted


def test_each_rule_has_a_bound_of_its_own():
    """Norms above 1 from step 20 on, losses five times as high from step 22 on."""
    norms = np.where(np.arange(40) < 20, 0.5, 2.0)
    losses = np.where(np.arange(40) < 22, 1, 5) * LOSSES[:40]
    rules = [
        og.skip.norm_above(1.0, max_consecutive=3),
        og.skip.spike(max_consecutive=9),
    ]
    reasons, _ = play(rules, norms, losses)
    # Of a row of nine the first three are of the norm's rule. Then the loss is known.
    row = [REASON.NORM_ABOVE] * 3 + [REASON.SPIKE] * 6 + [0]
    after = [REASON.NORM_ABOVE] * 3 + [0]
    assert reasons[20:].tolist() == (row + 3 * after)[:20]


def test_tiny_noise_on_a_constant_is_no_spike():
    norms = np.full(100, 0.5)
    norms[60], norms[80] = 0.5 * (1 + 1e-4), 0.5 * 1.05
    reasons, _ = play(of_both(), norms, 2 * norms)
    assert np.flatnonzero(reasons).tolist() == [80]


def test_smaller_window_takes_more_healthy_steps_for_spikes():
    losses = 10 + np.random.default_rng(0).normal(size=60_000)
    fired = [
        decide(og.skip.spike(window=n), np.ones_like(losses), losses).sum()
        for n in (8, 32)
    ]
    # A value less the mean of n others is the deviation times sqrt(1 + 1 / n) times
    # Student's t, with n - 1 degrees of freedom.
    share = scipy.stats.t.sf(6 / math.sqrt(1 + 1 / 8), 7)
    assert 1 / share == pytest.approx(2600, rel=0.01)
    expected = share * len(losses)
    assert fired[0] == pytest.approx(expected, abs=3 * math.sqrt(expected))
    assert fired[1] == 0


def test_zeros_say_nothing_of_scale():
    norms = np.r_[np.zeros(60), np.ones(60)]
    reasons, _ = play(of_both(), norms)
    assert not reasons.any()


def test_norm_is_the_one_before_clipping():
    norms = NOISE.copy()
    norms[100] = 50.0
    tx = og.guard(optax.sgd(0.1), clip=0.1, skip=of_both())
    _, reasons = player(tx, False)(norms, np.zeros_like(norms))
    assert np.flatnonzero(reasons).tolist() == [100]


def test_loss_counts_only_where_it_is_given():
    losses = 2 * NOISE
    losses[100] = 50.0
    both, only_norm = of_both(), of_both(watch="grad_norm")
    assert np.flatnonzero(play(both, NOISE, losses)[0]).tolist() == [100]
    assert not play(both, NOISE)[0].any()
    assert not play(only_norm, NOISE, losses)[0].any()
    with pytest.raises(TypeError, match="pass `value=loss` to"):
        play(og.skip.spike(), NOISE)


def test_first_step_that_is_judged_is_the_stated_one():
    rules = [og.skip.spike(), og.skip.spike(min_history=9), og.skip.spike(window=9)]

    def step(states, loss):
        past = list(zip(rules, states, strict=True))
        huge, usual = (og.skip.Signals(loss, loss * scale) for scale in (1e6, 1.0))
        fires = [rule.judge(huge, state) for rule, state in past]
        no = jnp.zeros((), bool)
        return [rule.learn(usual, no, state) for rule, state in past], fires

    losses = jnp.linspace(1.0, 2.0, 20)
    fires: Any = jax.lax.scan(step, [rule.start() for rule in rules], losses)[1]
    for found, first in zip(fires, (17, 10, 10), strict=True):
        np.testing.assert_array_equal(found, np.arange(1, 21) >= first)


def test_windows_hold_the_last_values():
    _, state = play(of_both(6.0, 8), NOISE[:43], 2 * NOISE[:43])
    (windows,) = state.rule_states
    expected = NOISE[np.array([40, 41, 42, 35, 36, 37, 38, 39])]
    assert same_bits(windows.grad_norm_window.window_values, expected)
    assert same_bits(windows.value_window.window_values, 2 * expected)
    assert windows.grad_norm_window.window_position == 8 + 43 % 8


# Norms above a threshold -----------------------------------------------------------


def test_norm_above_takes_any_threshold():
    norms = NOISE.copy()
    norms[[50, 100]] = 1e15, 5.0
    for limit in (
        2.0,
        lambda step: jnp.where(step < 1000, 2.0, 1.0),
        og.threshold.zscore(5.0),
        {"kind": "quantile", "q": 1.0},
    ):
        reasons, _ = play(og.skip.norm_above(limit), norms)
        expected = {50, 100} if limit != {"kind": "quantile", "q": 1.0} else {50}
        assert expected <= set(np.flatnonzero(reasons)) <= expected | set(range(25, 60))
        assert reasons[100] == (REASON.NORM_ABOVE if 100 in expected else 0)


def test_adaptive_norm_above_follows_a_lasting_rise():
    norms = np.where(np.arange(200) < 100, 1, 5) * NOISE
    reasons, _ = play(og.skip.norm_above(og.threshold.zscore(4.0)), norms)
    assert 100 in np.flatnonzero(reasons)
    assert not reasons[125:].any()


def test_schedule_of_norm_above_goes_on_when_it_is_overruled():
    def limit(step):
        return jnp.where(step < 5, 10.0, 1.0)

    norms = np.full(12, 2.0)
    reasons, _ = play(og.skip.norm_above(limit, max_consecutive=2), norms)
    assert reasons.astype(bool).tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1]


# The laws --------------------------------------------------------------------------


@pytest.mark.parametrize("x64_wanted", [False, True])
def test_types_are_fixed(x64_wanted, request):
    if x64_wanted:
        request.getfixturevalue("x64")
    for rule in (og.skip.spike(), og.skip.norm_above(og.threshold.zscore())):
        tx = og.guard(optax.sgd(0.1), skip=[rule, og.skip.norm_above(2.0)])
        params = jnp.ones(2, jnp.float64 if x64_wanted else jnp.bfloat16)
        state = start(tx, params)
        _, new = jax.eval_shape(
            lambda s, p=params, tx=tx: update(tx, p, s, p, value=jnp.ones(())), state
        )
        assert types_of(new) == types_of(state)
        buffers = [
            x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.rule_states)
        ]
        assert len(set(buffers)) == len(buffers)
        leaves = jax.tree.leaves(state.rule_states)
        assert all(x.dtype in (jnp.float32, jnp.int32) for x in leaves)


def test_norm_beyond_float32_stays_out_of_the_window(x64):
    del x64
    rule = of_both(6.0, 4, skipped="enter")
    norms = [1.0, 1.1, 1e100, 1.2]
    state = rule.start()
    for norm in norms:
        signals = og.skip.Signals(jnp.float64(norm), None)
        state = rule.learn(signals, rule.judge(signals, state), state)
    window = state.grad_norm_window.window_values
    assert window.tolist() == np.asarray([1.0, 1.1, 1.2, 0.0], np.float32).tolist()


def test_numbers_may_be_traced_and_batched():
    norms = jnp.asarray(NOISE).at[100].set(1.8)

    def skipped(sigma, floor, history):
        rule = of_both(sigma, 32, min_deviation=floor, min_history=history)
        tx = og.guard(optax.sgd(0.1), skip=rule)

        def step(state, norm):
            return update(tx, norm[None], state)[1], None

        return jax.lax.scan(step, start(tx, jnp.zeros(1)), norms)[0].num_skipped

    counts = jax.jit(jax.vmap(skipped))(
        jnp.array([5.0, 12.0, 5.0, 5.0]),
        jnp.array([0.0, 0.0, 0.5, 0.0]),
        jnp.array([16, 16, 16, 2]),
    )
    assert counts.tolist()[:3] == [1, 0, 0]
    assert counts[3] >= 1


def test_derivative_through_a_spike_rule_is_finite():
    tx = og.guard(optax.sgd(0.1), skip=of_both(6.0, 4))

    def total(norms):
        def step(state, norm):
            updates, state = update(tx, norm[None], state)
            return state, updates[0]

        return jnp.sum(jax.lax.scan(step, start(tx, jnp.zeros(1)), norms)[1])

    gradient = jax.grad(total)(jnp.ones(8).at[6].set(9.0))
    np.testing.assert_allclose(gradient, [-0.1] * 6 + [0.0, -0.1], 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0}, "`sigma` must be positive, got 0"),
        ({"window": 1}, "`window` must be a whole number of at least 2, got 1"),
        ({"window": 2.5}, "`window` must be a whole number of at least 2, got 2.5"),
        ({"min_history": 200}, r"`min_history` must be in \[1, 128\], got 200"),
        ({"watch": "loss"}, "`watch` must be one of 'grad_norm', 'value', got 'loss'"),
        (
            {"max_consecutive": 0},
            "`max_consecutive` must be a whole number of at least",
        ),
        ({"watch": ()}, "`watch` must name a signal"),
        ({"min_deviation": -1.0}, "`min_deviation` must not be negative"),
        (
            {"skipped": "drop"},
            "`skipped` must be one of 'nothing', 'enter'",
        ),
        ({"ddof": 2}, r"`ddof` must be in \[0, 1\], got 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        og.skip.spike(**options)


def test_traced_window():
    with pytest.raises(TypeError, match="`window` must be known while tracing"):
        jax.jit(lambda n: og.skip.spike(6.0, n).start())(8)
