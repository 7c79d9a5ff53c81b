"""Thresholds that tune themselves: as published, and what becomes of bad norms."""

import functools
import inspect
import json
import math
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from optax_guard import threshold
from optax_guard._clipping.presets import autoclip, zclip
from optax_guard.threshold._base import capped
from optax_guard.threshold._coerce import as_threshold
from optax_guard.threshold._zscore import published_zscore
from tests.strategies import same_bits, types_of

DATA = Path(__file__).parent / "data"
ZCLIP, AUTOCLIP, ADAGC = (
    json.loads((DATA / f"{name}.json").read_text())
    for name in ("zclip", "autoclip", "adagc")
)


def start(tx, params) -> Any:
    """The initial state; as `Any`, because what optax declares has no fields."""
    return tx.init(params)


def update(tx, *args, **extra) -> Any:
    """One update, as `Any` for the same reason."""
    return tx.update(*args, **extra)


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


# Long loops are slow without any optimisation.
OPTIMISED = {"xla_backend_optimization_level": 1}


@functools.cache
def runner(tx):
    """Rows of norms to clipped norms, thresholds and last states, in one loop."""

    def step(state, norm):
        updates, state = update(tx, norm[None], state)
        return state, (updates[0], state.stats.clip_threshold)

    def run(norms):
        state, (clipped, trigger) = jax.lax.scan(step, start(tx, jnp.zeros(1)), norms)
        return clipped, trigger, state.threshold

    return jax.jit(jax.vmap(run), compiler_options=OPTIMISED)


@functools.cache
def player(tx):
    """Norms to clipped norms, thresholds and all states, in one loop."""

    def step(state, norm):
        updates, state = update(tx, norm[None], state)
        stats = state.stats.clip_threshold
        return state, (updates[0], stats, state.threshold)

    return jax.jit(
        lambda x: jax.lax.scan(step, start(tx, jnp.zeros(1)), x)[1],
        compiler_options=OPTIMISED,
    )


def play(tx, norms):
    """Clipped norms, thresholds and the threshold's states after each update."""
    norms = np.asarray(norms, np.float32)
    # One length for all, so that every transformation is compiled once.
    padded = np.append(norms, np.ones(400 - len(norms), np.float32))
    result = jax.device_get(player(tx)(padded))
    return jax.tree.map(lambda x: x[: len(norms)], result)


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
    norms = np.asarray(floats(ZCLIP["sequences"][run["sequence"]]), np.float32)
    clipped, _, states = play(zclip_runner(run["config"]), norms)
    known = ~np.isnan(floats(run["mean"]))
    assert (states.baseline_mean > 0).tolist() == known.tolist()
    for field, rtol in ("mean", 1e-5), ("var", 1e-4):
        ours = getattr(states, f"baseline_{field}")[known]
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
    norms = np.asarray(floats(ZCLIP["sequences"][run["sequence"]]), np.float32)
    if run["sequence"] == "constant_then_rise":
        # The preset is what was published. The threshold follows the rise.
        clipped, _, _ = play(og.clip_by_global_norm(threshold.zscore()), norms)
        assert same_bits(clipped, norms)
        return
    is_bad = ~np.isfinite(norms)
    assert is_bad.any()
    tx = zclip_runner("adaptive")
    clipped, _, states = play(tx, norms)
    without, _, states_without = play(tx, norms[~is_bad])
    assert same_bits(clipped[~is_bad], without)
    final = jax.tree.map(lambda x: x[-1], states)
    assert same_bits(final, jax.tree.map(lambda x: x[-1], states_without))
    assert np.isfinite(final.baseline_mean)
    assert final.baseline_mean > 0


@pytest.mark.parametrize("run", cases(AUTOCLIP))
def test_autoclip_is_the_authors_to_one_per_cent(run):
    norms = np.asarray(floats(AUTOCLIP["sequences"][run["sequence"]]), np.float32)
    clipped, trigger, _ = play(autoclip_at(run["percentile"]), norms)
    exact = floats(run["threshold"])
    ratio = trigger / exact
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1.01
    np.testing.assert_allclose(clipped, floats(run["clipped_norm"]), 0.01)


autoclip_at = functools.cache(autoclip)


