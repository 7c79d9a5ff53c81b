"""Thresholds that tune themselves: as published, and what becomes of bad norms."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard import threshold
from optax_guard._presets import autoclip, zclip
from optax_guard.threshold import as_threshold
from tests.strategies import same_bits, types_of

DATA = Path(__file__).parent / "data"
ZCLIP, AUTOCLIP, ADAGC = (
    json.loads((DATA / f"{name}.json").read_text())
    for name in ("zclip", "autoclip", "adagc")
)


def floats(numbers) -> np.ndarray:
    return np.array([math.nan if x is None else float(x) for x in numbers])


def cases(data, *, peer_wrong=False):
    params = []
    for run in data["runs"]:
        if bool(run.get("peer_wrong")) == peer_wrong:
            settings = run.get("config", run.get("percentile", ""))
            name = settings if isinstance(settings, str | int) else ""
            params.append(pytest.param(run, id=f"{run['sequence']}-{name}"))
    return params


@functools.cache
def runner(tx, batched=False):
    """Norms to (norms after clipping, states), in one compiled loop."""

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, (updates[0], state)

    def run(norms):
        return jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[1]

    return jax.jit(jax.vmap(run) if batched else run)


def play(tx, norms):
    return jax.device_get(runner(tx)(jnp.asarray(np.asarray(norms), jnp.float32)))


def play_all(rule, sequences):
    run = runner(og.clip_by_global_norm(rule), batched=True)
    return jax.device_get(run(jnp.asarray(np.stack(sequences), jnp.float32)))


# As published ------------------------------------------------------------------

ZCLIP_OPTIONS = {
    "default": {"max_norm": 1.0},
    "adaptive": {},
    "mean": {"clip_option": "mean"},
    "adaptive_skip": {"skip_update_on_spike": True},
    "percentile": {"mode": "percentile"},
}
zclip_runner = functools.cache(lambda config: zclip(**ZCLIP_OPTIONS[config]))


@pytest.mark.parametrize("run", cases(ZCLIP))
def test_zclip_is_the_authors(run):
    norms = np.float32(floats(ZCLIP["sequences"][run["sequence"]]))
    clipped, states = play(zclip_runner(run["config"]), norms)
    known = ~np.isnan(floats(run["mean"]))
    assert (states.threshold.baseline_mean > 0).tolist() == known.tolist()
    for field, rtol in ("mean", 1e-5), ("var", 1e-4):
        ours = getattr(states.threshold, f"baseline_{field}")[known]
        np.testing.assert_allclose(ours, floats(run[field])[known], rtol)
    # Torch divides by the norm + 1e-6.
    tolerance = 1e-5 * floats(run["clipped_norm"]) + 1e-6
    assert np.all(abs(clipped - floats(run["clipped_norm"])) <= tolerance)
    limits = floats(run["threshold"])
    is_spike = ~np.isnan(limits)
    if run["config"] == "default":
        limits, is_spike = np.fmin(limits, 1.0), is_spike | (norms > 1)
    else:
        np.testing.assert_allclose(clipped[is_spike], limits[is_spike], 1e-5)
    assert (clipped < norms).tolist() == is_spike.tolist()
    assert same_bits(clipped[~is_spike], norms[~is_spike])


@pytest.mark.parametrize("run", cases(ZCLIP, peer_wrong=True))
def test_zclips_faults_are_not_copied(run):
    norms = np.float32(floats(ZCLIP["sequences"][run["sequence"]]))
    if run["sequence"] == "constant_then_rise":
        # The preset is what was published. The threshold follows the rise.
        clipped, _ = play(og.clip_by_global_norm(threshold.zscore()), norms)
        assert same_bits(clipped, norms)
        return
    is_bad = ~np.isfinite(norms)
    assert is_bad.any()
    tx = zclip_runner("adaptive")
    clipped, states = play(tx, norms)
    without, states_without = play(tx, norms[~is_bad])
    assert same_bits(clipped[~is_bad], without)
    final = jax.tree.map(lambda x: x[-1], states.threshold)
    assert same_bits(final, jax.tree.map(lambda x: x[-1], states_without.threshold))
    assert np.isfinite(final.baseline_mean)
    assert final.baseline_mean > 0


@pytest.mark.parametrize("run", cases(AUTOCLIP))
def test_autoclip_is_the_authors_to_one_per_cent(run):
    norms = np.float32(floats(AUTOCLIP["sequences"][run["sequence"]]))
    clipped, states = play(autoclip_at(run["percentile"]), norms)
    exact = floats(run["threshold"])
    ratio = states.stats.clip_threshold / exact
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1.01
    np.testing.assert_allclose(clipped, floats(run["clipped_norm"]), 0.01)


autoclip_at = functools.cache(autoclip)


def adagc_rule(config, **options):
    return threshold.relative_to_mean(
        config["lambda_rel"],
        decay=config["beta"],
        # The paper counts steps from 1 and warms up while that is below.
        warmup=config["warmup_steps"] - 1,
        warmup_max_norm=config["lambda_abs"],
        **options,
    )


def play_leaves(rule, norms):
    """Norms of shape (steps, leaves) to clipped norms and states; one state for all."""

    def step(state, norm):
        trigger, target = rule.limits(norm, jnp.linalg.norm(norm), state)
        clipped = jnp.where(norm > trigger, target, norm)
        state = rule.learn(norm, clipped, state)
        return state, (clipped, state)

    start = rule.start(norms.shape[1:])
    norms = jnp.asarray(norms, jnp.float32)
    return jax.device_get(jax.jit(lambda x: jax.lax.scan(step, start, x)[1])(norms))


@pytest.mark.parametrize("run", cases(ADAGC))
def test_relative_to_mean_is_adagc(run):
    rule = adagc_rule(run["config"], restart=False)
    clipped, states = play_leaves(rule, floats_2d(run["raw_norm"]))
    np.testing.assert_allclose(clipped, floats_2d(run["clipped_norm"]), 1e-5)
    warmup = run["config"]["warmup_steps"] - 1
    gamma = floats_2d(run["gamma"])[warmup:]
    np.testing.assert_allclose(states.clipped_mean[warmup:], gamma, 1e-5)


def floats_2d(rows) -> np.ndarray:
    return np.stack([floats(row) for row in rows], axis=1)


def test_zero_norm_in_warmup_does_not_freeze_a_leaf():
    (run,) = (r for r in ADAGC["runs"] if r["sequence"] == "zero_norm_in_warmup")
    norms, theirs = floats_2d(run["raw_norm"]), floats_2d(run["clipped_norm"])
    rule = adagc_rule(run["config"], restart=False)
    clipped, states = play_leaves(rule, norms)
    assert norms[5, 0] == 0
    assert theirs[-50:, 0].max() == 0
    assert clipped[-50:, 0].min() > 0.5 * np.median(theirs[:5, 0])
    assert states.clipped_mean[-1].min() > 0
    np.testing.assert_allclose(clipped[:, 1:], theirs[:, 1:], 1e-5)


# Bad norms, lasting changes ------------------------------------------------------

WARMUP = 25
RULES = {
    "zscore": threshold.zscore(),
    "zscore to mean": threshold.zscore(clip_to="mean"),
    "zscore reciprocal": threshold.zscore(clip_to="reciprocal", learn="target"),
    "zscore learns nothing": threshold.zscore(learn="nothing"),
    "zscore capped": threshold.zscore(max_norm=100.0),
    "quantile": threshold.quantile(0.9),
    "quantile forgets": threshold.quantile(0.9, decay=0.98),
    "quantile with current": threshold.quantile(0.5, warmup=0, include_current=True),
    "relative": threshold.relative_to_mean(1.2, warmup=WARMUP),
    "relative unclipped": threshold.relative_to_mean(
        1.2, warmup=WARMUP, warmup_max_norm=None
    ),
}
FOLLOWS = {name: rule for name, rule in RULES.items() if "quantile" not in name}
NOISE = np.exp(0.1 * np.random.default_rng(0).normal(size=400)).astype(np.float32)
FAULTS = [math.nan, math.inf, 1e30, 1e-30, 0.0]
PHASES = [0, 3, WARMUP - 1, WARMUP, 200]


def recovery(rule, start, sequences, clean):
    """Updates from `start` until the threshold is, for good, within 1.5 of `clean`'s.

    Checks on the way that no statistic is ever non-finite and nothing finite is frozen.
    """
    clipped, states = play_all(rule, [clean, *sequences])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states.threshold))
    trigger = states.stats.clip_threshold
    assert not np.isnan(trigger).any()
    assert (trigger > 0).all()
    norms = np.stack([clean, *sequences])
    ordinary = (norms > 0.01) & (norms < 100)
    assert (clipped[ordinary] > 0).all()
    with np.errstate(all="ignore"):
        ratio = np.where(trigger == trigger[0], 1.0, trigger / trigger[0])[1:]
    is_off = ~((ratio < 1.5) & (ratio > 1 / 1.5))
    steps = np.arange(1, len(clean) + 1)
    last = [max(steps * off) for off in is_off]
    return [max(0, a - b) for a, b in zip(last, start, strict=True)]


@pytest.mark.parametrize("name", RULES)
def test_single_bad_norm_is_forgotten(name):
    sequences, phases = [], []
    for fault in FAULTS:
        for phase in PHASES:
            sequences.append(NOISE.copy())
            sequences[-1][phase] = fault
            phases.append(phase)
    steps = recovery(RULES[name], phases, sequences, NOISE)
    # In warm-up a huge norm is in the first statistics, and new ones replace them.
    assert max(steps) <= 2 * WARMUP
    assert max(s for s, p in zip(steps, phases, strict=True) if p > WARMUP) == 0


@pytest.mark.parametrize("name", RULES)
def test_bad_norms_after_one_another_are_forgotten(name):
    sequences, phases = [], []
    for first in FAULTS:
        for second in FAULTS:
            sequences.append(NOISE.copy())
            sequences[-1][200:202] = first, second
            phases.append(202)
    assert max(recovery(RULES[name], phases, sequences, NOISE)) == 0


@pytest.mark.parametrize("name", RULES)
def test_run_of_bad_norms_is_survived(name):
    sequences, phases = [], []
    for fault in FAULTS:
        for phase in (0, 200):
            sequences.append(NOISE.copy())
            sequences[-1][phase : phase + 40] = fault
            phases.append(phase + 40)
    steps = recovery(RULES[name], phases, sequences, NOISE)
    if name == "quantile":
        # Forgets nothing: the 40 must become less than a tenth.
        steps = [
            s for s, f in zip(steps, np.repeat(FAULTS, 2), strict=True) if f != 1e30
        ]
    assert max(steps) <= (110 if name == "quantile forgets" else 2 * WARMUP)


@pytest.mark.parametrize("name", FOLLOWS)
@pytest.mark.parametrize("noise", [NOISE, np.ones(400, np.float32)])
@pytest.mark.parametrize(("before", "after"), [(1, 5), (5, 1), (1e-6, 1), (1, 30)])
def test_lasting_change_is_followed_within_warmup(name, noise, before, after):
    scale = np.where(np.arange(400) < 100, before, after)
    # Capped, or clipped to 1 in warm-up: everything else is below.
    norms = (0.1 * scale * noise).astype(np.float32)
    clipped, states = play_all(RULES[name], [norms])
    late = slice(100 + WARMUP, None)
    limit = states.stats.clip_threshold[0, late] / (0.1 * after)
    assert limit.min() > 0.7
    assert limit.max() < 2.0
    if noise.std() == 0:
        assert same_bits(clipped[0, late], norms[late])


def test_forgetting_quantile_follows_a_lasting_rise():
    norms = NOISE * np.where(np.arange(400) < 200, 1, 5)
    _, states = play_all(threshold.quantile(0.9, decay=0.99), [norms])
    # A tenth of the weight is new after log(0.9) / log(0.99) = 10.5 updates.
    assert states.stats.clip_threshold[0, 200 + 13] > 4


@pytest.mark.parametrize("name", RULES)
def test_constant_norms_always_pass(name):
    norms = np.full(400, 0.7, np.float32)
    clipped, _ = play_all(RULES[name], [norms])
    assert same_bits(clipped[0], norms)


def test_no_variance_is_no_lock():
    norms = np.concatenate([np.ones(100), 1 + 0.005 * np.arange(300)])
    clipped, _ = play_all(threshold.zscore(), [norms])
    assert same_bits(clipped[0], np.float32(norms))


@pytest.mark.parametrize("name", RULES)
def test_spike_is_clipped_in_steady_state(name):
    norms = NOISE.copy()
    norms[[200, 250]] = 1e30, 50.0
    clipped, states = play_all(RULES[name], [norms])
    assert clipped[0, 200] < 2
    assert clipped[0, 250] < 2
    assert states.stats.clip_threshold[0, 250] < 2


@pytest.mark.parametrize("name", RULES)
def test_withheld_step_teaches_nothing(name):
    tx = og.guard(optax.sgd(0.1), clip=RULES[name], skip=og.skip.norm_above(10.0))
    norms = jnp.array([*NOISE[:60], 50.0, math.nan, math.inf])

    def step(state, norm):
        return tx.update(norm[None], state)[1], state.clip_state.threshold

    last, states = jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)
    assert last.num_skipped == 3
    kept = jax.tree.map(lambda x: x[60], states)
    assert same_bits(last.clip_state.threshold, kept)


def test_zero_norm_is_no_news():
    norms = NOISE[:80]
    with_zeros = np.insert(norms, [0, 3, 10, 40, 40, 41], 0)
    for rule in RULES.values():
        _, a = play_all(rule, [norms])
        _, b = play_all(rule, [with_zeros])
        last = [jax.tree.map(lambda x: x[0, -1], s.threshold) for s in (a, b)]
        assert same_bits(*last)


def test_entries_of_an_array_are_independent():
    columns = [NOISE, 5 * NOISE[::-1], np.where(np.arange(400) % 7, NOISE, math.nan)]
    norms = np.stack(columns, axis=1)
    for name in ("zscore", "quantile", "quantile forgets", "relative unclipped"):
        clipped, states = play_leaves(RULES[name], norms)
        for i, column in enumerate(columns):
            alone, state = play_leaves(RULES[name], column[:, None])
            np.testing.assert_allclose(clipped[:, i], alone[:, 0], 1e-6)
            new = jax.tree.map(lambda x, i=i: x[-1, i], states)
            old = jax.tree.map(lambda x: x[-1, 0], state)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), new, old)


# The laws --------------------------------------------------------------------------

FACTORIES = RULES | {"zclip": None, "autoclip": None}


def transformation(name):
    if name == "zclip":
        return zclip(max_norm=3.0)
    return autoclip(50.0) if name == "autoclip" else og.clip_by_global_norm(RULES[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", FACTORIES)
def test_types_are_fixed(name, dtype):
    tx = transformation(name)
    updates = {"a": jnp.ones(3, dtype), "b": jnp.ones((), jnp.float32)}
    state = tx.init(updates)
    new, new_state = jax.eval_shape(tx.update, updates, state)
    assert types_of(new_state) == types_of(state)
    assert types_of(new) == types_of(updates)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("name", FACTORIES)
def test_types_are_fixed_under_x64(name, x64):
    del x64
    tx = transformation(name)
    for dtype in (jnp.float32, jnp.float64):
        updates = jnp.full(2, 1e-3, dtype)
        state = tx.init(updates)
        leaves = jax.tree.leaves(state)
        assert all(x.dtype in (jnp.float32, jnp.int32) for x in leaves)
        for scale in [*range(1, 40), 1e100]:
            new, new_state = tx.update(updates * scale, state)
            assert types_of(new_state) == types_of(state)
            assert types_of(new) == types_of(updates)
            state = new_state
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.threshold))


@pytest.mark.parametrize("name", FACTORIES)
def test_derivatives_are_finite(name):
    tx = transformation(name)

    def clipped(norms):
        def step(state, norm):
            updates, state = tx.update(norm[None], state)
            return state, updates[0]

        return jnp.sum(jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[1])

    for norms in (jnp.zeros(40), jnp.ones(40), jnp.ones(40).at[30].set(9.0)):
        assert jnp.isfinite(jax.grad(clipped)(norms)).all()


# Settings ----------------------------------------------------------------------------


def test_numbers_may_be_traced_and_batched():
    norms = jnp.asarray(NOISE)

    def last(sigma, decay, q, ratio):
        rules = [
            threshold.zscore(sigma, decay=decay, max_norm=sigma),
            threshold.quantile(q, decay=decay),
            threshold.relative_to_mean(ratio, decay=decay, warmup_max_norm=ratio),
        ]
        txs = [og.clip_by_global_norm(rule) for rule in rules]

        def limit(tx):
            def step(state, norm):
                return tx.update(norm[None], state)[1], None

            state = jax.lax.scan(step, tx.init(jnp.zeros(1)), norms)[0]
            return state.stats.clip_threshold

        return jnp.stack([limit(tx) for tx in txs])

    settings = [
        [2.0, 3.0],
        [0.9, 0.95],
        [0.5, 0.9],
        [1.1, 1.3],
    ]
    batched = jax.jit(jax.vmap(last))(*map(jnp.array, settings))
    for i in range(2):
        alone = last(*(s[i] for s in settings))
        np.testing.assert_allclose(batched[i], alone, 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda sigma: og.clip_by_global_norm(threshold.zscore(sigma)),
        lambda sigma: zclip(z_thresh=sigma),
    ],
    ids=["zscore", "zclip"],
)
def test_injected_setting_changes_without_a_retrace(make):
    tx = optax.inject_hyperparams(make)(sigma=3.0)
    traces = []

    @jax.jit
    def step(state, norm):
        traces.append(1)
        return tx.update(norm[None], state)

    state = tx.init(jnp.zeros(1))
    for norm in NOISE[:30]:
        _, state = step(state, norm)
    state.hyperparams["sigma"] = jnp.asarray(1.0)
    _, low = step(state, jnp.float32(9.0))
    state.hyperparams["sigma"] = jnp.asarray(9.0)
    _, high = step(state, jnp.float32(9.0))
    limits = [og.find_state(s, og.NormStats).clip_threshold for s in (low, high)]
    assert limits[0] < limits[1]
    assert len(traces) == 1


@pytest.mark.parametrize("make", [zclip, autoclip])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_presets_work_with_all_their_defaults_injected(make, dtype):
    tx = optax.inject_hyperparams(make)()
    params = jnp.ones(2, dtype)
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
    assert same_bits(updates, params)


TABLES = {
    "zscore": {"kind": "zscore", "sigma": 2.0, "warmup": 10},
    "quantile": {"kind": "quantile", "q": 0.5, "decay": 0.9},
    "relative_to_mean": {"kind": "relative_to_mean", "ratio": 1.5},
}


@pytest.mark.parametrize("kind", TABLES)
def test_table_is_the_threshold_it_names(kind):
    options = {k: v for k, v in TABLES[kind].items() if k != "kind"}
    for by_table, by_call in [
        (og.clip_by_global_norm(TABLES[kind]), getattr(threshold, kind)(**options)),
    ]:
        a, _ = play(by_table, NOISE)
        b, _ = play(og.clip_by_global_norm(by_call), NOISE)
        assert same_bits(a, b)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"`clip` as a table must have a `kind` of 'zscore', 'quantile'"),
        ({"sigma": 1.0}, r"got keys \['sigma'\]"),
        ({"kind": "zcsore"}, "got `kind` 'zcsore'"),
        ({"kind": 3}, "got `kind` 3"),
        ({"kind": "zscore", "sigam": 2.0}, "may have the keys sigma, decay.*'sigam'"),
        ({"kind": "quantile"}, "'quantile' must have the key 'q'"),
        ({"kind": "zscore", "sigma": -1.0}, "`sigma` must be positive, got -1.0"),
    ],
)
def test_wrong_table(table, message):
    with pytest.raises(ValueError, match=message):
        as_threshold("clip", table)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: threshold.zscore(0.0), "`sigma` must be positive"),
        (lambda: threshold.zscore(decay=1.0), r"`decay` must be in \(0, 1\), got 1.0"),
        (lambda: threshold.zscore(warmup=0), "`warmup` must be a whole number"),
        (lambda: threshold.zscore(clip_to="max"), "`clip_to` must be one of 'limit'"),
        (lambda: threshold.zscore(learn="all"), "`learn` must be one of 'limit'"),
        (lambda: threshold.zscore(min_deviation=-1), "`min_deviation` must be in"),
        (lambda: threshold.zscore(max_norm=0), "`max_norm` must be positive"),
        (lambda: threshold.quantile(90), r"`q` must be in \[0, 1\], got 90"),
        (lambda: threshold.quantile(0.5, decay=0), "`decay` must be in"),
        (lambda: threshold.quantile(0.5, warmup=-1), "`warmup` must be in"),
        (lambda: threshold.quantile(0.5, relative_error=1), "`relative_error` must be"),
        (lambda: threshold.relative_to_mean(1.0), "`ratio` must be above 1, got 1.0"),
        (lambda: threshold.relative_to_mean(warmup_max_norm=-1), "`warmup_max_norm`"),
        (lambda: zclip(mode="median"), "`mode` must be one of 'zscore', 'percentile'"),
        (lambda: zclip(clip_option="max"), "`clip_option` must be one of"),
        (lambda: autoclip(101.0), r"`percentile` must be in \[0, 100\], got 101.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_traced_size_and_wrong_types():
    with pytest.raises(TypeError, match="`relative_error` must be a Python number"):
        jax.jit(lambda e: threshold.quantile(0.5, relative_error=e).start(()))(0.1)
    with pytest.raises(TypeError, match="`sigma` must be a number, got '3'"):
        threshold.zscore("3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not a gradient transformation"):
        optax.chain(threshold.zscore(), optax.sgd(0.1))  # type: ignore[arg-type]


def test_state_is_as_small_as_it_says():
    def size(rule):
        return sum(x.nbytes for x in jax.tree.leaves(rule.start(())))

    assert size(threshold.zscore()) == 20
    assert size(threshold.relative_to_mean()) == 12
    for error in (0.01, 0.05):
        rule = threshold.quantile(0.5, relative_error=error)
        assert 0.9 < size(rule) / (220 / error) < 1.1
