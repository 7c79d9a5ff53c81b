"""Models in parts, trained on eight devices: experts, stages of a pipeline, both axes.

Each model trains by hand under `shard_map`, and by the compiler under `jit`. Both runs
must be the run of one device. A NaN of one expert or stage must skip the step of all.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from tests.hlo import computations
from tests.strategies import f32, same_bits, true_norm

WIDTH, HIDDEN = 4, 8
STEPS, BROKEN = 6, 3

# Optimised code would not pay: programs this small run for an instant.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """A model, and how it is split.

    Attributes:
      mesh: Names of axes and their sizes.
      loss: The part of the loss that a device has; of all, without `mesh`.
      params: Parameters on one device.
      specs: For each parameter how it is split.
      rows: Of a step's batch, without its last axis.
      batch: How that is split.
      summed: The axes along which devices hold parts of the loss.
      broken: The parameter whose gradient is once NaN, in its last unit.
      num_units: Experts or layers on all devices; some may only fill a device.
      max_norm: Clips some of the steps, but not all.
    """

    mesh: dict[str, int]
    loss: Callable[..., Any]
    params: dict[str, np.ndarray]
    specs: dict[str, P]
    rows: tuple[int, ...]
    batch: P
    summed: tuple[str, ...]
    broken: str
    num_units: int
    max_norm: float


# Experts ------------------------------------------------------------------------


def expert_params(num_experts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_experts)
    # Experts differ: the last has weights many times those of the first.
    sizes = np.geomspace(0.1, 2.0, num_experts)[:, None, None]
    return {
        "down": f32(sizes * rng.normal(size=(num_experts, HIDDEN, WIDTH))),
        "router": f32(rng.normal(size=(WIDTH, num_experts))),
        "scale": f32(np.ones(WIDTH)),
        "up": f32(sizes * rng.normal(size=(num_experts, WIDTH, HIDDEN))),
    }


def expert_loss(params: Any, x: Any, y: Any, is_split: bool) -> jax.Array:
    """Each token goes to one expert, wherever that is, and comes back."""
    odds = jax.nn.softmax(x @ params["router"])
    num_experts = odds.shape[-1]
    chosen = jax.nn.one_hot(jnp.argmax(odds, -1), num_experts)
    on_all = params["up"].shape[0] * (lax.axis_size("expert") if is_split else 1)
    sent = jnp.einsum("te,td->etd", chosen, x)
    # No token goes to an expert that only fills the last device.
    sent = jnp.pad(sent, ((0, on_all - num_experts), (0, 0), (0, 0)))
    if is_split:
        sent = lax.all_to_all(sent, "expert", 0, 1, tiled=True)
    hidden = jnp.tanh(jnp.einsum("etd,edh->eth", sent, params["up"]))
    back = jnp.einsum("eth,ehd->etd", hidden, params["down"])
    if is_split:
        back = lax.all_to_all(back, "expert", 1, 0, tiled=True)
    weights = chosen * odds
    mixed = jnp.einsum("te,etd->td", weights, back[:num_experts])
    return jnp.sum((params["scale"] * x + mixed - y) ** 2)


def experts(mesh: dict[str, int], num_experts: int, max_norm: float) -> Case:
    split = P("expert")
    num_devices = mesh["expert"]
    return Case(
        mesh=mesh,
        loss=expert_loss,
        params=expert_params(num_experts),
        specs={"down": split, "router": P(), "scale": P(), "up": split},
        rows=(48,),
        batch=P(tuple(mesh)),
        summed=tuple(mesh),
        broken="up",
        num_units=-(-num_experts // num_devices) * num_devices,
        max_norm=max_norm,
    )


# Stages -------------------------------------------------------------------------


def stage_params(num_layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_layers)
    return {
        "bias": f32(rng.normal(size=(num_layers, WIDTH))),
        "down": f32(0.5 * rng.normal(size=(num_layers, HIDDEN, WIDTH))),
        "read": f32(rng.normal(size=(HIDDEN, WIDTH))),
        "scale": f32(np.ones(WIDTH)),
        "up": f32(0.5 * rng.normal(size=(num_layers, WIDTH, HIDDEN))),
        "widen": f32(rng.normal(size=(WIDTH, HIDDEN))),
    }


def stage_loss(params: Any, x: Any, y: Any, is_split: bool, model: Any = None) -> Any:
    """Blocks one after another; micro-batches go from stage to stage."""

    def add_up(x: jax.Array) -> jax.Array:
        return lax.psum(x, model) if is_split and model else x

    def block(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        inner = jnp.tanh(h @ layer["up"])
        return h + add_up(inner @ layer["down"]) + layer["bias"], None

    def stage(h: jax.Array) -> jax.Array:
        layers = {name: params[name] for name in ("bias", "down", "up")}
        return lax.scan(block, h, layers)[0]

    h = (
        pipelined(stage, params["scale"] * x)
        if is_split
        else stage(params["scale"] * x)
    )
    out = add_up(jnp.tanh(h @ params["widen"]) @ params["read"])
    loss = jnp.sum((out - y) ** 2)
    if not is_split:
        return loss
    is_last = lax.axis_index("stage") == lax.axis_size("stage") - 1
    return jnp.where(is_last, loss, 0.0)


def pipelined(stage: Callable[..., Any], x: jax.Array) -> jax.Array:
    """The micro-batches behind the last stage; only its devices return them."""
    index, num_stages = lax.axis_index("stage"), lax.axis_size("stage")
    onward = [(i, i + 1) for i in range(num_stages - 1)]

    def tick(received: jax.Array, fed: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = stage(jnp.where(index == 0, fed, received))
        return lax.ppermute(h, "stage", onward), h

    # While the last micro-batches are on their way, the first stage has none to take.
    fed = jnp.concatenate([x, jnp.zeros_like(x[: num_stages - 1])])
    # The received array varies over stages by its type. So the zeros must, too.
    return lax.scan(tick, 0 * index * x[0], fed)[1][num_stages - 1 :]


def stages(
    mesh: dict[str, int], num_layers: int, max_norm: float, model: str | None = None
) -> Case:
    split = {
        "bias": P("stage"),
        "down": P("stage", model),
        "read": P(model),
        "scale": P(),
        "up": P("stage", None, model),
        "widen": P(None, model),
    }
    return Case(
        mesh=mesh,
        loss=functools.partial(stage_loss, model=model),
        params=stage_params(num_layers),
        specs=split,
        rows=(4, 8),
        batch=P() if model else P(None, "data"),
        summed=("stage",) if model else ("stage", "data"),
        broken="bias",
        num_units=num_layers,
        max_norm=max_norm,
    )


CASES = {
    "expert on each device": experts({"expert": 8}, 8, 6.5),
    "six experts on four devices": experts({"data": 2, "expert": 4}, 6, 11.0),
    "experts on six devices": experts({"data": 2, "expert": 3}, 6, 11.0),
    "pipeline": stages({"stage": 4, "data": 2}, 4, 80.0),
    "split stages": stages({"stage": 2, "model": 4}, 4, 80.0, "model"),
    "split stages on six devices": stages({"stage": 3, "model": 2}, 6, 20.0, "model"),
}


# Runs ---------------------------------------------------------------------------


ADAM = optax.adamw(0.01, eps=1e-3)


def guarded(case: Case, axis_name: Any) -> optax.GradientTransformationExtraArgs:
    return og.guard(ADAM, og.clip_by_global_norm(case.max_norm, axis_name=axis_name))


class Step(NamedTuple):
    """The results of a step, and the gradients and the loss that it took."""

    params: Any
    state: Any
    grads: Any
    loss: Any


def batches(case: Case, num_units: int) -> Any:
    """Tokens, targets, and a number for each unit that is added to its gradient."""
    rng = np.random.default_rng(1)
    x, y = f32(rng.normal(size=(2, STEPS, *case.rows, WIDTH)))
    fault = np.zeros((STEPS, num_units), np.float32)
    fault[BROKEN, len(case.params[case.broken]) - 1] = math.nan
    return x, y, fault


def train(case: Case, tx: Any, how: str, carry: Any, batches: Any) -> Step:
    """All steps, stacked; `how` is "checked", "unchecked" or "whole"."""

    def loss_of(params: Any, x: Any, y: Any) -> jax.Array:
        return case.loss(params, x, y, how != "whole") / math.prod(case.rows)

    def step(carry: Any, batch: Any) -> Any:
        (params, state), (x, y, fault) = carry, batch
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        if how != "whole":
            loss = lax.psum(loss, case.summed)
        if how == "unchecked":
            # With checks `jax.grad` adds up over devices that hold the same parameter.
            grads = {k: lax.psum(g, other_axes(case, k)) for k, g in grads.items()}
        broken = grads[case.broken]
        fault = fault.reshape(-1, *[1] * (broken.ndim - 1))
        grads |= {case.broken: broken + fault}
        params, state = og.apply_gradients(tx, params, state, grads=grads, value=loss)
        return (params, state), Step(params, state, grads, loss)

    return lax.scan(step, carry, batches)[1]


def axes_of(case: Case, name: str) -> frozenset[str]:
    return frozenset(axis for axis in case.specs[name] if axis)


def other_axes(case: Case, name: str) -> tuple[str, ...]:
    return tuple(set(case.mesh) - axes_of(case, name))


def num_sets(case: Case) -> int:
    """How many distinct sets of axes split a parameter."""
    return len({axes_of(case, name) for name in case.specs} - {frozenset()})


def grid(case: Case) -> jax.sharding.Mesh:
    sizes = tuple(case.mesh.values())
    devices = jax.devices()[: math.prod(sizes)]
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, tuple(case.mesh), axis_types=kinds, devices=devices)


def filled(case: Case) -> dict[str, np.ndarray]:
    """The parameters, with experts of zeros that fill the last device."""

    def fill(x: np.ndarray, spec: P) -> np.ndarray:
        if "expert" not in spec:
            return x
        return np.pad(x, [(0, case.num_units - len(x)), (0, 0), (0, 0)])

    return {name: fill(x, case.specs[name]) for name, x in case.params.items()}


def specs_of_state(case: Case, state: Any) -> Any:
    """As README says: moments are split as the parameters are, records are not."""
    of_adam = optax.tree_map_params(
        ADAM,
        lambda _, spec: spec,
        getattr(state, "wrapped_state", state),
        case.specs,
        transform_non_params=lambda _: P(),
    )
    if not isinstance(state, og.GuardState):
        return of_adam
    return jax.tree.map(lambda _: P(), state)._replace(wrapped_state=of_adam)


class Program(NamedTuple):
    """A compiled run and its arguments."""

    compiled: Any
    args: Any

    @property
    def text(self) -> str:
        return self.compiled.as_text()

    def __call__(self) -> Step:
        shardings = self.compiled.input_shardings[0]
        return self.compiled(*jax.tree.map(jax.device_put, self.args, shardings))


def compiled_run(case: Case, how: str, tx: Any) -> Program:
    """A run by hand, or for "whole" by the compiler."""
    params = filled(case)
    state = tx.init(params)
    args = (params, state), batches(case, case.num_units)
    carry = case.specs, specs_of_state(case, state)
    x = P(None, *case.batch)
    inputs = carry, (x, x, P(None, case.specs[case.broken][0]))
    outputs = jax.tree.map(lambda s: P(None, *s), Step(*carry, case.specs, P()))
    run, mesh = functools.partial(train, case, tx, how), grid(case)
    if how == "whole":
        inputs, outputs = jax.tree.map(
            lambda s: NamedSharding(mesh, s), (inputs, outputs)
        )
        jitted = jit(run, in_shardings=inputs, out_shardings=outputs)
    else:
        mapped = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=inputs,
            out_specs=outputs,
            check_vma=how == "checked",
        )
        jitted = jit(mapped)
    return Program(jitted.lower(*args).compile(), args)


@functools.cache
def program(name: str, how: str) -> Program:
    case = CASES[name]
    return compiled_run(
        case, how, guarded(case, None if how == "whole" else case.specs)
    )


def on_one_device(name: str) -> Step:
    case = CASES[name]
    return run_on_one_device(case.broken, len(case.params[case.broken]))


@functools.cache
def run_on_one_device(broken: str, num_units: int) -> Step:
    """The run without a mesh, without experts that only fill a device."""
    alike = (c for c in CASES.values() if c.broken == broken)
    case = next(c for c in alike if len(c.params[broken]) == num_units)
    tx = guarded(case, None)
    run = jit(functools.partial(train, case, tx, "whole"))
    carry = case.params, tx.init(case.params)
    return jax.device_get(run(carry, batches(case, num_units)))


def stats_of(steps: Step) -> og.NormStats:
    return og.find_state(steps.state, og.NormStats)


def nth(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[i], tree)


# Facts --------------------------------------------------------------------------


def assert_as_on_one_device(name: str, steps: Step) -> None:
    case, expected = CASES[name], on_one_device(name)
    # Experts that only fill a device have no gradient, or the norms would differ.
    cut = jax.tree.map(
        lambda x, y: np.asarray(x)[tuple(map(slice, y.shape))], steps, expected
    )
    for got, wanted in zip(*map(jax.tree.leaves, (cut, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    norms = stats_of(steps).grad_norm
    for i in range(STEPS):
        if i != BROKEN:
            np.testing.assert_allclose(
                norms[i], true_norm(nth(steps.grads, i)), rtol=1e-6
            )
    assert 0 < stats_of(steps).num_clipped[-1] < STEPS - 1
    assert steps.loss[-1] < steps.loss[0]
    assert len(steps.params[case.broken][0]) == case.num_units


def assert_bad_step_changes_nothing(name: str, steps: Step) -> None:
    case = CASES[name]
    reason = np.asarray(steps.state.skip_reason)
    np.testing.assert_array_equal(reason > 0, np.arange(STEPS) == BROKEN)
    before, after = (
        nth((steps.params, steps.state.wrapped_state), i) for i in (BROKEN - 1, BROKEN)
    )
    assert same_bits(before, after)
    leaf = np.asarray(steps.state.skip_log.skipped_leaf)[-1, 0]
    assert leaf == sorted(case.params).index(case.broken)


def assert_devices_agree(tree: Any) -> None:
    """Where several devices hold the same part, they hold the same bits."""
    for x in jax.tree.leaves(tree):
        first: dict[str, np.ndarray] = {}
        for shard in x.addressable_shards:
            mine = np.asarray(shard.data)
            assert same_bits(first.setdefault(str(shard.index), mine), mine)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("expert on each device", "checked"),
        ("six experts on four devices", "checked"),
        ("six experts on four devices", "whole"),
        # Without checks derivatives are wrong where a layer is split.
        ("experts on six devices", "unchecked"),
        ("pipeline", "checked"),
        ("pipeline", "unchecked"),
        ("split stages", "checked"),
        ("split stages", "whole"),
        ("split stages on six devices", "checked"),
    ],
)
def test_devices_train_as_one_and_skip_together(name, how):
    steps = program(name, how)()
    assert_devices_agree(steps)
    assert_bad_step_changes_nothing(name, steps)
    assert_as_on_one_device(name, steps)


def collectives(text: str) -> Counter[str]:
    return Counter(
        re.findall(
            r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
            r"(?:-start)?\(",
            text,
        )
    )


def guard_alone(case: Case, is_by_hand: bool) -> str:
    """The compiled program of a step on gradients that are given."""
    tx = guarded(case, case.specs if is_by_hand else None)
    params = filled(case)
    state = tx.init(params)
    carry, mesh = (case.specs, specs_of_state(case, state)), grid(case)

    def step(carry: Any, grads: Any) -> Any:
        return og.apply_gradients(tx, *carry, grads=grads)

    specs = carry, case.specs
    if is_by_hand:
        jitted = jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=carry))
    else:
        placed = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        jitted = jit(step, in_shardings=placed, out_shardings=placed[0])
    return jitted.lower((params, state), params).compile().as_text() or ""


@pytest.mark.parametrize("name", ["six experts on four devices", "split stages"])
def test_guard_has_one_all_reduce_for_each_set_of_axes(name):
    case = CASES[name]
    # One more, of a scalar, tells of entries that kept their old values.
    assert collectives(guard_alone(case, True)) == {"all-reduce": num_sets(case) + 1}


@pytest.mark.parametrize("name", ["six experts on four devices", "split stages"])
def test_compiler_gives_the_guard_one_all_reduce_for_each_axis(name):
    case = CASES[name]
    num_axes = len(frozenset().union(*(axes_of(case, k) for k in case.specs)))
    # On CPU a rare second look, in a branch of its own, adds up again. As many, of a
    # scalar, tell of entries that kept their old values.
    found = [collectives(x) for x in computations(guard_alone(case, False)).values()]
    counts = sorted(x["all-reduce"] for x in found if x)
    assert counts == [num_axes, 2 * num_axes]


@pytest.mark.parametrize(
    "name", ["six experts on four devices", "pipeline", "split stages on six devices"]
)
def test_guarded_step_adds_at_most_one_all_reduce_for_each_set_of_axes(name):
    case = CASES[name]
    plain = compiled_run(case, "checked", ADAM).text
    added = collectives(program(name, "checked").text)
    added.subtract(collectives(plain))
    assert 0 <= added.pop("all-reduce") <= num_sets(case) + 1
    assert not any(added.values())


# Specs of a state ---------------------------------------------------------------

EXPERTS = CASES["expert on each device"]


def step_with(tx: Any, of_state: Callable[[Any], Any]) -> None:
    """Traces a step under specs of the state."""
    params = filled(EXPERTS)
    state = tx.init(params)
    specs = EXPERTS.specs, of_state(state)
    step = jax.shard_map(
        lambda carry, grads: og.apply_gradients(tx, *carry, grads=grads),
        mesh=grid(EXPERTS),
        in_specs=(specs, EXPERTS.specs),
        out_specs=specs,
    )
    jax.eval_shape(step, (params, state), params)


def by_first_axis(tree: Any) -> Any:
    """Splits each array that can be split, as a rule by shape alone does."""
    return jax.tree.map(
        lambda x: P("expert") if x.ndim and x.shape[0] % 8 == 0 else P(), tree
    )


def test_specs_for_the_optimizers_state_are_enough_for_every_clip():
    def of_expert(path: str) -> int | None:
        return 0 if path in ("down", "up") else None

    clips = [
        og.clip_by_leaf_norm(1.0, layer_axis=of_expert, axis_name=EXPERTS.specs),
        og.clip_by_unit_norm(1.0, axis_name=EXPERTS.specs),
        og.adagc(axis_name=EXPERTS.specs),
    ]
    for clip in clips:
        step_with(og.guard(ADAM, clip), functools.partial(specs_of_state, EXPERTS))


@pytest.mark.parametrize("mask", [True, {k: k != "scale" for k in EXPERTS.specs}])
def test_optax_maps_specs_of_parameters_to_a_guarded_state(mask):
    clip = og.clip_by_global_norm(1.0, axis_name=EXPERTS.specs)
    tx = og.guard(ADAM, clip, mask=mask)

    def mapped(state: Any) -> Any:
        return optax.tree_map_params(
            tx, lambda _, s: s, state, EXPERTS.specs, transform_non_params=lambda _: P()
        )

    state = tx.init(filled(EXPERTS))
    assert mapped(state) == specs_of_state(EXPERTS, state)
    step_with(tx, mapped)


def test_records_that_are_split_are_an_error():
    tx = guarded(EXPERTS, EXPERTS.specs)
    whole = functools.partial(specs_of_state, EXPERTS)
    for of_state, match in [
        (by_first_axis, "`norm_counts` of a state must have length 8 .*, got 1"),
        (
            lambda state: whole(state)._replace(skip_counts=P("expert")),
            r"`skip_counts` of a state .*, got 1. Under `shard_map`.*PartitionSpec\(\)",
        ),
        (
            lambda state: whole(state)._replace(skip_log=P("expert")),
            "`skip_log` of a state must have length 16 on each device, got 2",
        ),
        (lambda _: P(), "moments need the specs of their parameters"),
    ]:
        with pytest.raises(ValueError, match=match):
            step_with(tx, of_state)
