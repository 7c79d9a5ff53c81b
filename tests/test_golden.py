"""What version 0.1.0 saved loads, and goes on as it did then.

`python -m tests.test_golden DIRECTORY` made the data, at the lowest stated versions of
JAX, Optax, Flax and Orbax: a state of every kind in Flax's format, a checkpoint of
`fit`, and what followed on both.
"""

import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import optax_guard as og
from optax_guard._guarding.adoption import in_new_layout
from optax_guard.flax import Checkpointer, TrainState, fit, load_best

GOLDEN = Path(__file__).parent / "data" / "golden_0.1.0"
BEFORE, AFTER = 6, 4

SPIKE = og.skip.spike(window=8, watch=("grad_norm", "value"), min_history=4)
TRANSFORMS: dict[str, Any] = {
    "guard": og.guard(
        optax.adamw(0.01),
        clip=1.0,
        skip=[og.skip.norm_above(50.0), SPIKE],
        max_consecutive_skips=3,
    ),
    "guard by schedule": og.guard(
        optax.sgd(0.1), clip=optax.linear_schedule(2.0, 1.0, 8)
    ),
    "zscore": og.guard(optax.lion(0.01), clip=og.threshold.zscore(warmup=2)),
    "quantile": og.guard(optax.sgd(0.1), clip=og.threshold.quantile(0.9, warmup=2)),
    "mean": og.clip_by_global_norm(og.threshold.relative_to_mean(warmup=2)),
    "value": og.guard(optax.adam(0.01), clip=og.clip_by_value(0.1)),
    "leaf": og.clip_by_leaf_norm(og.threshold.zscore(warmup=2)),
    "group": og.clip_by_group_norm(
        {"embedding": 1.0, "layer": og.threshold.quantile(0.5, warmup=2)},
        lambda path: path.split("/")[0],
    ),
    "unit": og.clip_by_unit_norm(0.1),
    "record": og.record_norm(),
    "zclip": og.zclip(warmup_steps=2),
    "autoclip": og.autoclip(90.0),
    "adagc": og.adagc(),
    "accumulate": og.accumulate(og.guard(optax.adamw(0.01), clip=1.0), 3),
    "plateau": og.guard(optax.chain(optax.sgd(0.1), og.stop.scale_by_plateau())),
}
RULES: dict[str, Any] = {
    "patience": og.stop.patience(20, min_delta=0.01, cumulative=True),
    "plateau": og.stop.plateau(1, max_reductions=9),
    "lag": og.stop.lag(3, s=9),
    "overfitting": og.stop.overfitting(9),
    "generalization": og.stop.generalization_loss(500.0),
    "progress": og.stop.progress_quotient(500.0, 2),
    "rises": og.stop.successive_rises(9, 2),
    "divergence": og.stop.divergence(9.0),
    "budget": og.stop.budget(evaluations=50, seconds=1e6),
    "skips": og.stop.skip_storm(9),
    "combined": og.stop.any_of(
        og.stop.all_of(og.stop.target(-1.0), og.stop.patience(9)),
        og.stop.cooldown(og.stop.held_for(og.stop.target(-1.0), 2), 3),
        og.stop.not_before(og.stop.monitor("accuracy", og.stop.patience(9)), 2),
    ),
}
STOPPERS = {
    name: og.early_stopping(
        rule,
        key="loss",
        smooth=og.stop.median(3) if name == "lag" else og.stop.ema(0.5),
    )
    for name, rule in RULES.items()
}
PARAMS = {
    "embedding": jnp.ones((4, 3)),
    "layer": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.zeros((2,))},
}


def grads(step: int) -> Any:
    """Alike on every machine; the fourth has a NaN, the eighth is a spike."""
    scale = {3: np.nan, 7: 30.0}.get(step, 1.0)
    counts = iter(range(3))

    def leaf(p: jax.Array) -> jax.Array:
        index = np.arange(p.size).reshape(p.shape) + 10 * next(counts) + step
        return jnp.asarray(scale * (index % 7 - 2) / 8, p.dtype)

    return jax.tree.map(leaf, PARAMS)


def observation(step: int) -> dict[str, float]:
    return {"loss": 1.0 / (1 + step) + 0.25 * (step % 3), "accuracy": -float(step)}


@jax.jit
def updated(states: Any, grads: Any, value: Any) -> tuple[Any, Any]:
    updates, new_states = {}, {}
    for name, tx in TRANSFORMS.items():
        updates[name], new_states[name] = optax.with_extra_args_support(tx).update(
            grads, states[name], PARAMS, value=value
        )
    return updates, new_states


def initial() -> dict[str, Any]:
    return {
        "transforms": {name: tx.init(PARAMS) for name, tx in TRANSFORMS.items()},
        "machines": {name: m.init(PARAMS) for name, m in STOPPERS.items()},
    }


