"""The public face: names of modules, and answers to calls with wrong arguments."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def publish(module: str, states: Sequence[str] = ()) -> None:
    """Gives the public objects of a module its name as their ``__module__``.

    Pickles then name a public path, which stays when a file moves, and tracebacks and
    ``help`` show the path that a user imports. An object that an earlier public module
    has published keeps the name of that one.

    Args:
      module: ``__name__`` of a public module. All in its ``__all__`` is published.
      states: Further names: classes of states, which users meet but never construct.
    """
    namespace = vars(sys.modules[module])
    for name in (*namespace["__all__"], *states):
        value = namespace.get(name)  # A module that is imported on first use is absent.
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if "._" in value.__module__:
            value.__module__ = module


def answers_wrong_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a call that does not fit the signature fail with advice.

    Users of Optax, Keras, Torch and Flax guess the names that these use. A call that
    fits pays for one more Python call and nothing else.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            trace = error.__traceback__
            # An error of the binding has no frame below this one.
            if trace is None or trace.tb_next is not None:
                raise
            raise TypeError(_answer(function, args, kwargs, error)) from None

    return call


def _answer(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    name = function.__qualname__.replace(".<locals>", "")
    parameters = inspect.signature(function).parameters
    known = {
        guess: advice
        for guesses, advice in _WRONG_GUESSES.get(name, {}).items()
        for guess in guesses.split()
    }
    for guess, value, problem in _problems(parameters, args, kwargs):
        if guess in known:
            shown = (
                repr(value) if isinstance(value, bool | int | float | str) else "..."
            )
            advice = known[guess].replace("{}", shown)
            return f"`{function.__name__}` {problem}. {advice}"
    text = str(error).removesuffix(".").replace(".<locals>", "")
    several = {p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL}
    named = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [name for name in named if name not in several]
    for guess in [k for k in kwargs if k not in named]:
        close = difflib.get_close_matches(guess, named, n=1)
        if close and "Did you mean" not in text:
            text += f". Did you mean `{close[0]}`?"
    end = "" if text.endswith("?") else "."
    listed = ", ".join([*(f"`*{n}`" for n in several), *(f"`{n}`" for n in named)])
    return f"{text}{end} The arguments are {listed}."


def _problems(
    parameters: Mapping[str, inspect.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[tuple[str, Any, str]]:
    """Yields a key of the table, the value given and the problem in words."""
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        several = {p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL}
        for guess in [k for k in kwargs if k not in parameters.keys() - several]:
            yield guess, kwargs[guess], f"has no argument `{guess}`"
    positional = [
        p.name
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(args) > len(positional):
        yield "*", args[len(positional)], "got too many arguments without a name"
    given = {*positional[: len(args)], *kwargs}
    for p in parameters.values():
        is_one = p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if is_one and p.default is p.empty and p.name not in given:
            yield p.name, None, f"needs the argument `{p.name}`"


_STEP = "Write `apply_gradients(tx, params, opt_state, grads=grads)`."
_FLAX_STEP = "Write `state.apply_gradients(grads=grads)`."
_FLAX_CREATE = "Write `create(apply_fn=model.apply, params=params, tx=tx)`."
_KEEPS_BEST = (
    "The best parameters are kept if `init` is given parameters: take them with "
    "`stopper.best(state, params)`."
)
_COMPARES = "Write `early_stopping(stop.{0}(...), mode={{}})`."
_NOT_NEEDED = "Leave it out: `explain(state)` says how the run stands."

# For each function the arguments that users of other libraries guess, several in one
# key, and the answer. `{}` is the value given. The name of an argument stands for a
# call without it, `*` for a call with too many arguments without a name.
_WRONG_GUESSES: dict[str, dict[str, str]] = {
    # Clipping and guarding.
    "guard": {
        "max_norm clip_norm max_grad_norm max_delta clipnorm global_clipnorm "
        "gradient_clip_val": "Write `clip={}`: a number is the largest global norm.",
        "clip_value clipvalue max_value": "Write `clip=clip_by_value({})`.",
        "max_consecutive_errors max_skips": "Write `max_consecutive_skips={}`.",
        "should_skip_update_fn skip_rule rules": "Write `skip=skip.spike()`; a "
        "non-finite step is always skipped.",
        "tx optimizer opt inner": "The optimizer comes first: write "
        "`guard(optax.adam(1e-3), clip=1.0)`.",
        "*": "Only the optimizer and `clip` go without a name: write `skip=...`.",
    },
    "apply_gradients": {"* grads": _STEP},
    "accumulate": {
        "every_k_schedule every steps k n accumulation_steps "
        "gradient_accumulation_steps": "Write `every_k={}`.",
        "use_grad_mean": "Leave it out: the step is taken with the mean.",
        "every_k": "Write `accumulate(guard(optimizer), 4)`.",
    },
    "clip_by_global_norm": {
        "max_delta clip_norm max_grad_norm clipnorm global_clipnorm threshold": "Write "
        "`max_norm={}`.",
        "norm_type p": "Write `ord={}`.",
        "error_if_nonfinite": "A clip counts non-finite updates and passes them on; "
        "`guard` skips the step.",
        "*": "A clip is built without gradients: write `clip_by_global_norm(1.0)`, or "
        "`guard(optimizer, clip=1.0)`.",
        "max_norm": "Write `clip_by_global_norm(1.0)`, or `record_norm()` not to clip.",
    },
    "clip_by_value": {
        "max_delta clip_value clipvalue max_norm threshold max": "Write `max_value={}`:"
        " entries stay between `-max_value` and `max_value`.",
        "min": "Write `min_value={}`.",
        "*": "Write `clip_by_value(max_value, min_value=...)`.",
    },
    "clip_by_leaf_norm": {
        "max_delta clip_norm clipnorm threshold": "Write `max_norm={}`.",
    },
    "clip_by_unit_norm": {
        "clipping clip_factor max_norm max_delta threshold": "Write `max_ratio={}`: the"
        " bound is relative to the norm of the parameters.",
    },
    "clip_by_group_norm": {
        "max_norm transforms": "Write `max_norms={'name': 1.0}`: one for each group.",
        "groups param_labels": "Write `labels=...`: the group of each leaf.",
        "labels": "Write `clip_by_group_norm(max_norms, labels)`.",
    },
    "record_norm": {"* max_norm": "It does not clip: write `clip_by_global_norm({})`."},
    "autoclip": {
        "clip_percentile": "Write `percentile={}`.",
        "q quantile": "Write `percentile=100 * {}`.",
    },
    "zclip": {
        "max_grad_norm clip_norm": "Write `max_norm={}`.",
        "sigma z z_threshold threshold": "Write `z_thresh={}`.",
        "decay beta": "Write `alpha={}`: it is the weight of the past.",
        "warmup": "Write `warmup_steps={}`.",
    },
    "adagc": {
        "decay alpha": "Write `beta={}`: it is the weight of the past.",
        "ratio": "Write `lambda_rel={}`.",
        "max_norm": "Write `lambda_abs={}`: it holds during the warm-up.",
        "warmup": "Write `warmup_steps={}`.",
    },
    "norm_above": {
        "threshold max_delta norm clip_norm": "Write `skip.norm_above({})`.",
    },
    "spike": {
        "threshold z_thresh z_score n_sigma num_sigmas": "Write `sigma={}`.",
        "history history_size window_size": "Write `window={}`.",
    },
    "zscore": {
        "z_thresh threshold z": "Write `sigma={}`.",
        "alpha beta": "Write `decay={}`: it is the weight of the past.",
        "warmup_steps": "Write `warmup={}`.",
    },
    "quantile": {
        "percentile": "Write `threshold.quantile({} / 100)`.",
        "warmup_steps": "Write `warmup={}`.",
    },
    "relative_to_mean": {
        "lambda_rel factor": "Write `ratio={}`.",
        "alpha beta": "Write `decay={}`: it is the weight of the past.",
        "warmup_steps": "Write `warmup={}`.",
    },
    # Stopping.
    "early_stopping": {
        "patience n": "Write `early_stopping(stop.patience({}))`.",
        "min_delta baseline": "It is an argument of `stop.patience`: write "
        "`early_stopping(stop.patience(5, min_delta=1e-3))`.",
        "monitor metric": "Write `key={}`, and give `update` a dict.",
        "restore_best_weights": _KEEPS_BEST,
        "start_from_epoch": "Write `warmup={}`.",
        "check_finite": 'Write `nonfinite="stop"` or `nonfinite="wait"`.',
        "stopping_threshold target": "Write `early_stopping(stop.target({}))`.",
        "divergence_threshold": "Write `early_stopping(stop.divergence({}))`.",
        "verbose": _NOT_NEEDED,
        "rule": "Write `early_stopping(stop.patience(5))`.",
        "*": "Options go by name, as `mode='max'`; several rules are combined with "
        "`stop.any_of(...)`.",
    },
    "early_stopping.update": {
        "state": "Write `state = stopper.update(value, state, params)`.",
        "metric loss metrics": "Write `stopper.update({}, state, params)`.",
        "epoch": "Write `step=`, in training steps.",
        "*": "Write `step=`, `seconds=`, `train_value=` or `opt_state=`.",
    },
    "best": {
        "default": "Write `stopper.best(state, params)`: `params` come back if no value"
        " was finite yet.",
    },
    "early_stopping.reset": {"state": "Write `state = stopper.reset(state)`."},
    "patience": {
        "patience epochs evaluations n_iter_no_change": "Write `stop.patience({})`.",
        "tol atol threshold": "Write `min_delta={}`.",
        "rtol": "Write `rel_delta={}`.",
        "monitor": "Write `early_stopping(stop.patience(...), key={})`.",
        "mode": _COMPARES.format("patience"),
        "restore_best_weights": _KEEPS_BEST,
        "*": "Write `stop.patience(n, min_delta={})`.",
    },
    "budget": {
        "*": "Write `stop.budget(evaluations={})`, or `steps=` or `seconds=`.",
        "n epochs max_epochs evals": "Write `stop.budget(evaluations={})`.",
        "max_steps num_steps step": "Write `stop.budget(steps={})`.",
        "time max_time timeout": "Write `stop.budget(seconds=...)`.",
    },
    "plateau": {
        "patience": "Write `stop.plateau({})`.",
        "atol threshold": "Write `min_delta={}`.",
        "rtol": "Write `rel_delta={}`.",
        "mode": _COMPARES.format("plateau"),
        "*": "Only `n` goes without a name: write `factor={}`.",
    },
    "target": {
        "threshold stopping_threshold": "Write `stop.target({})`.",
        "mode": _COMPARES.format("target"),
    },
    "divergence": {
        "value divergence_threshold max_value": "Write `stop.divergence({})`.",
        "mode": _COMPARES.format("divergence"),
    },
    "ema": {
        "alpha": "`decay` is the weight of the past, `1 - alpha`: write "
        "`stop.ema(1 - {})`.",
        "span": "Write `stop.ema(1 - 2 / ({} + 1))`.",
        "momentum beta weight smoothing": "Write `stop.ema({})`.",
    },
    "median": {"n size window window_size kernel_size": "Write `stop.median({})`."},
    "any_of": {"rules": "Write `stop.any_of(*rules)`."},
    "all_of": {"rules": "Write `stop.all_of(*rules)`."},
    "monitor": {
        "metric name": "Write `stop.monitor({}, rule)`.",
        "rule": "Write `stop.monitor('accuracy', stop.patience(5), mode='max')`.",
    },
    "held_for": {"evaluations times": "Write `stop.held_for(rule, {})`."},
    "cooldown": {"evaluations": "Write `stop.cooldown(rule, {})`."},
    "from_keras": {"verbose": _NOT_NEEDED},
    "from_lightning": {
        "verbose strict check_on_train_epoch_end log_rank_zero_only": _NOT_NEEDED,
    },
    # Loops.
    "fit": {
        "epochs num_epochs max_steps steps total_steps": "Write `num_steps=...`, in "
        "training steps.",
        "callbacks logger": "Write `loggers=[...]`; early stopping goes in by "
        "`stopper=`.",
        "early_stopping early_stop": "Write `stopper=...`.",
        "eval_fn evaluate_fn validation_data eval_step": "Write `evaluate=...`.",
        "data dataset train_loader dataloader": "Write `batches=...`.",
        "verbose": "Write `progress={}`.",
        "checkpoint_dir ckpt_dir checkpoint_manager": "Write "
        "`checkpointer=Checkpointer(directory)`.",
    },
    "TrainState.apply_gradients": {"* grads": _FLAX_STEP},
    "TrainState.create": {"* apply_fn params tx": _FLAX_CREATE},
}
