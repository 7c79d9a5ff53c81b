"""Wrong calls of every public name, made from its signature.

Each argument of each function is given each value of `WRONG`. A right value must pass;
any other must raise a `TypeError` or a `ValueError` from this package that names the
argument, or, for a file or a member that does not exist, a `FileNotFoundError` or an
`IndexError`. A number of NumPy or JAX must fare as the same number of Python does.
`pytest -s` prints how many calls were tried.
"""

import functools
import inspect
import math
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")

from flax.training.dynamic_scale import DynamicScale

import optax_guard as og
from optax_guard import analysis, loops
from optax_guard import flax as og_flax
from tests.public import PACKAGE, public_names

PARAMS: Any = {"w": jnp.ones(2), "b": jnp.ones(())}
GRADS: Any = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(())}
SGD = optax.sgd(0.1, momentum=0.9)
GUARD = og.guard(SGD, clip=1.0)
STATE = GUARD.init(PARAMS)
LEAVES = og.clip_by_leaf_norm(1.0, record_quantiles=True).init(PARAMS)
RULE = og.stop.patience(2)
STOPPER = og.early_stopping(RULE)
AVERAGING = og.early_stopping(RULE, average_last=2)
ROWS = [
    {
        "step": i,
        "grad_norm": 1.0 + i % 3,
        "val_loss": 2.0 / (i + 1),
        "train_loss": 1.0,
        "leaf_norm/a": 1.0,
    }
    for i in range(25)
]
REPLAYED = analysis.Replayed(
    "r", og.StopReason.RUNNING, 3, 1, 0.5, 0, 0.0, 0.0, False, 0.1
)
TRIAL = analysis.Trial(1.0, 0.1, 0.5, True, 0.0, 0.0, 5, og.StopReason.RUNNING)
TRAIN_STATE = og_flax.TrainState.create(apply_fn=str, params=PARAMS, tx=GUARD)


class Odd:
    """Of no use to anything."""


# The pool --------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "None": None,
    "text": "no",
    "True": True,
    "-1": -1,
    "0": 0,
    "3": 3,
    "0.5": 0.5,
    "2.5": 2.5,
    "nan": math.nan,
    "inf": math.inf,
    "1j": 1j,
    "2**40": 2**40,
    "10**400": 10**400,
    "vector": np.ones(2, np.float32),
    "vector of jax": jnp.ones(2),
    "text of numpy": np.array("a"),
    "[]": [],
    "[1]": [1],
    "{}": {},
    "object": Odd(),
    "function": lambda: None,
    "class": Odd,
    "transformation": SGD,
    "rule": RULE,
}
# The dtype in which NumPy and JAX hold a number of Python.
DTYPES: dict[type, Any] = {
    bool: np.bool_,
    int: np.int32,
    float: np.float32,
    complex: np.complex64,
}


def twins_of(value: Any) -> dict[str, Any]:
    """The same number as a NumPy scalar and as a JAX array."""
    if type(value) not in DTYPES or value == 10**400:
        return {}
    if value == 2**40:
        return {"np": np.int64(value)}
    scalar = DTYPES[type(value)](value)
    return {"np": scalar, "jnp": jnp.asarray(scalar)}


TWINS = {label: twins_of(value) for label, value in WRONG.items()}
# A step on the device is not read, for which `update` would wait.
NOT_READ = {"early_stopping.update.step"}

# What is right, by the kind of an argument.
POSITIVE = {"3", "0.5", "2.5", "inf", "2**40"}
NOT_NEGATIVE = POSITIVE | {"0"}
NUMBER = NOT_NEGATIVE | {"-1"}
FRACTION, COUNT, FROM_ZERO = {"0.5"}, {"3"}, {"3", "0"}
FLAG, TEXT, NOTHING = {"True"}, {"text"}, {"None"}
ANY_RULE, ANY_TX, NO_ITEMS = {"rule"}, {"transformation"}, {"[]", "{}"}
# Trees of arrays; whole numbers in them do not count.
TREES = {"True", "-1", "0", "3", "0.5", "2.5", "nan", "inf", "1j"}
TREES |= {"vector", "vector of jax", "[]", "[1]", "{}"}
# Only a label, or compared with `==`: documented to take what there is.
ANYTHING = set(WRONG)