def advanced(states: Any, steps: range) -> tuple[Any, list[dict[str, Any]]]:
    """States after these steps, and what a user sees of each step, as JSON."""
    transforms, stoppers = states["transforms"], dict(states["machines"])
    seen = []
    for step in steps:
        updates, transforms = updated(transforms, grads(step), jnp.float32(1 + step))
        for name, stopper in STOPPERS.items():
            stoppers[name] = stopper.update(
                observation(step),
                stoppers[name],
                jax.tree.map(lambda p, step=step: p + step, PARAMS),
                step=step,
                seconds=1.0,
                train_value=np.array([0.5, 1.0 / (1 + step)]),
                opt_state=transforms["guard"],
            )
        told = {
            name: [float(m.best_value), int(m.best_eval), int(m.stop_reason)]
            for name, m in stoppers.items()
        }
        metrics = {name: listed(og.metrics(s)) for name, s in transforms.items()}
        seen.append({"updates": listed(updates), "metrics": metrics, "machines": told})
    return {"transforms": transforms, "machines": stoppers}, seen


def listed(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32).tolist(), tree)


# The checkpoint of a run -------------------------------------------------------


def train_step(state: Any, step: Any) -> tuple[Any, Any]:
    value, grad = jax.value_and_grad(lambda w: jnp.sum((w - step) ** 2))(state.params)
    return state.apply_gradients(grads=grad, value=value), value


def run(directory: Path, num_steps: int) -> Any:
    """Two steps an evaluation; the third batch is a NaN."""
    tx = og.guard(optax.adam(0.1), clip=og.threshold.zscore(warmup=2))
    return fit(
        TrainState.create(apply_fn=train_step, params=jnp.zeros(3), tx=tx),
        train_step,
        lambda step: jnp.float32(np.nan if step == 2 else step % 2),
        num_steps=num_steps,
        eval_every=2,
        evaluate=lambda state: jnp.sum((state.params - 0.2) ** 2),
        stopper=og.early_stopping(og.stop.patience(20)),
        checkpointer=Checkpointer(directory),
    )


def rows(result: Any) -> list[dict[str, float]]:
    """Its history without what is of the clock, or new since."""
    new = {"update_ratio", "leaf_norm_ratio", "initial_value", "stop_reason"}
    return [
        {k: v for k, v in row.items() if "second" not in k and k not in new}
        for row in result.history
    ]


def close(found: Any, expected: Any) -> None:
    """Numbers as near as versions of XLA may round them, in the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(
        *(np.asarray(jax.tree.leaves(tree), float) for tree in (found, expected)),
        rtol=1e-5,
        atol=1e-6,
    )


# Tests -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((GOLDEN / "after.json").read_text())


def test_states_of_every_kind_load_and_go_on_as_they_did(expected):
    saved = (GOLDEN / "states.msgpack").read_bytes()
    renamed = in_new_layout(serialization.msgpack_restore(saved))
    states = serialization.from_state_dict(initial(), renamed)
    _, seen = advanced(states, range(BEFORE, BEFORE + AFTER))
    for step, (found, then) in enumerate(zip(seen, expected["steps"], strict=True)):
        for part, named in then.items():
            for name, numbers in named.items():
                now = found[part][name]
                if part == "metrics":  # Later versions add some.
                    now = {metric: now[metric] for metric in numbers}
                close((step, now), (step, numbers))


def test_no_kind_of_state_is_missing():
    kinds = {
        value
        for name, module in sys.modules.items()
        if name.startswith("optax_guard.")
        for value in vars(module).values()
        if inspect.isclass(value) and value.__name__.endswith("State")
        if issubclass(value, tuple)
    }
    kinds -= {  # New since.
        og.UpdateBoundState,
        og.threshold.RelativeToParamsState,
        og.stop.RecentParamsState,
    }
    found = og.find_states(initial(), tuple(kinds))
    assert {kind.__name__ for kind in kinds - {type(state) for state in found}} == set()


def test_run_resumes_from_its_checkpoint_and_ends_as_it_did(tmp_path, expected):
    shutil.unpack_archive(GOLDEN / "run.zip", tmp_path)
    result = run(tmp_path, 12)
    close(rows(result), expected["rows"])
    close(listed(load_best(tmp_path)["params"]), expected["best"])


def test_run_holds_its_history_to_the_last_digit(tmp_path, expected):
    shutil.unpack_archive(GOLDEN / "run.zip", tmp_path)
    assert rows(run(tmp_path, 8)) == expected["rows"][:4]


def write(directory: Path) -> None:
    directory.mkdir(parents=True)
    states, _ = advanced(initial(), range(BEFORE))
    (directory / "states.msgpack").write_bytes(serialization.to_bytes(states))
    _, seen = advanced(states, range(BEFORE, BEFORE + AFTER))
    with tempfile.TemporaryDirectory() as temporary:
        run(Path(temporary), 8)
        shutil.make_archive(str(directory / "run"), "zip", temporary)
    with tempfile.TemporaryDirectory() as temporary:
        whole = run(Path(temporary), 12)
        best = listed(load_best(temporary)["params"])
    (directory / "after.json").write_text(
        json.dumps({"steps": seen, "rows": rows(whole), "best": best}) + "\n"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
