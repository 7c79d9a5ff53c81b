"""What best parameters cost in a loop on TPU v5e and H100, read from the program.

Nothing is executed.
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_guard as og
from benchmarks.accelerators import COMPILERS, Case, Platform, has_compiler
from optax_guard import stop
from optax_guard.loops._device import compiled_run
from optax_guard.loops._inputs import Functions
from tests.hlo import choices_in_loops

PLATFORMS = [
    pytest.param(
        platform,
        marks=pytest.mark.skipif(
            not has_compiler(platform),
            reason=f"{COMPILERS[platform]} is not installed: `make test-accelerators`",
        ),
    )
    for platform in get_args(Platform)
]
TX = optax.adamw(1e-3)
# Entries on one device of the smallest parameter that counts here; scalars do not.
SIZE = 128


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def train_step(state, x):
    grads = jax.tree.map(lambda w: w - x, state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, opt_state), x


def evaluate(state):
    # One entry: the reductions of a real loss would be counted as well.
    return state.params["norm"][0]


def compiled_loop(case, stopper):
    params = case.params()
    state = State(
        jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(TX.init, params)
    )
    run, given = compiled_run(Functions(train_step, jnp.float32, evaluate, stopper))
    lowered = run.lower(
        case.place(state), np.int32(0), num_steps=8, eval_every=2, **given
    )
    # As in `compile_step`; else a copy by way of the scratch memory counts twice.
    return lowered.compile(
        {"xla_msa_enable": "false"} if case.platform == "v5e" else None
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_best_parameters_that_do_not_improve_move_nothing(platform):
    case = Case(platform)
    stopper = og.early_stopping(stop.patience(3))
    compiled = compiled_loop(case, stopper)
    [(around, [keep, take])] = choices_in_loops(compiled.as_text() or "", SIZE)
    assert (around, keep, take) == (0, 0, case.leaves)
    # The loop works in place on the donated state: parameters and both moments.
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2.99 * case.array_bytes
    assert memory.temp_size_in_bytes < 0.01 * case.array_bytes


@pytest.mark.parametrize("platform", PLATFORMS)
def test_where_instead_of_the_branch_would_show(platform):
    stopper = og.early_stopping(stop.patience(3))

    def update(value, state, params=None, **facts):
        new = stopper.update(value, state, params, **facts)
        best = jax.tree.map(
            lambda p, b: jnp.where(new.is_best, p, b), params, state.best_params
        )
        return new._replace(best_params=best)

    compiled = compiled_loop(Case(platform), stopper._replace(update=update))
    assert choices_in_loops(compiled.as_text() or "", SIZE) == []
