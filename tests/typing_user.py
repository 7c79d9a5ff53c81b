"""What type checkers tell a user of the installed package; checked, and never run.

`make types` gives it to Pyright and to mypy, both strict, from a folder that holds
nothing else: without `py.typed` in the wheel all of this would be `Any`.
"""

# pyright: strict, reportMissingTypeStubs=false
# Optax has annotations, but not the file that says so.

from pathlib import Path
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import optax_guard as og
from optax_guard import analysis, plotting
from optax_guard.flax import Checkpointer, FitResult, Rewind, TrainState, fit, load_best
from optax_guard.loops import PopulationResult, train_on_device, train_population

Params = dict[str, jax.Array]


def transformations(labels: dict[str, str]) -> None:
    tx = og.guard(optax.adamw(1e-3), clip=1.0, skip=[og.skip.spike()])
    assert_type(tx, optax.GradientTransformationExtraArgs)
    og.guard(optax.sgd(0.1), {"kind": "zscore"}, mask={"lora": True})
    for clip in (
        og.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 100)),
        og.clip_by_group_norm({"a": 1.0, "b": og.threshold.quantile(0.9)}, labels),
        og.clip_by_leaf_norm(og.threshold.relative_to_mean()),
        og.clip_by_unit_norm(0.01),
        og.clip_by_value(jnp.float32(1.0), min_value=-0.5),
        og.record_norm(axis_name="data"),
        og.zclip(),
        og.autoclip(10),
        og.adagc(),
    ):
        assert_type(clip, optax.GradientTransformationExtraArgs)
        optax.chain(clip, og.stop.scale_by_plateau(), optax.sgd(0.1))
    assert_type(og.accumulate(tx, 4), optax.GradientTransformationExtraArgs)
    assert_type(og.skip.norm_above(10.0), og.skip.SkipRule)
    assert_type(og.threshold.zscore(2.5), og.threshold.Threshold)


def reading(tx: optax.GradientTransformation, params: Params) -> None:
    state = tx.init(params)
    assert_type(og.metrics(state), dict[str, jax.Array])
    assert_type(og.find_state(state, og.GuardState), og.GuardState)
    # Mypy knows no type of attributes of a named tuple that are not its fields.
    num_skipped: jax.Array = og.find_state(state, og.GuardState).num_skipped
    assert_type(num_skipped, jax.Array)
    assert_type(og.find_states(state, og.NormStats), list[og.NormStats])
    assert_type(og.skipped_steps(state, params), list[og.SkippedStep])
    assert_type(og.skipped_steps(state)[0].reason, og.SkipReason)
    assert_type(og.leaf_norms(state), dict[str, jax.Array])
    og.raise_if_exhausted(og.metrics(state))


def stopping(losses: list[jax.Array], params: Params) -> str:
    rule = og.stop.any_of(og.stop.patience(5), og.stop.monitor("f1", og.stop.lag(3)))
    assert_type(rule, og.stop.StopRule)
    stopper = og.early_stopping(rule, mode="max", smooth=og.stop.ema(0.9))
    assert_type(stopper, og.EarlyStopping)
    state = stopper.init(params)
    for loss in losses:
        state = stopper.update({"loss": loss, "f1": 0.5}, state, params, step=1)
    assert_type(state, og.EarlyStoppingState)
    assert_type(state.should_stop, jax.Array)
    assert_type(og.stop.from_keras("val_loss", patience=2), og.EarlyStopping)
    assert_type(og.StopReason(int(state.stop_reason)), og.StopReason)
    return og.explain(state)


def training(model: Any, params: Params, path: Path) -> dict[str, Any]:
    tx = og.guard(optax.adamw(1e-3), clip=1.0)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    assert_type(state, TrainState)
    assert_type(state.apply_gradients(grads=params, value=0.5), TrainState)

    def train_step(state: TrainState, batch: int) -> tuple[TrainState, jax.Array]:
        del batch
        return state.apply_gradients(grads=params), jnp.float32(0.5)

    def batches(step: int) -> int:
        return step

    result = fit(
        state,
        train_step,
        batches,
        num_steps=10,
        eval_every=5,
        stopper=og.early_stopping(og.stop.patience(3)),
        loggers=[analysis.History(path / "history.jsonl")],
        checkpointer=Checkpointer(path),
        rewind=Rewind(times=2),
    )
    assert_type(result, FitResult)
    assert_type(result.history, list[dict[str, float]])
    assert_type(
        train_on_device(state, train_step, batches, num_steps=10, eval_every=5),
        FitResult,
    )

    def build(member: Any) -> dict[str, Any]:
        return {"state": member, "train_step": train_step, "batches": batches}

    many = train_population(build, params, num_steps=10, eval_every=5)
    assert_type(many, PopulationResult)
    assert_type(many.member(0), FitResult)
    assert_type(load_best(path), dict[str, Any])
    return load_best(str(path))


def studying(path: Path) -> None:
    history = analysis.History.read(path)
    assert_type(history, analysis.History)
    for finding in analysis.diagnose(history):
        assert_type(finding, analysis.Finding)
        assert_type(finding.severity, analysis.Severity)
        assert_type(analysis.FindingCode(str(finding.code)), analysis.FindingCode)
    assert_type(analysis.table(history), str)
    assert_type(analysis.suggest_max_norm(history).max_norm, float)
    found = analysis.replay(history, {"patience": og.stop.patience(3)})
    assert_type(found, list[analysis.Replayed])
    assert_type(analysis.table(found), str)
    assert_type(plotting.plot_history(history), Figure)
    assert_type(plotting.plot_history({"a": history}, max_loss=9.0), Figure)
    assert_type(plotting.plot_replay(history, found), Figure)


def mistakes(params: Params) -> None:
    """What must be refused: an ignored error that is none is an error itself."""
    og.guard(optax.sgd(0.1), skip=5.0)  # type: ignore[arg-type]
    og.early_stopping(3)  # type: ignore[arg-type]
    og.clip_by_value("1.0")  # type: ignore[arg-type]
    og.stop.patience(3).update(params)  # type: ignore[call-arg,arg-type]
