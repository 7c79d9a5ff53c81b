"""The runs: one program for a task and a contender, all else is numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._layers import by_layer
from benchmarks.neutral._contenders import Contender, Run
from benchmarks.neutral._tasks import BATCH, Task
from benchmarks.stability import sgd_or_adam

# The lowest and highest learning rate of each.
OPTIMIZERS = {"SGD": (0.003, 3.0), "Adam": (0.0003, 0.3)}


class Size(NamedTuple):
    """How much is run."""

    tuning_seeds: int = 4
    test_seeds: int = 12
    first_test_seed: int = 1000
    rates: int = 13
    evaluations: int = 20
    steps: tuple[int, ...] = (200, 1000)


# By round.
SIZES = {1: Size(), 2: Size(first_test_seed=2000)}
QUICK = Size(tuning_seeds=1, test_seeds=1, rates=2, evaluations=5, steps=(5,))


def seeds_of(size: Size) -> np.ndarray:
    """Those for tuning, then those for the test."""
    test = size.first_test_seed + np.arange(size.test_seeds)
    return np.concatenate([np.arange(size.tuning_seeds), test])


def rates_of(optimizer: str, contender: Contender, size: Size) -> np.ndarray:
    """Learning rates: as many for all settings together as for any other contender."""
    low, high = OPTIMIZERS[optimizer]
    if len(contender.settings) > 1:
        return np.geomspace(low, high, size.rates)
    # Four for one, centred on it, so that the range is the same.
    fine = (np.arange(4 * size.rates) - 1.5) / 4
    return low * (high / low) ** (fine / (size.rates - 1))


def optimizers_of(contender: Contender) -> list[str]:
    return [name for name in OPTIMIZERS if contender.is_for_sgd or name != "SGD"]


def members_of(contender: Contender, size: Size) -> dict[str, np.ndarray]:
    """Numbers of all runs, ordered by optimizer, setting, learning rate and seed."""
    names = optimizers_of(contender)
    rates = np.array([rates_of(name, contender, size) for name in names])
    shape = len(names), len(contender.settings), rates.shape[1], len(seeds_of(size))
    at = np.indices(shape).reshape(4, -1)
    settings = np.array(contender.settings, np.float32)
    return {
        "is_adam": np.array([name == "Adam" for name in names])[at[0]],
        "setting": settings.reshape(len(settings), -1)[at[1]],
        "learning_rate": rates.astype(np.float32)[at[0], at[2]],
        "seed": at[3].astype(np.int32),
    }


def make_runs(
    task: Task, contender: Contender, size: Size
) -> Callable[[Any, Any, Any, Any, Any], jax.Array]:
    """A function of members, batches, initial parameters, data and steps: scores.

    Steps are those between two evaluations. Scores are [member], the mean of the last
    three evaluations.
    """

    def run(member: Any, places: Any, params: Any, data: Any, every: Any) -> jax.Array:
        setting = member["setting"]
        of_run = Run(
            optimizer=sgd_or_adam(member["is_adam"], member["learning_rate"]),
            learning_rate=member["learning_rate"],
            num_steps=every * size.evaluations,
            most_steps=max(size.steps),
        )
        tx = contender.build(of_run, *(setting[i] for i in range(setting.size)))
        tx = by_layer(tx, task.layer_axis)
        seed = member["seed"]
        params = jax.tree.map(lambda p: p[seed], params)

        def step(i: jax.Array, carry: Any) -> Any:
            params, state = carry
            loss, grads = task.grads(data, params, places[seed, i])
            updates, state = tx.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        def evaluate(carry: Any, i: jax.Array) -> Any:
            carry = jax.lax.fori_loop(i * every, (i + 1) * every, step, carry)
            return carry, task.score(data, carry[0])

        carry = params, tx.init(params)
        scores = jax.lax.scan(evaluate, carry, jnp.arange(size.evaluations))[1]
        return scores[-3:].mean()

    return jax.vmap(run, in_axes=(0, None, None, None, None))


def inputs_of(task: Task, size: Size) -> tuple[Any, Any, Any]:
    """Where the batches of each seed lie, its initial parameters, and the data."""
    seeds = seeds_of(size)
    shape = max(size.steps), BATCH
    places = [
        np.random.default_rng(int(seed)).integers(0, task.num_places, shape)
        for seed in seeds
    ]
    params = jax.jit(jax.vmap(task.init))(jax.vmap(jax.random.key)(seeds))
    return jnp.asarray(np.array(places, np.int32)), params, task.data


def lower(
    task: Task, contender: Contender, size: Size, inputs: tuple[Any, Any, Any]
) -> Any:
    members = members_of(contender, size)
    every = jnp.asarray(1, jnp.int32)
    return jax.jit(make_runs(task, contender, size)).lower(members, *inputs, every)


def scores_of(
    compiled: Any,
    contender: Contender,
    size: Size,
    inputs: tuple[Any, Any, Any],
    steps: int,
) -> np.ndarray:
    """Scores [optimizer, setting, rate, seed]."""
    members = members_of(contender, size)
    every = jnp.asarray(steps // size.evaluations, jnp.int32)
    scores = np.asarray(compiled(members, *inputs, every), np.float64)
    num_rates = rates_of("Adam", contender, size).size
    shape = len(optimizers_of(contender)), len(contender.settings), num_rates, -1
    return scores.reshape(shape)