RIGHT: dict[str, set[str]] = {
    "alpha": POSITIVE,
    "axis": NOTHING | {"[]"},
    "axis_name": NOTHING | {"[]"},
    "baseline": NOTHING | NUMBER,
    "batch_size": COUNT,
    "by_group": FLAG,
    "check_finite": FLAG,
    "clip": NOTHING | POSITIVE,
    "max_update": NOTHING | POSITIVE,
    "min_rms": POSITIVE,
    "cumulative": FLAG,
    "ddof": {"0", "0.5"},
    "decay": FRACTION,
    "divergence_threshold": NOTHING | NUMBER,
    "eps": POSITIVE,
    "eval_every": COUNT,
    "evaluations": COUNT,
    "every_k": COUNT,
    "exclude": FLAG,
    "factor": FRACTION,
    "findings": {"[]"},
    "include_current": FLAG,
    "inner": ANY_TX,
    "k": COUNT,
    "keep": COUNT,
    "key": NOTHING,
    "lambda_abs": NOTHING | POSITIVE,
    "lambda_rel": {"3", "2.5", "inf", "2**40"},
    "layer_axis": NOTHING,
    "loss_label": ANYTHING,
    "leave_out": FROM_ZERO,
    "lr_factor": FRACTION,
    "markdown": FLAG,
    "mask": FLAG,
    "max_consecutive": COUNT,
    "max_consecutive_skips": COUNT,
    "max_loss": NOTHING | POSITIVE - {"inf"},
    "max_nonfinite": FROM_ZERO,
    "max_norm": POSITIVE,
    "max_norms": set(),
    "max_ratio": POSITIVE,
    "max_rise": NOTHING | POSITIVE,
    "max_reductions": FROM_ZERO,
    "max_value": POSITIVE,
    "min_delta": NOT_NEGATIVE,
    "min_deviation": NOT_NEGATIVE,
    "min_history": NOTHING | COUNT,
    "min_rise": NOT_NEGATIVE,
    "monitor": TEXT,
    "n": COUNT,
    "num_points": COUNT,
    "num_steps": COUNT,
    "ord": NOTHING | POSITIVE,
    "params": set(),
    "path": NOTHING,
    "patience": FROM_ZERO,
    "percentile": {"3", "2.5"},
    "progress": FLAG,
    "q": {"0", "0.5"},
    "record_quantiles": FLAG,
    "skipped_steps": NO_ITEMS,
    "rel_delta": NOT_NEGATIVE,
    "relative_error": FRACTION,
    "replayed": NO_ITEMS,
    "restart": FLAG,
    "restore_best_weights": FLAG,
    "rewind": NOTHING,
    "rule": ANY_RULE,
    "s": COUNT,
    "seconds": NOTHING | POSITIVE,
    "sigma": POSITIVE,
    "skip": {"[]"},
    "skip_update_on_spike": FLAG,
    "smooth": NOTHING,
    "start_from_epoch": FROM_ZERO,
    "steps": NOTHING | COUNT,
    "stop": NOTHING,
    "stopper": NOTHING,
    "stopping_threshold": NOTHING | NUMBER,
    "strict": FLAG,
    "threshold": NUMBER,
    "times": COUNT,
    "title": ANYTHING,
    "tolerance": POSITIVE,
    "use_cond": FLAG,
    "warmup": COUNT,
    "warmup_steps": COUNT,
    "window": COUNT,
    "z_thresh": POSITIVE,
    # Where the same name means something else, or one of several is needed.
    "adagc.beta": FRACTION,
    "analysis.Diagnosis.update.row": {"{}"},
    "analysis.History.append.row": NOTHING | {"{}"},
    "analysis.History.append.scalars.scalar": NUMBER | {"True", "nan"},
    "analysis.History.append.step": COUNT | {"0", "2**40", "True"},
    "analysis.History.column.name": TEXT,
    "analysis.History.extend.num_rows": NOTHING | COUNT | {"0"},
    "analysis.History.log_scalar.event": TEXT,
    "analysis.History.log_scalar.step": NOTHING | COUNT | {"0", "2**40", "True"},
    "analysis.History.log_scalar.value": NUMBER | {"True", "nan"},
    "analysis.History.path": NOTHING,
    "analysis.History.read.columns": NOTHING | {"{}"},
    "analysis.History.read.max_norm": NOTHING | POSITIVE,
    "analysis.History.read.path": set(),
    "analysis.History.read.pattern": NOTHING,
    "analysis.History.read.run": NOTHING,
    "analysis.diagnose.history": NO_ITEMS,
    "analysis.landscape.exclude": NOTHING,
    "analysis.landscape.max_norm": NOTHING | POSITIVE,
    "analysis.landscape.params": TREES - {"True", "-1", "0", "3", *NO_ITEMS, "[1]"},
    "analysis.landscape.path": NO_ITEMS,
    "analysis.landscape.directions": NOTHING,
    "analysis.landscape.span": NOTHING | POSITIVE,
    "analysis.leaf_columns.grads": NOTHING | TREES,
    "analysis.leaf_columns.state": NOTHING,
    "analysis.suggest_max_norm.clip_rate": FRACTION,
    "analysis.sweep_max_norm.learning_rates": {"[1]"},
    "analysis.sweep_max_norm.max_norms": {"[1]"},
    "analysis.table.history": NO_ITEMS,
    "clip_by_value.min_value": NOTHING | {"0", "-1", "0.5"},
    "early_stopping.average.default": set(),
    "early_stopping.average_last": NOTHING | COUNT,
    "early_stopping.best.default": set(),
    "early_stopping.reset.keep_best": FLAG,
    "early_stopping.update.params": NOTHING,
    "early_stopping.update.seconds": NUMBER | {"nan"},
    "early_stopping.update.step": FROM_ZERO,
    "early_stopping.update.train_value": NUMBER
    | {"nan", "vector", "vector of jax", "[1]"},
    "early_stopping.update.value": NUMBER | {"nan"},
    "early_stopping.key": NOTHING | TEXT,
    "early_stopping.warmup": FROM_ZERO,
    "debug.explain_step.batch": ANYTHING,
    "debug.explain_step.state": ANYTHING,
    "debug.find_nonfinite.fn": {"class", "function"},
    "analysis.replay.mode": NOTHING,
    "find_states.cls": {"class"},
    "find_states.tree": ANYTHING,
    "loops.Checkpointer.continue_stopped": FLAG,
    "loops.Checkpointer.directory": TEXT,
    "flax.TrainState.create.apply_fn": ANYTHING,
    "flax.TrainState.create.tx": ANY_TX,
    "flax.TrainState.create.params": TREES | NOTHING,
    "loops.fit.batches": {"vector", "vector of jax", "[1]"},
    "loops.fit.checkpointer": NOTHING,
    "loops.fit.ema": NOTHING | {"0.5"},
    "loops.train_on_device.ema": NOTHING | {"0.5"},
    "loops.fit.learning_rate": NOTHING,
    "loops.fit.loggers": {"[]"},
    "loops.fit.audit_every": NOTHING | COUNT,
    "loops.Rewind.skip_steps": {"[]"},
    "stop.divergence.ratio": NOTHING,
    "loops.fit.on_skip": NOTHING,
    "stop.from_keras.min_delta": NUMBER,
    "stop.from_lightning.min_delta": NUMBER,
    "loops.train_population.members": {"vector", "vector of jax", "[1]"},
    "loops.PopulationResult.member.i": {"0", "-1"},
    "norm_quantile.q": {"0", "0.5", "vector", "vector of jax", "[]", "[1]"},
    "plotting.plot_norm_distribution.max_norms": {"[]", "[1]", "vector"}
    | {"vector of jax"},
    "plotting.plot_replay.replayed": set(),
    "plotting.plot_population.labels": {"[]", "[1]"},
    # They are read only if it raises.
    "raise_if_exhausted.state": ANYTHING,
    "raise_if_exhausted.params": ANYTHING,
    "skipped_steps.params": ANYTHING,
    "skip.is_nonfinite.reason": ANYTHING,
    "stop.cooldown.n": FROM_ZERO,
    "stop.ema.decay": {"0", "0.5"},
    "stop.monitor.key": TEXT,
    "stop.not_before.steps": NOTHING,
    "stop.not_before.seconds": NOTHING,
    "stop.patience.steps": NOTHING,
    "stop.patience.seconds": NOTHING,
    "stop.plateau.cooldown": FROM_ZERO,
    "stop.target.value": NUMBER,
    "threshold.quantile.decay": NOTHING | FRACTION,
    "threshold.quantile.max_norm": NOTHING | POSITIVE,
    "threshold.quantile.warmup": FROM_ZERO,
    "threshold.relative_to_mean.ratio": {"3", "2.5", "inf", "2**40"},
    "threshold.relative_to_params.ratio": POSITIVE,
    "threshold.relative_to_params.start": POSITIVE,
    "threshold.relative_to_mean.warmup_max_norm": NOTHING | POSITIVE,
    "threshold.zscore.max_norm": NOTHING | POSITIVE,
    "zclip.alpha": FRACTION,
    "zclip.max_norm": NOTHING | POSITIVE,
}
# What an error calls the argument, where it is handed on under another name.
ALSO = {
    "analysis.landscape.exclude": "params",
    "wrap_state.params": "old_opt_state",
    "analysis.Diagnosis.update.row": "history",
    "apply_gradients.opt_state": "state",
    "apply_gradients.params": "grads",
    "find_state.cls": "tree",
    "clip_by_group_norm.labels": "max_norms",
}