@functools.cache
def adagc_player(num_leaves, **settings):
    """Norms of shape (steps, leaves) to clipped norms and the means, in one loop."""
    tx = og.adagc(**settings)

    def step(state, norms):
        updates, state = update(tx, list(norms), state)
        return state, (jnp.stack(updates), state.threshold.clipped_mean)

    state = start(tx, [jnp.zeros(())] * num_leaves)
    return jax.jit(lambda norms: jax.lax.scan(step, state, norms)[1])


def play_adagc(run):
    settings = {key: x for key, x in run["config"].items() if key != "eps"}
    norms = floats_2d(run["raw_norm"]).astype(np.float32)
    return jax.device_get(adagc_player(norms.shape[1], **settings)(norms))


@pytest.mark.parametrize("run", cases(ADAGC))
def test_adagc_is_as_published(run):
    clipped, means = play_adagc(run)
    np.testing.assert_allclose(clipped, floats_2d(run["clipped_norm"]), 1e-5)
    warmup = run["config"]["warmup_steps"] - 1
    gamma = floats_2d(run["gamma"])[warmup:]
    np.testing.assert_allclose(means[warmup:], gamma, 1e-5)


def floats_2d(rows) -> np.ndarray:
    return np.stack([floats(row) for row in rows], axis=1)


def test_zero_norm_in_warmup_does_not_freeze_a_leaf():
    (run,) = (r for r in ADAGC["runs"] if r["sequence"] == "zero_norm_in_warmup")
    norms, theirs = floats_2d(run["raw_norm"]), floats_2d(run["clipped_norm"])
    clipped, means = play_adagc(run)
    assert norms[5, 0] == 0
    assert theirs[-50:, 0].max() == 0
    assert clipped[-50:, 0].min() > 0.5 * np.median(theirs[:5, 0])
    assert means[-1].min() > 0
    np.testing.assert_allclose(clipped[:, 1:], theirs[:, 1:], 1e-5)


def test_defaults_are_the_published_ones():
    def defaults(rule, *names):
        return [inspect.signature(rule).parameters[name].default for name in names]

    zclip_defaults = defaults(threshold.zscore, "sigma", "decay", "warmup")
    assert zclip_defaults == [2.5, 0.97, 25]
    adagc_defaults = defaults(threshold.relative_to_mean, "ratio", "decay", "warmup")
    assert adagc_defaults == [1.05, 0.98, 100]
    # AutoClip's limit includes the current norm: a choice of its preset.
    assert defaults(threshold.quantile, "include_current", "warmup") == [False, 25]


def at(rule, **fields):
    """The initial state, with some fields of scalars replaced."""
    fields = {name: jnp.float32(value) for name, value in fields.items()}
    return rule.start(())._replace(**fields)


def test_eps_of_zclip_adds_to_the_deviation():
    rule = published_zscore(
        2.0,
        decay=0.9,
        warmup=1,
        clip_to="reciprocal",
        learn="threshold",
        min_deviation=0.0,
        restart=True,
        max_norm=None,
        eps=1.0,
    )
    norm, state = jnp.float32(14.0), at(rule, baseline_mean=2.0, baseline_var=9.0)
    # The z-score is (14 - 2) / (3 + 1) = 3, it becomes 2**2 / 3.
    assert rule.limits(norm, norm, state) == (2 + 2 * (3 + 1), 2 + 4 / 3 * 3)


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
# What a rule has played is kept, so its tests share a process.
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RULES]
FOLLOWS = {name: rule for name, rule in RULES.items() if "quantile" not in name}
NOISE = np.exp(0.1 * np.random.default_rng(0).normal(size=400)).astype(np.float32)
FAULTS = [math.nan, math.inf, 1e30, 1e-30, 0.0]
PHASES = [0, 3, WARMUP - 1, WARMUP, 200]
CONSTANTS = [0.7, 0.702, 0.704, 0.706, 0.708, 3e5]
CHANGES = [(1, 5), (5, 1), (1e-6, 1), (1, 30)]


def with_fault(where, values):
    norms = NOISE.copy()
    norms[where] = values
    return norms


