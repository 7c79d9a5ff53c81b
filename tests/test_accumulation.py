"""Accumulation: the mean of the good micro-batches makes one guarded step."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_guard as og
from tests.hlo import primitives
from tests.strategies import f32, same_bits, types_of, unlike_lowest_jax

RATE, DECAY, CLIP = 0.5, 0.9, 2.0
NAN, INF = math.nan, math.inf
LOOSE: Any = og


def inner(max_norm: float = CLIP) -> Any:
    rules = og.skip.norm_above(50.0)
    return og.guard(optax.sgd(RATE, momentum=DECAY), clip=max_norm, skip=rules)


def start() -> dict[str, Any]:
    return {"b": jnp.float32(0.5), "w": jnp.arange(-3.0, 5.0)}


def as_tree(x: Any) -> dict[str, Any]:
    return {"b": jnp.asarray(f32(x[0])), "w": jnp.asarray(f32(x[1:]))}


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


TRACES: list[str] = []


@functools.cache
def stepper(mode: str) -> Any:
    """One step `(params, state, grads, k, args)`, one program for every `k`."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads, k, args):
        TRACES.append(mode)
        tx: Any = og.accumulate(inner(), k)
        if mode == "update":
            updates, state = tx.update(grads, state, params, **args)
            return optax.apply_updates(params, updates), state
        return og.apply_gradients(tx, params, state, grads=grads, **args)

    return step


def run(
    mode: str, batches: Any, values: Any, k: int, weights: Any = None
) -> tuple[list[Any], Any]:
    """Parameters after each micro-batch, and the last state."""
    params, state, after = start(), og.accumulate(inner(), k).init(start()), []
    types = types_of(state)
    for i, (grads, value) in enumerate(zip(batches, values, strict=True)):
        args = {"value": f32(value)}
        if weights is not None:
            args["weight"] = f32(weights[i])
        params, state = stepper(mode)(params, state, as_tree(grads), k, args)
        after.append(jax.tree.map(np.array, params))
    assert types_of(state) == types
    return after, state


def oracle(
    batches: Any, values: Any, k: int, weights: Any = None
) -> tuple[list[np.ndarray], int]:
    """The same in float64, and how many micro-batches were dropped."""
    w, trace, group, after, dropped = flat(start()), 0.0, [], [], 0
    weights = np.ones(len(values)) if weights is None else np.float64(f32(weights))
    for i, (grads, value) in enumerate(zip(batches, values, strict=True)):
        total = f32(weights[i] + sum(weight for _, weight in group))
        is_weight = weights[i] >= 0 and np.isfinite(total)
        if np.isfinite(grads).all() and np.isfinite(value) and is_weight:
            group.append((np.float64(f32(grads)), weights[i]))
        else:
            dropped += 1
        if (i + 1) % k == 0 and any(weight for _, weight in group):
            grads, heavy = zip(*group, strict=True)
            mean = np.average(grads, axis=0, weights=heavy)
            norm = np.linalg.norm(mean)
            if norm <= 50:
                trace = mean * min(1.0, CLIP / norm) + DECAY * trace
                w = w - RATE * trace
        if (i + 1) % k == 0:
            group = []
        after.append(w)
    return after, dropped


def some(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, 9)), rng.normal(size=num)