# Right calls -----------------------------------------------------------------------


def train_step(state: Any, batch: Any) -> Any:
    del batch
    return state.apply_gradients(grads=GRADS), 1.0


def build(member: Any) -> dict[str, Any]:
    tx = og.guard(optax.sgd(member["learning_rate"]), clip=member["max_norm"])
    state = og_flax.TrainState.create(apply_fn=str, params=PARAMS, tx=tx)
    return {**LOOP, "state": state}


def loss_of(params: Any) -> Any:
    return sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(params))


LOOP: dict[str, Any] = {
    "state": TRAIN_STATE,
    "train_step": train_step,
    "batches": lambda step: None,
    "evaluate": lambda state: loss_of(state.params),
    "stopper": STOPPER,
}
LENGTH = {"num_steps": 1, "eval_every": 1}
FEW = {"learning_rate": jnp.ones(1), "max_norm": jnp.ones(1)}
LINES = np.zeros(3)
GRID = np.ones((3, 3))
PLANE = analysis.Landscape(
    LINES, LINES, GRID, GRID, np.zeros((3, 3), bool), 1.0, ({}, {}), None, 1.0
)
COLUMNS: Any = {"step": np.ones((1, 1)), "value": np.ones((1, 1))}
MEMBERS: Any = np.ones(1, int)
POPULATION = loops.PopulationResult(None, None, None, COLUMNS, MEMBERS)
PLATEAU = og.early_stopping(og.stop.plateau(1)).init()

