"""The answers to wrong guesses of arguments: one table for all public functions."""

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
WRONG_GUESSES: dict[str, dict[str, str]] = {
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
        "max_consecutive_skips max_skips": "Write `max_consecutive={}`.",
        "threshold max_delta norm clip_norm": "Write `skip.norm_above({})`.",
    },
    "spike": {
        "threshold z_thresh z_score n_sigma num_sigmas": "Write `sigma={}`.",
        "history history_size window_size": "Write `window={}`.",
        "max_consecutive_skips max_skips": "Write `max_consecutive={}`.",
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
    "average": {
        "default": "Write `stopper.average(state, params)`: `params` come back if no "
        "evaluation has entered the mean yet.",
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
        "callbacks logger history": "Write `loggers=[...]`; early stopping goes in by "
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