def all_sequences():
    """All that every rule is tried on, by name: one compiled loop for each rule."""
    sequences: dict[Any, np.ndarray] = {"clean": NOISE, "tiny": 1e-20 * NOISE}
    for value in CONSTANTS:
        sequences["constant", value] = np.full(400, value)
    for fault in FAULTS:
        for phase in PHASES:
            sequences["single", fault, phase] = with_fault(phase, fault)
        for other in FAULTS:
            sequences["pair", fault, other] = with_fault([200, 201], [fault, other])
        for phase in (0, 200):
            sequences["run", fault, phase] = with_fault(slice(phase, phase + 40), fault)
    for before, after in CHANGES:
        # Below 1 after the change: nothing is clipped to 1 in warm-up.
        scale = 0.1 * np.where(np.arange(400) < 100, before, after)
        sequences["noisy change", before, after] = scale * NOISE
        sequences["constant change", before, after] = scale
        sequences["change after 1e30", before, after] = scale * with_fault(90, 1e30)
    sequences["rise at 200"] = NOISE * np.where(np.arange(400) < 200, 1, 5)
    sequences["slow rise"] = 1 + 0.005 * np.maximum(np.arange(400) - 100, 0)
    sequences["spikes"] = with_fault([200, 250], [1e30, 50.0])
    sequences["zeros between"] = np.insert(NOISE, [0, 3, 10, 40, 40, 41], 0)[:400]
    return {name: x.astype(np.float32) for name, x in sequences.items()}


SEQUENCES = all_sequences()


@functools.cache
def played(name):
    """Clipped norms, thresholds and the last state, of every sequence by its name."""
    run = runner(og.clip_by_global_norm(RULES[name]))
    clipped, trigger, last = jax.device_get(run(np.stack(list(SEQUENCES.values()))))
    return {
        key: (clipped[i], trigger[i], jax.tree.map(lambda x, i=i: x[i], last))
        for i, key in enumerate(SEQUENCES)
    }


def steps_to_recover(name, key, first):
    """Updates from `first` on until the threshold stays near the clean run's."""
    trigger, clean = played(name)[key][1], played(name)["clean"][1]
    with np.errstate(all="ignore"):
        ratio = np.where(trigger == clean, 1.0, trigger / clean)
    is_off = ~((ratio < 1.5) & (ratio > 1 / 1.5))
    return max(0, *(np.arange(1, 401) * is_off)) - first if is_off.any() else 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_nonfinite_is_kept_and_nothing_is_frozen(name):
    for key, (clipped, trigger, last) in played(name).items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(last))
        assert (trigger > 0).all()
        norms = SEQUENCES[key]
        assert (clipped[norms > 0] > 0).all() or "1e-30" in str(key)
        ordinary = (norms > 0.01) & (norms < 100)
        if "change" not in key[0] and "rise" not in key:
            assert (clipped[-100:] > 0.5 * norms[-100:])[ordinary[-100:]].all()


@pytest.mark.parametrize("name", NAMES)
def test_single_bad_norm_is_forgotten(name):
    for fault in FAULTS:
        for phase in PHASES:
            steps = steps_to_recover(name, ("single", fault, phase), phase)
            # In warm-up a huge norm enters the first statistics; new ones replace them.
            assert steps <= (0 if phase > WARMUP else 2 * WARMUP), (fault, phase)


@pytest.mark.parametrize("name", NAMES)
def test_bad_norms_after_one_another_are_forgotten(name):
    for first in FAULTS:
        for second in FAULTS:
            assert steps_to_recover(name, ("pair", first, second), 202) <= 0


@pytest.mark.parametrize("name", NAMES)
def test_run_of_bad_norms_is_survived(name):
    # These keep a large norm until the 40 are less than a tenth of the weight.
    most = {"quantile": 160, "quantile forgets": 110}.get(name, 2 * WARMUP)
    for fault in FAULTS:
        for phase in (0, 200):
            if (name, fault, phase) != ("quantile", 1e30, 0):
                assert steps_to_recover(name, ("run", fault, phase), phase + 40) <= most


@pytest.mark.parametrize(
    "kind", ["noisy change", "constant change", "change after 1e30"]
)
@pytest.mark.parametrize("name", FOLLOWS)
def test_lasting_change_is_followed_within_warmup(name, kind):
    for before, after in CHANGES:
        clipped, trigger, _ = played(name)[kind, before, after]
        late = slice(100 + WARMUP, None)
        limit = trigger[late] / (0.1 * after)
        # Clipped to 1 in warm-up, the noisy start is what "relative" has as its mean.
        assert limit.min() > 0.7
        assert limit.max() < 2.0
        if kind == "constant change":
            assert same_bits(clipped[late], SEQUENCES[kind, before, after][late])