# A right call of each name that takes arguments without a default.
CALLS: dict[str, dict[str, Any]] = {
    "accumulate": {"inner": GUARD, "every_k": 2},
    "wrap_state": {"tx": GUARD, "params": PARAMS, "old_opt_state": SGD.init(PARAMS)},
    "unwrap_state": {"opt_state": STATE},
    "clip_by_global_norm": {"max_norm": 1.0},
    "clip_by_group_norm": {"max_norms": {"w": 1.0, "b": 1.0}, "labels": str},
    "clip_by_leaf_norm": {"max_norm": 1.0},
    "clip_by_unit_norm": {"max_ratio": 0.1},
    "clip_by_value": {"max_value": 1.0},
    "early_stopping": {"rule": RULE},
    "debug.explain_step": {
        "train_step_or_loss": lambda state, batch: jnp.ones(()),
        "state": PARAMS,
        "batch": PARAMS,
    },
    "debug.find_nonfinite": {"fn": lambda: jnp.ones(())},
    "explain": {"state": STOPPER.init()},
    "apply_gradients": {
        "tx": GUARD,
        "params": PARAMS,
        "opt_state": STATE,
        "grads": GRADS,
    },
    "auto": {"inner": SGD},
    "guard": {"inner": SGD},
    "leaf_norms": {"state": LEAVES},
    "norm_quantile": {"state": LEAVES, "q": 0.5},
    "metrics": {"state": STATE},
    "raise_if_exhausted": {"metrics": {"guard_exhausted": False}},
    "skipped_steps": {"state": STATE, "params": PARAMS},
    "find_state": {"tree": STATE, "cls": og.GuardState},
    "find_states": {"tree": STATE, "cls": og.GuardState},
    "stop.from_lightning": {"monitor": "a"},
    "keep_if_skipped": {"opt_state": STATE, "new": PARAMS, "old": PARAMS},
    "analysis.diagnose": {"history": ROWS},
    "analysis.table": {"history": ROWS},
    "analysis.landscape": {"loss_fn": loss_of, "params": PARAMS, "num_points": 3},
    "analysis.frozen_moments": {"opt_state": STATE},
    "analysis.leaf_columns": {"grads": GRADS, "params": PARAMS, "new_params": GRADS},
    "analysis.replay": {"history": ROWS, "rules": {"t": RULE}},
    "analysis.suggest_max_norm": {"history": ROWS},
    "analysis.sweep_max_norm": {
        "build": build,
        "max_norms": [1.0],
        "learning_rates": [0.1],
        **LENGTH,
    },
    "loops.Checkpointer": {"directory": "nowhere"},
    "loops.load_best": {"directory": "nowhere"},
    "loops.fit": {**LOOP, **LENGTH},
    "flax.update_dynamic_scale": {"dynamic_scale": DynamicScale(), "opt_state": STATE},
    "loops.train_on_device": {**LOOP, **LENGTH},
    "loops.train_population": {"build": build, "members": FEW, **LENGTH},
    "plotting.plot_norm_distribution": {"history": ROWS},
    "plotting.plot_history": {"history": ROWS},
    "plotting.plot_landscape": {"landscape": PLANE},
    "plotting.plot_leaves": {"history": ROWS},
    "plotting.plot_population": {"population": POPULATION},
    "plotting.plot_replay": {"history": ROWS, "replayed": [REPLAYED]},
    "plotting.plot_early_stopping": {"history": ROWS},
    "plotting.plot_sweep": {"sweep": analysis.Sweep((TRIAL,), TRIAL, ())},
    "skip.is_nonfinite": {"reason": jnp.int32(0)},
    "skip.norm_above": {"max_norm": 1.0},
    "stop.ema": {"decay": 0.5},
    "stop.median": {"k": 3},
    "stop.cooldown": {"rule": RULE, "n": 1},
    "stop.held_for": {"rule": RULE, "n": 1},
    "stop.monitor": {"key": "a", "rule": RULE},
    "stop.not_before": {"rule": RULE, "evaluations": 1},
    "stop.skip_storm": {"n": 1},
    "stop.lag": {"k": 1},
    "stop.overfitting": {"k": 1},
    "stop.apply_plateau": {
        "opt_state": og.stop.scale_by_plateau().init(PARAMS),
        "state": PLATEAU,
    },
    "stop.plateau": {"n": 1},
    "stop.generalization_loss": {"alpha": 1.0},
    "stop.progress_quotient": {"alpha": 1.0, "k": 2},
    "stop.successive_rises": {"s": 1},
    "stop.budget": {"evaluations": 1},
    "stop.divergence": {"threshold": 1.0},
    "stop.patience": {"n": 1},
    "stop.target": {"value": 1.0},
    "threshold.quantile": {"q": 0.5},
}
# Methods, and functions of any number of rules.
ALL_NEEDS = og.early_stopping(
    og.stop.any_of(
        og.stop.budget(steps=9, seconds=9.0),
        og.stop.overfitting(2),
        og.stop.skip_storm(9),
    )
)


