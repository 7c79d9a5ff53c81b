"""Norms of trees, by both of the mechanisms that platforms choose between."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec

from optax_guard._norms import tree_norm as _norms
from optax_guard._norms.marks import first_leaf, kinds_of_runs, run_size
from optax_guard._norms.tree_norm import tree_norm
from tests.strategies import SHAPES, f32, magnitudes, sampled, trees, true_norm

ORDERS = (1, 2, math.inf, 3, 2.5)
P = PartitionSpec

# The sums of each platform, by their names for `platform_dependent`. The CPU can run
# both; the laws hold for both.
SUMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "default"}


@contextlib.contextmanager
def sums_of(name: str) -> Iterator[None]:
    """While it lasts, norms are traced with the sums of a platform."""
    euclidean: Any = _norms._euclidean
    with pytest.MonkeyPatch.context() as patch:
        # Its own cache knows nothing of what is replaced here.
        euclidean.fun.clear_cache()
        patch.setattr(
            jax.lax,
            "platform_dependent",
            lambda *leaves, **platforms: platforms[SUMS[name]](*leaves),
        )
        yield
    euclidean.fun.clear_cache()


@pytest.fixture(params=list(SUMS))
def sums(request):
    """Runs a test with the sums of a platform, wherever it runs."""
    with sums_of(request.param):
        yield request.param


@functools.cache
def compiled(name: str, ord: Any = None) -> Callable[[Any], _norms.TreeNorm]:
    """A norm whose sums are those of one platform, compiled once for all tests."""

    def run(tree: Any) -> _norms.TreeNorm:
        with sums_of(name):
            return tree_norm(tree, ord)

    return jax.jit(run)


def norm(tree: Any, ord: Any = None, name: str = "cpu") -> _norms.TreeNorm:
    return compiled(name, ord)(tree)


@pytest.mark.parametrize("name", SUMS)
def test_the_sums_asked_for_are_those_that_run(name, monkeypatch):
    called = []
    # What the sums of only one platform call.
    own = {"cpu": "_squares_cpu", "gpu": "_sum_pairs", "tpu": "_sum_squares"}
    for key, function in own.items():
        run = getattr(_norms, function)
        monkeypatch.setattr(
            _norms, function, lambda *x, k=key, f=run: called.append(k) or f(*x)
        )
    for other in SUMS:
        with sums_of(other):
            jax.jit(lambda x: tree_norm(x).value)(np.ones(2, np.float32))
    with sums_of(name):
        jax.jit(lambda x: tree_norm(x).value)(np.ones(2, np.float32))
    # The plain sums of the CPU are `_sum_squares` as well.
    names = {"cpu": ["cpu", "tpu", "tpu"], "gpu": ["gpu"], "tpu": ["tpu", "tpu"]}
    assert called == [x for each in (*SUMS, name) for x in names[each]]


def test_sums_of_both_platforms_are_what_the_norm_is_made_of():
    text = str(jax.make_jaxpr(lambda x: tree_norm(x).value)(jnp.ones(2)))
    assert "platform_index" in text


# Range and precision -----------------------------------------------------------


def test_norm_is_right_at_every_magnitude(sums):
    x = np.random.default_rng(0).normal(size=1000)
    for magnitude in 10.0 ** np.arange(-25, 37):
        entries = f32(np.clip(x, -3, 3) * magnitude)
        # Relative to the whole; entries near zero may be below 1e-25 and vanish.
        assert float(norm(entries, name=sums).value) == pytest.approx(
            true_norm(entries), rel=1e-6, abs=0
        )


@pytest.mark.parametrize("entry", [1e-25, 3e38, -3e38, 2.0**-30, 2.0**63, 2.0**64])
def test_norm_of_one_entry_is_its_size(sums, entry):
    entries = np.array([0, entry, 0], np.float32)
    assert float(norm(entries, name=sums).value) == pytest.approx(
        abs(entry), rel=1e-6, abs=0
    )


@pytest.mark.parametrize("name", SUMS)
@sampled
@given(tree=trees(magnitudes(largest=1e38)))
def test_norm_is_right_for_any_mixture_of_magnitudes(name, tree):
    expected = true_norm(tree)
    assert float(norm(tree, name=name).value) == pytest.approx(
        expected, rel=1e-6, abs=0
    )


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [3e19, 1e-10])
def test_norm_is_right_on_both_sides_of_every_switch_of_scale(name, size):
    # Where the sum of squares overflows or is looked at again.
    around = f32(size) * f32(2) ** np.linspace(-2, 2, 41, dtype="f4")
    for value in around:
        tree = {
            "bias": value,
            "kernel": np.zeros((3, 2), "f4"),
            "scale": np.ones(4, "f4"),
        }
        tree["scale"] = tree["scale"] * value
        assert float(norm(tree, name=name).value) == pytest.approx(
            true_norm(tree), rel=1e-6, abs=0
        )


def test_squares_that_vanish_beside_a_small_entry_are_counted(sums):
    # Each square is below float32, together they are 1/2048 of the one that is not.
    x = np.full(1 << 22, 2.0**-63.5, np.float32)
    x[0] = 2.0**-47
    assert float(norm(x, name=sums).value) == pytest.approx(
        true_norm(x), rel=1e-6, abs=0
    )


def test_on_cpu_ordinary_entries_are_looked_at_once(monkeypatch):
    looks = []

    def switch(index, branches, *operands):
        looks.append(int(index) + 1)
        return branches[int(index)](*operands)

    with jax.disable_jit(), sums_of("cpu"):
        monkeypatch.setattr(jax.lax, "switch", switch)
        for entry in (1e-8, 1.0, 1e18, 1e-10, 1e20, math.nan):
            tree_norm(jnp.full(2, entry))
    assert looks == [1, 1, 1, 2, 2, 2]


def test_ordinary_norm_has_the_bits_of_the_plain_sum(sums):
    run = jax.jit(lambda x: tree_norm(x).value)
    plain = jax.jit(lambda x: jnp.sqrt(jnp.sum(x * x)))
    rng = np.random.default_rng(7)
    for magnitude in 10.0 ** np.arange(-6, 9):
        x = f32(rng.normal(size=100) * magnitude)
        if jax.default_backend() == "cpu":
            assert run(x) == plain(x)
        else:  # A kernel may be tuned to another order of the sum.
            np.testing.assert_allclose(run(x), plain(x), rtol=3e-7)


@pytest.mark.parametrize("name", SUMS)
def test_scaling_by_a_power_of_two_scales_the_norm_exactly(name):
    # So that the scales inside, powers of two, cannot be seen in the result.
    rng = np.random.default_rng(8)
    tree = {k: f32(rng.normal(size=shape)) for k, shape in SHAPES.items()}
    expected = norm(tree, name=name).value
    for power in range(-60, 120, 4):
        scale = f32(2.0**power)
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, tree)
        assert norm(scaled, name=name).value == expected * scale


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e35])
def test_every_order_is_right(sums, ord, magnitude):
    x = np.random.default_rng(1).normal(size=(50, 5)) * magnitude
    tree = {"a": f32(x[:, :2]), "b": f32(x[:, 2:])}
    got = float(norm(tree, ord, sums).value)
    assert got == pytest.approx(true_norm(tree, ord), rel=1e-6, abs=0)


@pytest.mark.parametrize("ord", ORDERS)
def test_norm_up_to_3e38_does_not_overflow(sums, ord):
    count = 1 if ord == math.inf else 100 ** (1 / ord)
    x = np.full(100, 3e38 / count, np.float32)
    assert float(norm(x, ord, sums).value) == pytest.approx(
        true_norm(x, ord), rel=1e-6, abs=0
    )


def test_norm_beyond_float32_is_infinite_not_wrong(sums):
    assert norm(np.full(4, 3e38, np.float32), name=sums).value == math.inf


@pytest.mark.parametrize(
    "dtype",
    [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2],
)
def test_norm_is_right_in_any_float_dtype(sums, dtype):
    # The squares of 300 overflow in float16, those of 1e-4 vanish.
    limit = float(jnp.finfo(dtype).max) / 4
    for magnitude in (1e-2, 1.0, min(300.0, limit / 4)):
        x = np.random.default_rng(2).normal(size=200) * magnitude
        leaf = jnp.asarray(np.clip(x, -limit, limit), jnp.float32).astype(dtype)
        assert norm([leaf], name=sums).value.dtype == jnp.float32
        assert float(norm([leaf], name=sums).value) == pytest.approx(
            true_norm([np.asarray(leaf.astype(jnp.float32))]), rel=1e-6, abs=0
        )


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e37])
@pytest.mark.parametrize("ord", [None, 1, math.inf, 3])
def test_complex_entries_count_by_their_modulus(sums, magnitude, ord):
    rng = np.random.default_rng(3)
    z = np.complex64(magnitude * (rng.normal(size=9) + 1j * rng.normal(size=9)))
    result = norm([z, f32([magnitude])], ord, sums).value
    assert result.dtype == jnp.float32
    expected = true_norm([z, f32([magnitude])], 2 if ord is None else ord)
    assert float(result) == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.usefixtures("x64")
def test_doubles_are_summed_in_doubles(sums):
    x = np.random.default_rng(4).normal(size=100)
    for magnitude in (1e-160, 1e-70, 1.0, 1e100, 1e300):
        tree = {"double": x * magnitude, "single": np.ones(3, np.float32)}
        result = norm(tree, name=sums).value
        assert result.dtype == jnp.float64
        assert float(result) == pytest.approx(true_norm(tree), rel=1e-14, abs=0)
    assert norm([x + 1j], name=sums).value.dtype == jnp.float64
    assert norm([np.complex64(x)], name=sums).value.dtype == jnp.float32
    assert norm([f32(x)], name=sums).value.dtype == jnp.float32


@pytest.mark.usefixtures("sums")
def test_hundreds_of_leaves_add_up():
    # 400 leaves of norm one in bfloat16 add to 16, not 20, if summed in bfloat16.
    rng = np.random.default_rng(5)
    half = [f32([1.0]).astype(jnp.bfloat16)] * 400
    leaves = half + [f32(x) for x in rng.normal(size=(400, 3))]
    # One operation at a time: nobody waits for a program of 800 reductions here.
    with jax.disable_jit():
        assert float(tree_norm(half).value) == pytest.approx(20.0, rel=1e-6, abs=0)
        result = tree_norm(leaves)
    assert float(result.value) == pytest.approx(true_norm(leaves), rel=1e-6, abs=0)
    assert not result.marks.any()


# Many leaves -------------------------------------------------------------------

# Of one layer, in the order of leaves: several dtypes, ranks, and no entries at all.
LAYER = {
    "bias": ((4,), np.float32),
    "empty": ((0, 4), np.float32),
    "half": ((2, 3), jnp.bfloat16),
    "kernel": ((2, 3), np.float32),
    "other": ((2, 3), np.float32),
    "phase": ((3,), np.complex64),
    "scale": ((), np.float32),
}
NUM_LAYERS = 20


def many_leaves(seed: int, size: Any = 1.0) -> dict[str, dict[str, Any]]:
    """140 leaves, more than get a sum of their own, with normal entries."""
    rng = np.random.default_rng(seed)
    return {
        f"layer{i:02}": {
            name: np.asarray(rng.normal(size=shape) * size).astype(dtype)
            for name, (shape, dtype) in LAYER.items()
        }
        for i in range(NUM_LAYERS)
    }


@pytest.mark.parametrize("name", SUMS)
def test_norm_of_many_leaves_is_right_at_every_magnitude(name):
    for size in (1e-25, 1e-12, 1.0, 1e12, 1e25, 1e36):
        tree = many_leaves(0, size)
        # bfloat16 has float32's exponents.
        assert float(norm(tree, name=name).value) == pytest.approx(
            true_norm(tree), rel=1e-6, abs=0
        )


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("leaf", [leaf for leaf in LAYER if leaf != "empty"])
def test_one_leaf_of_many_may_be_of_any_size(name, leaf):
    for layer in (0, 11, NUM_LAYERS - 1):
        for size in (1e-25, 1e37):
            tree = many_leaves(1, 0.0 if size < 1 else 1.0)
            one = np.full_like(tree[f"layer{layer:02}"][leaf], size)
            tree[f"layer{layer:02}"][leaf] = one
            assert float(norm(tree, name=name).value) == pytest.approx(
                true_norm(tree), rel=1e-6, abs=0
            )


@pytest.mark.parametrize("name", SUMS)
def test_scaling_many_leaves_by_a_power_of_two_scales_the_norm_exactly(name):
    tree = many_leaves(2)
    expected = norm(tree, name=name).value
    for power in range(-60, 100, 20):
        scale = 2.0**power
        scaled = jax.tree.map(lambda x, s=scale: (x * s).astype(x.dtype), tree)
        assert norm(scaled, name=name).value == expected * f32(scale)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_bad_leaf_among_many_is_placed_to_a_run_of_neighbours(name, bad):
    structure = jax.tree.structure(many_leaves(3))
    for index in range(0, structure.num_leaves, 3):
        leaves = jax.tree.leaves(many_leaves(3))
        if leaves[index].size == 0:
            continue
        leaves[index].reshape(-1)[-1:] = bad
        tree = jax.tree.unflatten(structure, leaves)
        result = norm(tree, name=name)
        assert np.isnan(result.value) == np.isnan(bad)
        assert not np.isfinite(result.value)
        first = bad_leaf(result, leaves)
        assert first <= index < first + 32
        nan, inf = kinds_of_runs(np.asarray(result.marks).reshape(-1))
        assert (nan.sum(), inf.sum()) == ((1, 0) if np.isnan(bad) else (0, 1))


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("num_leaves", [129, 400, 128 * 32 + 1])
def test_runs_are_no_longer_than_needed(name, num_leaves):
    leaves = [np.ones((), np.float32)] * num_leaves
    assert run_size(num_leaves) == max(32, math.ceil(num_leaves / 128))
    if num_leaves == 129:
        leaves[-1] = f32(np.nan)
        with sums_of(name), jax.disable_jit():
            assert bad_leaf(tree_norm(leaves), leaves) == 128


def bad_leaf(result: Any, tree: Any) -> int:
    """The first leaf, or the first of its run, that a norm has marked."""
    marks = np.asarray(result.marks).reshape(-1)
    return int(first_leaf(marks, len(jax.tree.leaves(tree))))


@pytest.mark.parametrize("name", SUMS)
def test_every_bad_leaf_is_marked_with_its_kind(name):
    leaves = [np.ones(2, np.float32)] * 100
    bad = {0: np.nan, 31: -np.inf, 32: np.inf, 63: np.nan, 99: np.inf}
    for index, entry in bad.items():
        leaves[index] = f32([1.0, entry])
    leaves[50] = np.full(2, 3e38, np.float32)  # Its own norm overflows.
    nan, inf = kinds_of_runs(np.asarray(norm(leaves, name=name).marks).reshape(-1))
    assert np.flatnonzero(nan).tolist() == [0, 63]
    assert np.flatnonzero(inf).tolist() == [31, 32, 50, 99]


def num_reductions(tree: Any, name: str = "tpu") -> int:
    with sums_of(name):
        text = str(jax.make_jaxpr(lambda tree: tree_norm(tree).value)(tree))
    return text.count("= reduce_sum[")


@pytest.mark.parametrize(("name", "num_sums"), [("tpu", 2), ("gpu", 1)])
def test_on_accelerators_equal_leaves_of_several_layers_are_one_reduction(
    name, num_sums
):
    f = np.ones((2, 3), np.float32)
    same = {f"layer{i}": {"kernel": f, "other": f} for i in range(64)}
    # Up to 128 leaves, each is reduced by itself; beyond, four at a time.
    assert num_reductions(same, name) == num_sums * 128
    same["layer64"] = same["layer0"]
    assert num_sums * 130 / 4 <= num_reductions(same, name) <= num_sums * 130 / 3


def test_leaves_that_may_be_sharded_differently_are_not_added_entry_by_entry():
    f = np.ones((2, 3), np.float32)
    roles = {
        f"kernel_of_{chr(ord('a') + i % 26)}{'x' * (i // 26)}": f for i in range(130)
    }
    assert num_reductions(roles) == 2 * 130
    dtypes = [f, f.astype(jnp.bfloat16)] * 65
    assert 2 * 130 / 4 <= num_reductions(dtypes) <= 2 * 130 / 3


@pytest.mark.usefixtures("sums")
def test_many_leaves_with_different_shardings_in_their_types(explicit_mesh):
    x = np.random.default_rng(4).normal(size=(130, 8, 8)).astype("f4")
    # Arrays with these shardings cannot even be added to each other.
    specs = [P("data"), P(None, "data")]
    leaves = [
        jax.device_put(x[i], NamedSharding(explicit_mesh, specs[i % 2]))
        for i in range(130)
    ]
    result = jax.jit(lambda leaves: tree_norm(leaves))(leaves)
    assert float(result.value) == pytest.approx(true_norm(x), rel=1e-6, abs=0)
    assert not result.marks.any()


@pytest.mark.usefixtures("sums")
def test_many_leaves_of_which_some_vary_over_devices(mesh):
    x = np.random.default_rng(5).normal(size=(130, 8)).astype("f4")
    x[77, 3] = np.nan

    def run(split: list[Any], whole: list[Any]) -> _norms.TreeNorm:
        leaves = [leaf for pair in zip(split, whole, strict=True) for leaf in pair]
        return tree_norm(leaves, None, "data")

    mapped = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    )
    result = mapped(list(x[0::2]), list(x[1::2]))
    assert np.isnan(result.value)
    assert bad_leaf(result, list(x)) == 64
    x[77, 3] = 0
    # What is the same on every device counts once.
    result = mapped(list(x[0::2]), list(x[1::2]))
    assert float(result.value) == pytest.approx(true_norm(x), rel=1e-6, abs=0)


def test_many_equal_entries_do_not_stop_adding_up(sums):
    # A float32 count stands still at 2**24.
    x = np.ones(2**25, jnp.bfloat16)
    assert float(norm(x, name=sums).value) == pytest.approx(2**12.5, rel=1e-6, abs=0)


# What does not count -----------------------------------------------------------


def test_only_floating_leaves_count(sums):
    tree = {
        "float": f32([3.0, 4.0]),
        "int": np.array([2**30], np.int32),
        "bool": np.array([True]),
        "none": None,
        "masked": optax.MaskedNode(),
        "key": jax.random.key(0),
    }
    assert norm(tree, name=sums).value == 5.0
    assert tree_norm(tree | {"float0": np.zeros(3, jax.dtypes.float0)}).value == 5.0


def test_bad_leaf_counts_leaves_that_have_no_norm():
    tree = [np.array([1], np.int32), None, f32([1.0]), f32([np.nan])]
    assert bad_leaf(norm(tree), tree) == 2


@pytest.mark.parametrize(
    "tree", [{}, None, [np.array([5], np.int32)], [np.zeros(0, np.float32)]]
)
@pytest.mark.parametrize("ord", [None, 1, math.inf, 3])
def test_norm_of_nothing_is_zero(tree, ord):
    result = norm(tree, ord)
    assert result.value == 0
    assert result.value.dtype == jnp.float32
    assert bad_leaf(result, tree) == -1
    assert result.marks.dtype == jnp.int32


@pytest.mark.parametrize("ord", [None, 1, math.inf, 3])
def test_leaves_without_entries_change_nothing(sums, ord):
    tree = [np.zeros((0, 3), np.float32), f32([3.0]), np.zeros(0, jnp.bfloat16)]
    assert norm(tree, ord, sums).value == 3.0


# Non-finite entries ------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ord", [None, 1, math.inf, 3])
def test_non_finite_entry_makes_the_norm_so_and_is_placed(sums, bad, ord):
    for position in range(3):
        tree = [np.ones(2, np.float32), np.full(3, 1e-30, "f4"), np.full(2, 1e37, "f4")]
        tree[position][-1] = bad
        result = norm(tree, ord, sums)
        assert not np.isfinite(result.value)
        assert bad_leaf(result, tree) == position
        # A maximum over devices may lose a NaN, so these orders count it as infinite.
        is_nan = np.isnan(bad) and ord in (None, 1)
        assert np.isnan(result.value) == is_nan


def test_first_of_several_bad_leaves_is_named(sums):
    tree = [f32([1.0]), f32([np.inf]), f32([np.nan])]
    assert bad_leaf(norm(tree, name=sums), tree) == 1
    assert np.isnan(norm(tree, name=sums).value)


@pytest.mark.usefixtures("sums")
def test_128_leaves_are_told_apart():
    for index in (0, 63, 127):
        leaves = [np.ones((), np.float32)] * 128
        leaves[index] = f32(np.nan)
        with jax.disable_jit():
            assert bad_leaf(tree_norm(leaves), leaves) == index


def test_finite_leaves_are_not_called_bad_when_their_sum_overflows(sums):
    # Half of the float32 maximum in each of eight leaves: all finite, the norm is not.
    leaves = [f32([1.7e38])] * 8
    result = norm(leaves, name=sums)
    assert result.value == math.inf
    assert not result.marks.any()


# Derivatives -------------------------------------------------------------------


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e25, 1e30, 1e38])
def test_derivative_is_finite_at_any_size(sums, ord, size):
    x = jnp.array([size, 0.0, -size], jnp.float32)
    slope = jax.jit(jax.grad(lambda x: tree_norm([x], ord).value))(x)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1.0, 1e19, 1e38])
def test_derivative_is_the_direction(sums, size):
    x = jnp.array([3.0, 0.0, -4.0], jnp.float32) * (size / 5)
    slope = jax.jit(jax.grad(lambda x: tree_norm([x]).value))(x)
    np.testing.assert_allclose(slope, [0.6, 0.0, -0.8], rtol=1e-5)


def test_derivative_at_complex_zero_is_finite(sums):
    slope = jax.grad(lambda z: tree_norm([z]).value)(jnp.zeros(2, jnp.complex64))
    assert np.all(np.isfinite(slope))


# Sharded -----------------------------------------------------------------------


@pytest.mark.parametrize("ord", [None, 1, math.inf, 3])
def test_split_tree_has_the_norm_of_the_whole(mesh, ord):
    x = f32(np.random.default_rng(6).normal(size=(8, 4)))
    tree = {"a": x, "b": x[:, 0] * 2}
    whole = norm(tree, ord)
    split = jax.jit(
        jax.shard_map(
            lambda tree: tree_norm(tree, ord, "data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
    )
    np.testing.assert_allclose(split(tree).value, whole.value, rtol=1e-6)
    tree["b"][5] = np.nan
    assert bad_leaf(split(tree), tree) == 1
    spread = jax.device_put(tree, NamedSharding(mesh, P("data")))
    assert bad_leaf(norm(spread, ord), tree) == 1
    tree["b"][5] = 0
    spread = jax.device_put(tree, NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(
        norm(spread, ord).value, norm(tree, ord).value, rtol=1e-6
    )