@pytest.mark.parametrize("unusual", [0, 1, 12, WARMUP - 1])
def test_mean_follows_a_rise_within_two_warmups(unusual):
    # Norms above the limit just before the rise begin the row that restarts the mean.
    norms = np.full(200, 5.0, np.float32)
    norms[:100] = 1.0
    norms[100 - unusual : 100] = 1.1
    run = runner(og.clip_by_global_norm(threshold.relative_to_mean(warmup=WARMUP)))
    trigger = np.asarray(run(norms[None])[1][0])
    updates = int(np.argmax(trigger > 5)) - 100
    assert updates == (2 * WARMUP - unusual if unusual else WARMUP)


@pytest.mark.parametrize(
    ("rule", "mean"),
    [
        (threshold.relative_to_mean(), "clipped_mean"),
        (threshold.zscore(min_deviation=0.0), "baseline_mean"),
    ],
    ids=["relative", "zscore"],
)
def test_only_norms_below_half_the_mean_or_above_the_limit_are_set_apart(rule, mean):
    learn = jax.jit(rule.learn)
    state, lengths = at(rule, **{mean: 2.0}), []
    for norm in [2.0, 0.99, 0.98, 1.9, 1.1]:
        state = learn(jnp.float32(norm), jnp.float32(norm), state)
        lengths.append(int(state.recent_length))
    assert lengths == [0, 1, 2, 0, 0]
    assert all(x == 0 for name, x in state._asdict().items() if "recent" in name)


def test_norm_clipped_to_zero_teaches_nothing():
    rule = threshold.relative_to_mean()
    state = rule.start(())
    assert same_bits(rule.learn(jnp.float32(1.0), jnp.float32(0.0), state), state)


def test_norm_at_a_limit_above_the_cap_is_clipped_to_the_cap():
    limits = capped(lambda *_: (jnp.float32(4.0), jnp.float32(1.0)), 3.0)
    assert limits(jnp.float32(4.0), jnp.float32(4.0), ()) == (3.0, 3.0)


def test_forgetting_quantile_follows_a_lasting_rise():
    # A tenth of the weight is new after log(0.9) / log(0.98) = 5.2 updates.
    assert played("quantile forgets")["rise at 200"][1][200 + 8] > 4


@pytest.mark.parametrize("name", NAMES)
def test_constant_norms_always_pass(name):
    for value in CONSTANTS:
        if value < 1 or name not in ("zscore capped", "relative"):
            key = "constant", value
            assert same_bits(played(name)[key][0], SEQUENCES[key])


@pytest.mark.parametrize("relative_error", [0.1, 1e-3])
def test_constant_norms_pass_however_fine_the_sketch_is(relative_error):
    rule = threshold.quantile(0.5, warmup=1, relative_error=relative_error)
    num_bins = jax.eval_shape(lambda: rule.start(())).limit_sketch.shape[-1]
    # Rounding may put a norm just above the end of a bin into it.
    log_width = math.log(1e24) / (num_bins - 1)
    ends = np.exp(np.random.default_rng(0).integers(1, num_bins - 1, 8) * log_width)
    above = 1 + 1e-6 * np.arange(6)
    norms = (1e-12 * ends[:, None] * above).astype(np.float32).ravel()

    @jax.jit
    @jax.vmap
    def trigger_of(norm: jax.Array) -> jax.Array:
        state = rule.learn(norm, norm, rule.start(()))
        return rule.limits(norm, norm, state)[0]

    triggers = np.asarray(trigger_of(norms), np.float64)
    assert (triggers >= norms).all()
    assert (triggers <= norms * (1 + relative_error + 3e-5)).all()


def test_no_variance_is_no_lock():
    assert same_bits(played("zscore")["slow rise"][0], SEQUENCES["slow rise"])


@pytest.mark.parametrize("name", NAMES)
def test_spike_is_clipped_in_steady_state(name):
    clipped, trigger, _ = played(name)["spikes"]
    assert clipped[[200, 250]].max() < 2
    assert trigger[250] < 2