@functools.wraps(analysis.History.read)
def read(**call: Any) -> Any:
    Path("run.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    return analysis.History.read(**call)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "analysis.Diagnosis.update": (
        lambda row: analysis.Diagnosis().update(row),
        {"row": ROWS[0]},
    ),
    "analysis.History.append": (
        lambda step, row: analysis.History().append(step, row),
        {"step": 1, "row": None},
    ),
    "analysis.History.append.scalars": (
        lambda scalar: analysis.History().append(1, scalar=scalar),
        {"scalar": 1.0},
    ),
    "analysis.History.extend": (
        lambda buffers, num_rows: analysis.History().extend(buffers, num_rows),
        {"buffers": {"step": np.ones(1)}, "num_rows": None},
    ),
    "analysis.History.log_scalar": (
        lambda event, value, step: analysis.History().log_scalar(
            event, value, step=step
        ),
        {"event": "value", "value": 1.0, "step": 1},
    ),
    "analysis.History.column": (
        lambda name: analysis.History().column(name),
        {"name": "a"},
    ),
    "analysis.History.read": (read, {"path": "run.jsonl"}),
    "flax.TrainState.create": (
        og_flax.TrainState.create,
        {"apply_fn": str, "params": PARAMS, "tx": GUARD},
    ),
    "flax.TrainState.apply_gradients": (
        lambda grads: TRAIN_STATE.apply_gradients(grads=grads),
        {"grads": GRADS},
    ),
    "loops.PopulationResult.member": (lambda i: POPULATION.member(i), {"i": 0}),
    "early_stopping.update": (
        ALL_NEEDS.update,
        {
            "value": 1.0,
            "state": ALL_NEEDS.init(),
            "step": 1,
            "seconds": 1.0,
            "train_value": 1.0,
            "opt_state": STATE,
        },
    ),
    "early_stopping.best": (
        STOPPER.best,
        {"state": STOPPER.init(PARAMS), "default": PARAMS},
    ),
    "early_stopping.average": (
        AVERAGING.average,
        {"state": AVERAGING.init(PARAMS), "default": PARAMS},
    ),
    "early_stopping.reset": (STOPPER.reset, {"state": STOPPER.init(PARAMS)}),
    "stop.all_of.rules": (lambda rule: og.stop.all_of(RULE, rule), {"rule": RULE}),
    "stop.any_of.rules": (lambda rule: og.stop.any_of(RULE, rule), {"rule": RULE}),
}
CALLS |= {name: call for name, (_, call) in METHODS.items()}
# Named tuples, enumerations, errors and the like are what functions return; whoever
# builds one is trusted. The loops' display is one of the user's own.
HELD = ("flax.TrainState", "skip.SkipRule", "threshold.Threshold")
# These compile, draw or train; a right call of them is tested elsewhere.
DEAR = ("analysis.landscape", "analysis.sweep_max_norm", "norm_quantile")
DEAR += ("flax.", "loops.", "plotting.")