def spoilt(bad: dict[int, float], num: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Micro-batches of which some have a bad entry, or, at a negative place, loss."""
    batches, values = some(num)
    for place, entry in bad.items():
        if place < 0:
            values[-place] = entry
        else:
            batches[place, place % 9] = entry
    return batches, values


CASES = {
    "clean": {},
    "first": {0: NAN, 4: INF},
    "middle": {1: INF, 6: -INF, 9: NAN},
    "last of a group": {3: NAN, 7: INF, 11: NAN},
    "losses": {-1: NAN, -2: INF, -7: -INF},
    "all but one": {4: NAN, 5: NAN, -6: NAN},
    "a whole group": {4: NAN, 5: INF, 6: NAN, -7: NAN},
    "finite, but too large for the rule": {5: 1e3},
}


@pytest.mark.parametrize("mode", ["update", "apply"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_steps_are_those_of_the_mean_over_the_good_ones(case, k, mode):
    batches, values = spoilt(CASES[case])
    after, state = run(mode, batches, values, k)
    expected, dropped = oracle(batches, values, k)
    for found, right in zip(after, expected, strict=True):
        np.testing.assert_allclose(flat(found), right, rtol=2e-6, atol=2e-6)
    assert og.metrics(state)["num_dropped"] == dropped
    assert og.metrics(state)["drop_rate"] == pytest.approx(dropped / 12)


# A token more or less, all tokens masked, and numbers that are no weights.
TOKENS = [7, 1, 99, 3, 5, 5, 0.5, 1000, 2, 2, 8, 1]
WEIGHTS: dict[str, dict[int, float]] = {
    "tokens": {},
    "empty": {0: 0, 5: 0, 11: 0},
    "empty group": {4: 0, 5: 0, 6: 0, 7: 0},
    "no weights": {1: NAN, 4: INF, 6: -INF, 9: -1},
    "a group of none": {8: NAN, 9: -5, 10: INF, 11: NAN},
    "too heavy together": {0: 3e38, 1: 3e38, 2: 1e38, 8: 1e-30, 9: 1e-37},
}


@pytest.mark.parametrize("case", ["clean", "middle", "losses", "last of a group"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_with_weights_the_means_are_per_token_over_the_good_ones(weights, case):
    batches, values = spoilt(CASES[case])
    tokens = np.array(TOKENS, np.float32)
    for place, weight in WEIGHTS[weights].items():
        tokens[place] = weight
    after, state = run("weighted", batches, values, 4, tokens)
    with np.errstate(over="ignore"):
        expected, dropped = oracle(batches, values, 4, tokens)
    for found, right in zip(after, expected, strict=True):
        np.testing.assert_allclose(flat(found), right, rtol=4e-6, atol=4e-6)
    assert og.metrics(state)["num_dropped"] == dropped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    is_lost = weights == "a group of none"
    assert state.guard_state.skip_streak == is_lost
    if is_lost and case == "clean":
        assert state.drop_reason == og.SkipReason.NONFINITE_VALUE
        [skipped] = og.skipped_steps(state)
        assert skipped.reason == og.SkipReason.NONFINITE_VALUE
        assert skipped.value == pytest.approx(values[11])


def test_weights_of_one_size_give_what_no_weights_give():
    batches, values = spoilt(CASES["middle"])
    plain, _ = run("apply", batches, values, 4)
    alike, _ = run("weighted", batches, values, 4, np.full(12, 3.0))
    assert same_bits(plain, alike)


def test_on_clean_data_it_is_what_multi_steps_gives():
    multi: Any = optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(RATE, momentum=DECAY)),
        4,
    )
    update = jax.jit(multi.update)
    batches, values = some(12)
    after, _ = run("apply", batches, values, 4)
    params, state = start(), multi.init(start())
    for grads, found in zip(batches, after, strict=True):
        updates, state = update(as_tree(grads), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(flat(found), flat(params), rtol=1e-6)


@pytest.mark.parametrize("mode", ["update", "apply"])
def test_a_group_without_a_good_micro_batch_is_a_skipped_step(mode):
    batches, values = some(8)
    _, before = run(mode, batches[:4], values[:4], 4)
    batches[4:, 0], batches[4:, 2] = NAN, INF
    batches[7, 0] = 1.0
    after, state = run(mode, batches, values, 4)
    assert same_bits(after[3], after[7])
    old, new = before.guard_state, state.guard_state
    assert same_bits(old.wrapped_state, new.wrapped_state)
    assert (new.num_skipped, new.skip_streak, state.num_dropped) == (1, 1, 4)
    # On record is the last of them: the second leaf was at fault there.
    [skipped] = og.skipped_steps(state, start())
    assert skipped.reason == og.SkipReason.NONFINITE
    assert skipped.leaf == "w"
    assert skipped.value == pytest.approx(values[7])
    assert og.metrics(state)["num_updates"] == 2
    assert og.metrics(state)["norm_max"] == og.metrics(before)["norm_max"]


def test_groups_of_bad_micro_batches_exhaust_the_guard():
    tx: Any = og.accumulate(og.guard(optax.sgd(0.1), max_consecutive_skips=2), 3)
    params, flags = start(), []

    @jax.jit
    def step(params, state, value):
        grads = jax.tree.map(jnp.ones_like, params)
        return og.apply_gradients(tx, params, state, grads=grads, value=value)

    state = tx.init(params)
    for value in [1.0] * 3 + [NAN] * 6 + [NAN, 1.0, NAN]:
        params, state = step(params, state, f32(value))
        flags.append(bool(og.metrics(state)["guard_exhausted"]))
    assert flags == [False] * 8 + [True] * 3 + [False]


def _keep(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    del state, params
    return updates, (updates, jnp.asarray(extra_args["value"]))


# It keeps what it was given.
RECORDER = optax.GradientTransformationExtraArgs(
    lambda params: (jax.tree.map(jnp.zeros_like, params), jnp.zeros(())), _keep
)


def test_inner_gets_the_mean_loss_of_the_good_ones():
    tx: Any = og.accumulate(RECORDER, 4)
    state = tx.init(jnp.zeros(1))
    update = jax.jit(tx.update)
    for loss in [1.0, NAN, 3.0, 5.0]:
        _, state = update(f32([1e18]), state, value=f32(loss))
    assert state.guard_state.wrapped_state[1] == 3.0
    # The next group starts anew: nothing is left of what was large.
    for loss in [NAN, 7.0, 8.0, NAN]:
        _, state = update(f32([0.75]), state, value=f32(loss))
    assert state.guard_state.wrapped_state == (0.75, 7.5)
    # Per token, with whole numbers of Python as weights.
    for loss, tokens in [(1.0, 3), (NAN, 10**9), (5.0, 1), (9.0, 0)]:
        _, state = tx.update(f32([0.75]), state, value=f32(loss), weight=tokens)
    assert state.guard_state.wrapped_state == (0.75, 2.0)


# With the odd weight, rounding would go one way in a sum of one number.
@pytest.mark.parametrize(("size", "weight"), [(1.0, None), (3e38, None), (1.0, 4097.0)])
def test_mean_loss_of_many_micro_batches_is_right(size, weight):
    # It rises, so that a mean that loses what it rounds stays behind.
    losses = (size * np.linspace(-0.5, 1, 10_000)).astype(np.float32)
    tx: Any = og.accumulate(og.guard(optax.sgd(0.1)), len(losses) + 1)

    @jax.jit
    def scan(losses: jax.Array) -> Any:
        def update(state: Any, loss: jax.Array) -> Any:
            args = {"value": loss, "weight": weight}
            return tx.update(jnp.zeros(1), state, **args)[1], None

        return jax.lax.scan(update, tx.init(jnp.zeros(1)), losses)[0]

    state = scan(losses)
    assert int(state.group_kept) == len(losses)
    expected = losses.astype(np.float64).mean()
    assert float(state.value_mean) == pytest.approx(expected, rel=1e-6)


def test_a_schedule_of_k_is_called_with_the_groups_closed():
    tx: Any = og.accumulate(optax.sgd(1.0), lambda groups: 1 + groups)
    batches = np.arange(1, 7, dtype=np.float32)

    @jax.jit
    def all_of_them(params):
        def body(carry, grad):
            params, state = og.apply_gradients(tx, carry[0], carry[1], grads=grad)
            return (params, state), params

        return jax.lax.scan(body, (params, tx.init(params)), batches)[1]

    params = np.array(all_of_them(jnp.zeros(())))
    np.testing.assert_allclose(params, [-1, -1, -3.5, -3.5, -3.5, -8.5], rtol=1e-6)


def test_a_function_of_the_groups_makes_a_smaller_last_group_in_each_epoch():
    # Ten micro-batches in an epoch: groups of 4, 4 and 2.
    tx: Any = og.accumulate(
        optax.sgd(1.0), lambda groups: jnp.where(groups % 3 == 2, 2, 4)
    )
    batches = np.random.default_rng(0).normal(size=20)
    batches[[3, 8, 12]] = NAN  # Also where a group ends, and in the smaller one.
    sizes = [4, 4, 2, 4, 4, 2]
    groups = np.split(batches, np.cumsum(sizes)[:-1])
    expected = -np.cumsum([np.nanmean(np.float64(f32(group))) for group in groups])

    def body(carry, grad):
        params, state = og.apply_gradients(tx, carry[0], carry[1], grads=grad)
        return (params, state), params

    first = jnp.zeros(())
    found: Any = jax.lax.scan(body, (first, tx.init(first)), f32(batches))
    (_, state), params = found
    np.testing.assert_allclose(params[np.cumsum(sizes) - 1], expected, rtol=1e-5)
    assert (state.num_groups, state.group_seen, state.num_dropped) == (6, 0, 3)


def test_leaves_that_the_guard_does_not_count_have_no_accumulator():
    # The base is frozen. Its gradients are NaN at times, and judged nowhere.
    params = {"base": jnp.ones(1000), "lora": jnp.zeros(2), "scale": jnp.ones(())}
    mask = {"base": False, "lora": True, "scale": False}
    labels = {"base": "frozen", "lora": "trained", "scale": "set"}
    kinds: Any = {
        "frozen": optax.set_to_zero(),
        "trained": optax.sgd(1.0),
        "set": optax.identity(),
    }
    partition = optax.partition(kinds, labels)
    guarded = og.guard(partition, clip=10.0, mask=mask)
    tx: Any = og.accumulate(guarded, 2)
    state: Any = tx.init(params)
    assert [x.shape for x in jax.tree.leaves(state.grad_mean)] == [(2,)]
    types, new, step = (
        types_of(state),
        params,
        jax.jit(og.apply_gradients, static_argnums=0),
    )
    for lora, base, scale in [(1.0, NAN, 5.0), (3.0, 2.0, 0.25)]:
        grads = {"base": jnp.full(1000, base), "lora": jnp.full(2, lora)}
        grads["scale"] = jnp.float32(scale)
        new, state = step(tx, new, state, grads=grads)
    assert types_of(state) == types
    np.testing.assert_array_equal(new["base"], params["base"])
    np.testing.assert_allclose(new["lora"], [-2.0, -2.0])
    # `inner` gets what the last micro-batch has.
    assert (new["scale"], state.num_dropped) == (1.25, 0)
    # The mask may be a function, and the state may be put around that of a run.
    by_name = og.guard(partition, mask=lambda tree: {k: k == "lora" for k in tree})
    for each in (og.accumulate(by_name, 2), tx):
        wrapped = og.wrap_state(each, params, partition.init(params))
        assert types_of(wrapped.grad_mean) == types_of(state.grad_mean)


def test_gradients_per_example_are_refused_and_their_aggregate_is_accumulated():
    dp_mean = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)
    params = {"b": jnp.zeros(()), "w": jnp.zeros(2)}
    batches = np.random.default_rng(0).normal(size=(2, 4, 3))
    per_example = [{"b": f32(x[:, 0]), "w": f32(x[:, 1:])} for x in batches]
    inside: Any = og.accumulate(optax.chain(dp_mean, optax.sgd(1.0)), 2)
    message = r"shapes of the parameters, got \(4,\) for \(\).*optax.chain\(differen"
    with pytest.raises(ValueError, match=message):
        inside.update(per_example[0], inside.init(params), params)
    # As the error advises.
    tx: Any = optax.chain(dp_mean, og.accumulate(optax.sgd(1.0), 2))
    state, updates, update = tx.init(params), params, jax.jit(tx.update)
    for grads in per_example:
        updates, state = update(grads, state, params)
    clipped = batches / np.maximum(np.linalg.norm(batches, axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(flat(updates), -clipped.mean(axis=(0, 1)), rtol=1e-5)
    per_example[0]["b"][3] = NAN
    assert update(per_example[0], state, params)[1][1].num_dropped == 1


def test_bfloat16_gradients_are_added_in_float32():
    # In bfloat16 the small ones would be lost beside the first.
    tx: Any = og.accumulate(RECORDER, 64)
    small = 2.0**-10
    batches = jnp.full((64, 1), small, jnp.bfloat16).at[0].set(1.0)
    params = {"half": jnp.zeros(1, jnp.bfloat16), "wide": jnp.zeros(1)}

    def body(state, grad):
        grads = {"half": grad, "wide": grad}
        return tx.update(grads, state, params, value=0.0)[1], None

    state: Any = jax.lax.scan(body, tx.init(params), batches)[0]
    mean = f32([(1 + 63 * small) / 64])
    given = state.guard_state.wrapped_state[0]
    for leaf in (*state.grad_mean.values(), given["wide"]):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, mean, rtol=1e-6)
    # Parameters in bfloat16 get their own dtype.
    assert given["half"] == mean.astype(jnp.bfloat16)


@pytest.mark.usefixtures("x64")
def test_doubles_are_added_as_doubles():
    tx: Any = og.accumulate(optax.sgd(1.0), 3)
    params = jnp.zeros(2, jnp.float64)
    batches = np.random.default_rng(0).normal(size=(3, 2))

    weights = np.array([3.0, 1.0, 7.0])

    def body(carry, batch):
        new = og.apply_gradients(tx, *carry, grads=batch[0], weight=batch[1])
        return new, None

    carry: Any = params, tx.init(params)
    params: Any = jax.lax.scan(body, carry, (batches, weights))[0][0]
    expected = -np.average(batches, axis=0, weights=weights)
    np.testing.assert_allclose(params, expected, rtol=1e-14)


def all_steps(params, batches, values):
    """Groups of four, scanned."""
    tx: Any = og.accumulate(inner(), 4)

    def body(carry, batch):
        (params, state), (grads, value) = carry, batch
        return og.apply_gradients(tx, params, state, grads=grads, value=value), None

    return jax.lax.scan(body, (params, tx.init(params)), (batches, values))[0]


def test_members_of_a_population_drop_their_own():
    clean, bad = some(8, seed=1), spoilt({1: INF, 6: -INF}, 8)
    batches, values = (np.stack(pair) for pair in zip(clean, bad, strict=True))
    grads = {"b": f32(batches[..., 0]), "w": f32(batches[..., 1:])}
    many = jax.jit(jax.vmap(all_steps, in_axes=(None, 0, 0)))
    params, state = many(start(), grads, f32(values))
    for i in range(2):
        expected, _ = oracle(batches[i], values[i], 4)
        found = flat(jax.tree.map(lambda x, i=i: x[i], params))
        np.testing.assert_allclose(found, expected[-1], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(state.num_dropped, [0, 2])


def test_sharded_over_devices_it_is_what_one_device_gives(mesh):
    def split(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    batches, values = spoilt(CASES["a whole group"])
    place = {"b": split(), "w": split("data")}
    grads = {"b": f32(batches[:, 0]), "w": f32(batches[:, 1:])}
    grads = jax.device_put(grads, {"b": split(), "w": split(None, "data")})
    params, state = jax.jit(all_steps)(
        jax.device_put(start(), place), grads, f32(values)
    )
    expected, dropped = oracle(batches, values, 4)
    np.testing.assert_allclose(flat(params), expected[-1], rtol=2e-6, atol=2e-6)
    assert og.metrics(state)["num_dropped"] == dropped
    assert state.grad_mean["w"].sharding.is_equivalent_to(place["w"], 1)


@unlike_lowest_jax("XLA keeps a second of eight leaves for the norm")
def test_only_the_accumulator_is_as_large_as_the_parameters():
    tx: Any = og.accumulate(og.guard(optax.adamw(0.1), clip=1.0), 4)
    size, num_leaves = 1 << 18, 8
    params = {str(i): jax.ShapeDtypeStruct((size,), jnp.float32) for i in range(8)}

    def step(params, state, grads):
        return og.apply_gradients(tx, params, state, grads=grads, value=1.0)

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(tx.init, params), params
    )
    memory: Any = lowered.compile().memory_analysis()
    # Parameters, two moments and the accumulator, all in place.
    assert memory.alias_size_in_bytes == pytest.approx(
        4 * 4 * num_leaves * size, rel=0.01
    )
    # One leaf for the norm. The rest is for steps in which some entries keep their old
    # values. Other steps do not touch it.
    assert memory.temp_size_in_bytes <= (4 + 26 * num_leaves) * size


@pytest.mark.parametrize("call", ["update", "apply"])
def test_steps_are_taken_by_a_branch_on_every_platform(call):
    def choices(tx: Any) -> int:
        """How often something is left to the platform."""

        def step(params, state, grads):
            if call == "apply":
                return og.apply_gradients(tx, params, state, grads=grads)
            return tx.update(grads, state, params)

        # For small parameters nothing is left to the platform.
        large = jax.ShapeDtypeStruct((1 << 19,), jnp.float32)
        jaxpr = jax.make_jaxpr(step)(large, jax.eval_shape(tx.init, large), large)
        return primitives(jaxpr.jaxpr).count("platform_index")

    guards = [og.guard(optax.sgd(RATE), CLIP, use_cond=x) for x in (True, False)]
    to_judge, to_step = map(choices, guards)
    assert to_judge < to_step
    assert choices(og.accumulate(guards[1], 4)) == to_judge + to_step


def test_step_is_traced_once():
    run("apply", *spoilt(CASES["middle"]), 4)
    run("apply", *spoilt(CASES["losses"]), 3)
    assert TRACES.count("apply") == 1


def test_integer_leaves_and_holes_are_left_alone():
    tx: Any = og.accumulate(og.guard(optax.identity(), clip=1.0), 2)
    tree = {"n": jnp.int32(3), "w": jnp.array([3.0, 4.0]), "none": None}
    _, state = tx.update(tree, tx.init(tree))
    updates: Any = tx.update(tree, state)[0]
    assert updates["n"] == 3
    np.testing.assert_allclose(updates["w"], [0.6, 0.8], rtol=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`inner` must be an optax transformation"):
        LOOSE.accumulate(3, 2)
    with pytest.raises(ValueError, match="`every_k` must be a whole number"):
        og.accumulate(optax.sgd(0.1), 0)
    tx: Any = og.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match="`state` of `accumulate` must be a"):
        tx.update(jnp.ones(1), LOOSE, None)
    with pytest.raises(ValueError, match="`weight` must be one real number, got "):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), weight=jnp.ones(2))


# What else a micro-batch has changed


def kept(tx: Any, batches: Any) -> list[bool]:
    """Whether what each call of `update` has changed beside is kept."""

    @jax.jit
    def step(state, grads):
        _, state = tx.update(grads, state, jnp.zeros(1), value=0.0)
        return state, og.keep_if_skipped(state, jnp.array(True), jnp.array(False))

    state, found = tx.init(jnp.zeros(1)), []
    for grads in batches:
        state, is_kept = step(state, f32([grads]))
        found.append(bool(is_kept))
    return found


def test_keep_if_skipped_undoes_dropped_micro_batches_and_skipped_groups():
    tx: Any = og.accumulate(og.guard(optax.sgd(1.0), skip=og.skip.norm_above(10.0)), 2)
    batches = [1, NAN, 1, 1, 99, 99, 1, 1, INF, 1, NAN, NAN, 1, 1]
    expected = [1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1]
    assert kept(tx, batches) == [bool(x) for x in expected]


@pytest.mark.filterwarnings("ignore:The guard is inside of `optax.MultiSteps")
def test_a_verdict_inside_multi_steps_counts_only_for_the_call_that_made_it():
    guard = og.guard(optax.sgd(1.0), skip=og.skip.norm_above(10.0))
    tx: Any = optax.MultiSteps(guard, 2).gradient_transformation()
    expected = [True, False, True, True, True, False, True, True]
    assert kept(tx, [99, 99, 1, 1, 99, 99, 1, 1]) == expected


def test_inside_multi_steps_that_skip_nan_the_guard_sees_clean_means():
    guard = og.guard(optax.sgd(RATE, momentum=DECAY), clip=CLIP)
    tx: Any = optax.MultiSteps(guard, 2, should_skip_update_fn=optax.skip_not_finite)
    batches, values = spoilt({1: NAN, 6: INF}, 10)
    update = jax.jit(tx.update)
    params, state = start(), tx.init(start())
    for grads in batches:
        updates, state = update(as_tree(grads), state, params)
        params = optax.apply_updates(params, updates)
    # There a group is as many good micro-batches.
    good = np.isfinite(batches).all(axis=1)
    expected, _ = oracle(batches[good], values[good], 2)
    np.testing.assert_allclose(flat(params), expected[-1], rtol=2e-6, atol=2e-6)
    m = og.metrics(state)
    assert (m["num_updates"], m["num_skipped"]) == (4, 0)