@pytest.mark.parametrize("name", NAMES)
def test_zero_norm_is_no_news(name):
    trigger = played(name)["zeros between"][1]
    is_new = SEQUENCES["zeros between"] > 0
    assert same_bits(trigger[is_new], played(name)["clean"][1][: is_new.sum()])


@pytest.mark.parametrize("name", ["zscore", "quantile forgets", "relative"])
def test_skipped_step_teaches_nothing(name):
    tx = og.guard(optax.sgd(0.1), clip=RULES[name], skip=og.skip.norm_above(10.0))
    norms = jnp.array([*NOISE[:60], 50.0, math.nan, math.inf])

    def step(state, norm):
        return update(tx, norm[None], state)[1], state.clip_state.threshold

    last, states = jax.lax.scan(step, start(tx, jnp.zeros(1)), norms)
    assert last.num_skipped == 3
    kept = jax.tree.map(lambda x: x[60], states)
    assert same_bits(last.clip_state.threshold, kept)


@functools.cache
def column_player(rule, num_columns):
    """Norms of shape (steps, columns) to clipped norms and states, in one loop."""

    def step(state, norm):
        trigger, target = rule.limits(norm, jnp.linalg.norm(norm), state)
        clipped = jnp.where(norm > trigger, target, norm)
        state = rule.learn(norm, clipped, state)
        return state, (clipped, state)

    start = rule.start((num_columns,))
    return jax.jit(
        lambda norms: jax.lax.scan(step, start, norms)[1], compiler_options=OPTIMISED
    )


def test_entries_of_an_array_are_independent():
    columns = [NOISE, 5 * NOISE[::-1], np.where(np.arange(400) % 7, NOISE, math.nan)]
    norms = np.stack(columns, axis=1)
    for name in ("zscore", "quantile", "quantile forgets", "relative unclipped"):
        clipped, states = column_player(RULES[name], 3)(norms)
        for i, column in enumerate(columns):
            alone, state = column_player(RULES[name], 1)(column[:, None])
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_types_are_fixed(name, dtype):
    tx = transformation(name)
    updates = {"a": jnp.ones(3, dtype), "b": jnp.ones((), jnp.float32)}
    state = start(tx, updates)
    new, new_state = jax.eval_shape(tx.update, updates, state)
    assert types_of(new_state) == types_of(state)
    assert types_of(new) == types_of(updates)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


# In their usual settings thresholds are among the forms of test_laws.
@pytest.mark.parametrize("name", ["zscore capped", "quantile forgets", "relative"])
def test_types_are_fixed_under_x64(name, x64):
    del x64
    tx = transformation(name)
    updates = jnp.full(2, 1e-3, jnp.float64)
    state = start(tx, updates)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))

    def step(state, scale):
        return update(tx, updates * scale, state)[::-1]

    # The loop itself requires that types stay; the last norm is no float32.
    state, _ = jax.lax.scan(step, state, jnp.array([*range(1, 40), 1e100]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.threshold))


@pytest.mark.parametrize(
    "name", ["zscore reciprocal", "quantile with current", "relative"]
)
def test_derivatives_are_finite(name):
    rule = RULES[name]

    def total(norms):
        def step(state, norm):
            trigger, target = rule.limits(norm, norm, state)
            clipped = jnp.where(norm > trigger, target, norm)
            return rule.learn(norm, clipped, state), clipped

        return jnp.sum(jax.lax.scan(step, rule.start(()), norms)[1])

    ones = jnp.ones(40)
    norms = jnp.stack([0 * ones, ones, ones.at[30].set(9.0), ones.at[35].set(0.0)])
    assert jnp.isfinite(jax.jit(jax.vmap(jax.grad(total)))(norms)).all()


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
                return update(tx, norm[None], state)[1], None

            state = jax.lax.scan(step, start(tx, jnp.zeros(1)), norms)[0]
            return state.stats.clip_threshold

        return jnp.stack([limit(tx) for tx in txs])

    settings = [
        [2.0, 3.0],
        [0.9, 0.95],
        [0.5, 0.9],
        [1.1, 1.3],
    ]
    run = jax.jit(jax.vmap(last), compiler_options=OPTIMISED)
    batched = run(*map(jnp.array, settings))
    run = jax.jit(last, compiler_options=OPTIMISED)
    for i in range(2):
        alone = run(*(s[i] for s in settings))
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
        return update(tx, norm[None], state)

    state = start(tx, jnp.zeros(1))
    for norm in NOISE[:30]:
        _, state = step(state, norm)
    state.hyperparams["sigma"] = jnp.float32(1.0)
    _, low = step(state, jnp.float32(9.0))
    state.hyperparams["sigma"] = jnp.float32(9.0)
    _, high = step(state, jnp.float32(9.0))
    limits = [og.find_state(s, og.NormStats).clip_threshold for s in (low, high)]
    assert limits[0] < limits[1]
    assert len(traces) == 1