def callables() -> dict[str, Any]:
    """Every public function, and the classes that users make."""
    return {name: method for name, (method, _) in METHODS.items()} | {
        name: value
        for name, value in public_names().items()
        if inspect.isfunction(value)
        or (
            inspect.isclass(value)
            and not issubclass(value, (tuple, int, str, Exception))
            and name not in HELD
        )
    }


NAMES = callables()


def arguments(name: str) -> list[str]:
    parameters = inspect.signature(NAMES[name]).parameters.values()
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    return [p.name for p in parameters if p.kind not in kinds]


def right_for(name: str, argument: str) -> set[str]:
    return RIGHT.get(f"{name}.{argument}", RIGHT.get(argument, set()))


def use(made: Any) -> None:
    """Traces what a factory made, for what it only checks then."""
    value: Any = 1.0
    if isinstance(made, og.threshold.Threshold):
        made = og.clip_by_global_norm(made)
    elif isinstance(made, og.skip.SkipRule):
        made = og.guard(SGD, skip=made)
    elif isinstance(made, og.stop.Smoother):
        made = og.early_stopping(RULE, smooth=made)
    elif isinstance(made, og.stop.StopRule):
        value = dict.fromkeys({"a", *made.keys}, 1.0) if made.keys else 1.0
        made = og.early_stopping(made, key="a" if made.keys else None)
    if isinstance(made, optax.GradientTransformation):
        update = optax.with_extra_args_support(made).update
        update = functools.partial(update, value=1.0)
        jax.eval_shape(update, GRADS, made.init(PARAMS), PARAMS)
    elif isinstance(made, og.EarlyStopping):
        given: dict[str, Any] = dict.fromkeys(made.needs - {"opt_state"}, 1)
        given |= dict.fromkeys(made.needs & {"opt_state"}, STATE)
        jax.eval_shape(lambda s: made.update(value, s, **given), made.init())