@pytest.mark.parametrize("make", [zclip, autoclip])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_presets_work_with_all_their_defaults_injected(make, dtype):
    tx = optax.inject_hyperparams(make)()
    params = jnp.ones(2, dtype)
    state = start(tx, params)
    updates = None
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
        a = play(by_table, NOISE)
        b = play(og.clip_by_global_norm(by_call), NOISE)
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
        (
            lambda: threshold.zscore(clip_to="max"),
            "`clip_to` must be one of 'thresh",
        ),
        (lambda: threshold.zscore(learn="all"), "`learn` must be one of 'thresh"),
        (
            lambda: threshold.zscore(min_deviation=-1),
            "`min_deviation` must not be",
        ),
        (lambda: threshold.zscore(max_norm=0), "`max_norm` must be positive"),
        (lambda: threshold.quantile(90), r"`q` must be in \[0, 1\], got 90"),
        (lambda: threshold.quantile(0.5, decay=0), "`decay` must be in"),
        (
            lambda: threshold.quantile(0.5, warmup=-1),
            "`warmup` must be a whole number of at least 0",
        ),
        (lambda: threshold.quantile(0.5, relative_error=1), "`relative_error` must be"),
        (lambda: threshold.relative_to_mean(1.0), "`ratio` must be above 1, got 1.0"),
        (lambda: threshold.relative_to_mean(warmup_max_norm=-1), "`warmup_max_norm`"),
        (lambda: zclip(mode="median"), "`mode` must be one of 'zscore', 'percentile'"),
        (lambda: zclip(clip_option="max"), "`clip_option` must be one of"),
        (lambda: autoclip(101.0), r"`percentile` must be in \[1, 100\], got 101.0"),
        (lambda: autoclip(0.9), r"got 0.9. It is in per cent: did you mean 90\?"),
        (lambda: autoclip(0.0), r"`percentile` must be in \[1, 100\], got 0.0.$"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_traced_size_and_wrong_types():
    with pytest.raises(TypeError, match="`relative_error` must be known while tracing"):
        jax.jit(lambda e: threshold.quantile(0.5, relative_error=e).start(()))(0.1)
    with pytest.raises(TypeError, match="`sigma` must be a number, got '3'"):
        threshold.zscore(cast(Any, "3"))
    with pytest.raises(TypeError, match="is not a gradient transformation"):
        optax.chain(cast(Any, threshold.zscore()), optax.sgd(0.1))


def test_state_is_as_small_as_it_says():
    def size(rule):
        return sum(x.nbytes for x in jax.tree.leaves(rule.start(())))

    assert size(threshold.zscore()) == 20
    assert size(threshold.relative_to_mean()) == 16
    for error in (0.01, 0.05):
        rule = threshold.quantile(0.5, relative_error=error)
        assert 0.9 < size(rule) / (220 / error) < 1.1


@pytest.mark.parametrize("other", [math.inf, math.nan, 0.0])
def test_early_share_of_a_leaf_is_no_zero_beside_a_norm_that_tells_nothing(other):
    rule = og.threshold.relative_to_mean(warmup_max_norm=1.0)
    tx: Any = og.clip_by_leaf_norm(rule)
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([other])}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)


def test_row_that_restarts_is_as_long_as_the_warmup_and_alone_makes_the_mean():
    tx: Any = og.clip_by_global_norm(og.threshold.zscore(warmup=3))
    state = tx.init(jnp.zeros(1))
    means = []
    for norm in [1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 10.0]:
        state = tx.update(jnp.array([norm]), state)[1]
        means.append(float(state.threshold.baseline_mean))
    np.testing.assert_allclose(means[:4], [0, 0, 1, 1], rtol=1e-6)
    assert max(means[4:6]) < 2
    np.testing.assert_allclose(means[6], 10, rtol=1e-6)