OF_OTHERS = (
    # A function of the user's, or a tuple of some, which takes other arguments.
    *(f"{name}() takes" for name in ("<lambda>", "Odd", "init_fn", ".init", ".update")),
    # JAX on a name that no mesh axis in force has, as `clip_by_global_norm` tells.
    "unbound axis name",
    # JAX on a batch of what is no array, by its path.
    "Error interpreting argument to <function train_step",
    # Optax on the state of another of its own transformations.
    "Make sure you have called init first!",
)


def is_documented(error: Exception | None, names: list[str]) -> bool:
    """Whether an error is of this package and names what is wrong."""
    if error is None:
        return False
    text = str(error)
    if any(words in text for words in OF_OTHERS):
        return True
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    is_named = any(f"`{name}" in text for name in names)
    return (
        isinstance(error, (TypeError, ValueError, IndexError, FileNotFoundError))
        and where.startswith(str(PACKAGE))
        and (is_named or "There is no file or folder" in text)
    )


TRIED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _print_what_was_tried():
    yield
    total = sum(TRIED.values())
    print(f"\n{total} calls of {len(NAMES)} names:")
    print(", ".join(f"{name} {n}" for name, n in TRIED.items()))


def test_every_public_function_has_a_right_call():
    needed = {
        name
        for name, value in NAMES.items()
        for p in inspect.signature(value).parameters.values()
        if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    }
    assert needed <= CALLS.keys()
    assert CALLS.keys() <= NAMES.keys()
    known = {f"{name}.{x}" for name in NAMES for x in arguments(name)}
    known |= {x.rpartition(".")[2] for x in known}
    assert RIGHT.keys() | ALSO.keys() <= known


class Attempt:
    """A right call in which one argument has another value."""

    def __init__(self, name: str, argument: str, value: Any):
        TRIED[name] += 1
        call = CALLS.get(name, {}) | {argument: value}
        self._made, self.error = error_of(lambda: NAMES[name](**call))

    def use(self) -> Exception | None:
        """Uses what the call made, if it made something, for the error of that."""
        if self.error is None:
            _, self.error = error_of(lambda: use(self._made))
        return self.error


def error_of(call: Any) -> tuple[Any, Exception | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(), None
        except Exception as error:
            return None, error


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_raise_their_documented_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = []
    for argument in arguments(name):
        right = right_for(name, argument)
        names = [argument, ALSO.get(f"{name}.{argument}", argument)]
        is_used = False
        for label, value in WRONG.items():
            is_right = label in right
            if is_right and name.startswith(DEAR):
                continue
            python = Attempt(name, argument, value)
            is_late = python.error is None
            error = python.use()
            if is_right != (error is None) or not (
                error is None or is_documented(error, names)
            ):
                problems.append(f"{argument}={label}: {error!r:.300}")
            # Where no number is right, one number of each kind is enough.
            is_tried = label in ("True", "2.5") or right & NUMBER
            for kind, number in TWINS[label].items() if is_tried else ():
                if kind == "jnp" and f"{name}.{argument}" in NOT_READ:
                    continue
                twin = Attempt(name, argument, number)
                # A use is dear: of the numbers that are right, one of JAX is enough.
                if is_late and not (error is None and (is_used or kind == "np")):
                    is_used |= error is None
                    twin.use()
                if type(twin.error) is not type(error) or not (
                    twin.error is None or is_documented(twin.error, names)
                ):
                    problems.append(
                        f"{argument}={label} of {kind}: {twin.error!r:.300}, where "
                        f"Python's: {error!r:.300}"
                    )
    assert not problems, "\n".join(problems)


# States of something else ----------------------------------------------------------

OTHER_SHAPES: Any = {"w": jnp.ones(3), "b": jnp.ones(())}
OTHER_TREE: Any = {"w": jnp.ones(2)}
GROUPED = {"max_norms": {"w": 1.0, "b": 1.0}, "labels": str}


def of_threshold(threshold: Any) -> Any:
    return og.clip_by_global_norm(threshold)


def of_rules(*rules: Any) -> Any:
    return og.guard(SGD, skip=rules)


ZSCORE, QUANTILE = og.threshold.zscore(), og.threshold.quantile(0.9)
NORM, SPIKE = og.skip.norm_above(1.0), og.skip.spike()
# A transformation, and a state that it did not make.
STATES: dict[str, tuple[Any, Any]] = {
    "parameters of other shapes": (GUARD, GUARD.init(OTHER_SHAPES)),
    "another tree": (GUARD, GUARD.init(OTHER_TREE)),
    "another optimizer": (og.guard(optax.adam(0.1)), STATE),
    "a tree of scalars": (GUARD, GUARD.init({"w": jnp.ones(()), "b": jnp.ones(())})),
    "leaves of another tree": (
        og.clip_by_leaf_norm(1.0),
        og.clip_by_leaf_norm(1.0).init(OTHER_TREE),
    ),
    "units of other shapes": (
        og.clip_by_unit_norm(ZSCORE),
        og.clip_by_unit_norm(ZSCORE).init({"w": jnp.ones((2, 3)), "b": jnp.ones(())}),
    ),
    "zscore for a number": (of_threshold(1.0), of_threshold(ZSCORE).init(PARAMS)),
    "a number for zscore": (of_threshold(ZSCORE), of_threshold(1.0).init(PARAMS)),
    "quantile for zscore": (of_threshold(ZSCORE), of_threshold(QUANTILE).init(PARAMS)),
    "zscore for quantile": (of_threshold(QUANTILE), of_threshold(ZSCORE).init(PARAMS)),
    "leaves by another threshold": (
        og.clip_by_leaf_norm(QUANTILE),
        og.clip_by_leaf_norm(ZSCORE).init(PARAMS),
    ),
    "no rule": (of_rules(SPIKE), of_rules().init(PARAMS)),
    "a rule too many": (of_rules(), of_rules(NORM, SPIKE).init(PARAMS)),
    "another rule": (
        of_rules(SPIKE),
        of_rules(og.skip.norm_above(ZSCORE)).init(PARAMS),
    ),
    "another window": (of_rules(SPIKE), of_rules(og.skip.spike(window=4)).init(PARAMS)),
    "accumulated of another tree": (
        og.accumulate(GUARD, 2),
        og.accumulate(GUARD, 2).init(OTHER_TREE),
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_state_of_another_configuration_or_tree_is_refused(case):
    tx, state = STATES[case]
    with pytest.raises(
        (TypeError, ValueError), match=r"`(state|updates|inner)`"
    ) as info:
        jax.eval_shape(tx.update, GRADS, state, PARAMS)
    assert traceback.extract_tb(info.tb)[-1].filename.startswith(str(PACKAGE))


@pytest.mark.parametrize(
    "grads",
    [OTHER_TREE, [1.0], {**GRADS, "c": jnp.ones(1)}, None, {"w": None, "b": None}],
    ids=["part", "list", "more", "none", "nones"],
)
def test_gradients_of_another_tree_are_refused(grads):
    message = "`grads` must have the structure of `params`"
    for tx in (GUARD, optax.sgd(0.1)):
        with pytest.raises(ValueError, match=message):
            og.apply_gradients(tx, PARAMS, tx.init(PARAMS), grads=grads)


def test_parameter_that_is_none_takes_no_part_whatever_its_gradient():
    params = {"w": jnp.ones(2), "b": None}
    for tx in (og.guard(optax.sgd(0.1)), optax.sgd(0.1)):
        for grads in ({"w": jnp.ones(2), "b": jnp.ones(3)}, params):
            state = tx.init(params)
            moved: Any = og.apply_gradients(tx, params, state, grads=grads)[0]
            assert moved["b"] is None
            assert (moved["w"] < 1).all()


def test_updates_of_another_tree_are_told_from_a_state_of_another_tree():
    tx: Any = og.guard(optax.adam(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="`updates` of `guard` must have the struct"):
        jax.eval_shape(tx.update, OTHER_TREE, state, PARAMS)
    with pytest.raises(ValueError, match="`state` of `guard` must be that of `inner`"):
        jax.eval_shape(tx.update, OTHER_TREE, state)
    with pytest.raises(ValueError, match="`state` of `guard` must be that of `inner`"):
        jax.eval_shape(tx.update, GRADS, tx.init(OTHER_TREE), PARAMS)
