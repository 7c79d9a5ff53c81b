"""The host loop: evaluation, early stopping and logs, without a stall."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import optax

from optax_guard._checks import static_count
from optax_guard._public import answers_wrong_calls
from optax_guard._records.progress import Progress
from optax_guard._records.writers import Logger
from optax_guard.loops._audit import open_audit
from optax_guard.loops._begin import items_of_baseline, open_run
from optax_guard.loops._checkpoint import Checkpointer, check_checkpointer
from optax_guard.loops._ema import with_ema
from optax_guard.loops._evaluation import Evaluation, compiled_judge
from optax_guard.loops._host_result import result_of
from optax_guard.loops._host_run import (
    HostRun,
    Plan,
    ending_after_evaluation,
    ending_after_steps,
    evaluate_run,
    train_interval,
)
from optax_guard.loops._inputs import check_arguments, check_host_functions
from optax_guard.loops._interval import compiled_step
from optax_guard.loops._ranges import as_ranges, without
from optax_guard.loops._result import FitResult
from optax_guard.loops._rewind import Rewind, check_rewind
from optax_guard.loops._skip_origins import check_on_skip
from optax_guard.loops._source import Source
from optax_guard.stop._state import EarlyStopping


@answers_wrong_calls
def fit(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[int], Any] | Iterable[Any],
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[Any], Any] | None = None,
    stopper: EarlyStopping | None = None,
    loggers: Sequence[Logger] = (),
    progress: bool | Progress = False,
    checkpointer: Checkpointer | None = None,
    rewind: Rewind | None = None,
    learning_rate: optax.Schedule | None = None,
    on_skip: Literal["explain"] | None = None,
    audit_every: int | None = None,
    ema: float | None = None,
    baseline: float | None = None,
) -> FitResult:
    """Trains on the host's loop, with evaluation, early stopping and logging.

    There is an evaluation at every multiple of ``eval_every`` and one at the end. The
    parameters are evaluated, the stopper is updated with them, and the loop goes on.

    The device never waits for the host. The results of an evaluation, the stop flag
    included, are read after the next ``eval_every`` steps have been dispatched. So an
    early stop comes up to one interval late, but always at the same step, and the
    stopper keeps the parameters of the best evaluation. An exhausted guard is noticed
    at the same time.

    On a CPU a dispatch takes longer than a small step. If the state has at most 512
    KiB, up to 32 steps are dispatched together, with at most 256 KiB of batches. These
    are arrays of NumPy or on the device; numbers of Python are not grouped. A group
    ends at each evaluation, where the shape changes, and when its first batch has
    waited for a millisecond. No number depends on this, because one program runs groups
    of all sizes. A step with callbacks or prints is dispatched alone. Do not donate or
    delete a batch on the device before the next evaluation.

    A program lives as long as the functions that it is compiled for, and so does what
    they close over. A further call with the same ``train_step`` and stopper compiles
    nothing: it takes 10 to 25 ms of processor beyond its steps. Functions made for each
    call are compiled at each call, as in a loop by hand: 0.3 s for SGD, 2.3 s for a
    guarded Adam, 0.5 s for a stopper (``benchmarks/loop_cost.py --calls``).

    With a checkpointer, the device waits at each evaluation until it is read and saved.
    The best parameters are then only on disk, and the run stops at the evaluation that
    says so. If the directory holds a checkpoint, the run resumes
    from it: rows, stop and best are bit for bit those of a run without a break. If that
    run had stopped, or had reached ``num_steps``, `fit` returns its result at once.

    The first Ctrl-C ends the run after the current step, and `fit` returns the result
    so far. The second raises ``KeyboardInterrupt``. Schedulers send SIGTERM before they
    take the machine away. With a checkpointer the run then ends at the next evaluation,
    after the save. Without one it ends an interval after that evaluation. If the user
    has set a handler for one of these signals, it stays in force. If an exception is
    raised, the loggers have received every row before it.

    On several processes, all call `fit` with the same arguments, and it returns the
    same on all. ``batches`` must return global arrays; each process needs only its own
    part of them. ``evaluate`` must return the value for all data. Loggers and display
    are called on process 0 only. At each evaluation the processes agree on the clock
    and on SIGTERM, in one collective of two numbers a device. So all end at the same
    evaluation, whichever process got the signal. With several processes, a rule that
    needs the time makes the host wait for the device, and Ctrl-C raises
    ``KeyboardInterrupt`` at once. If a process dies, `jax.distributed.initialize`
    decides about the others, by its ``heartbeat_timeout_seconds``.

    Args:
      state: A `TrainState` of Flax or of this library, or any tree with ``step``,
        ``params`` and ``opt_state``, as a NamedTuple or a module of Equinox; functions
        and flags in it are constants. Or a tuple, NamedTuple or dict of objects of NNX:
        one model, its `nnx.Optimizer`, and if wanted metrics, generators and averages.
        It is copied, not donated.
      train_step: ``train_step(state, batch) -> (state, metrics)``. ``metrics`` is a
        dict of scalars with ``"loss"`` among them, or the loss alone. The function is
        jitted here, with the state donated, and traced once if batches have one shape.
        With NNX it changes the objects in place, and returns the state that it got. A
        skipped step then leaves all their variables alone, batch statistics and metrics
        included, but for the generators and the optimizer's own ``step``.
      batches: A function ``step -> batch``, or an iterable of batches. A resumed run
        continues with the right data if it is a function, or if the iterable or its
        iterator has ``get_state()`` and ``set_state(state)``, as a dataset to iterate
        and a ``DataLoader`` of Grain have (its data source needs a ``__repr__``).
        The state is saved: numbers, texts, bytes, arrays, and lists, tuples and dicts
        of these. With several processes, each saves its own.
      num_steps: Value of ``state.step`` to train to, as in ``range(state.step,
        num_steps)``. An iterable that ends earlier ends the run, with a warning.
      eval_every: Steps between evaluations.
      evaluate: ``evaluate(state) -> scalar or dict of scalars``. It is not jitted here:
        jit it, or the functions that it calls. Return arrays. A conversion to Python's
        numbers would wait for the device. Numbers of the host become float32:
        200000000 and 200000001 are then the same.
      stopper: An `early_stopping`. It gets the value, the parameters, the steps, the
        mean training loss since the evaluation before, the optimizer's state and the
        seconds on the host's clock. If its rule holds a `stop.plateau`, the factor is
        written into the optimizer's state.
      loggers: Functions ``(step, row)``; writers of tensorboardX (`optax-guard[log]`),
        PyTorch or CLU; runs of W&B or trackio, which get each kind of finding as an
        alert, too; the module ``mlflow``; backends of metrax. All but functions get
        names in groups such as ``grad/norm``, and stay open. A resumed run does not
        repeat earlier rows and alerts.
      progress: Whether to show a progress bar, a table, and each finding of
        `optax_guard.analysis.diagnose` when it first holds; or the user's own display.
      checkpointer: A `Checkpointer`, to save, and to resume from its checkpoint.
        Optimizer, rule and functions are not saved: pass them again.
      rewind: A `Rewind`, to return to the best checkpoint if the run goes bad.
      learning_rate: The schedule of the optimizer, only to record it. It is not needed
        with ``optax.inject_hyperparams``, whose state holds the rate.
      on_skip: ``"explain"`` to find the operation that made a step non-finite. When an
        evaluation counts new skips, the batch of the first one is drawn again, and
        `optax_guard.debug.explain_step` looks at it with the parameters at hand. The
        origin is printed and kept in ``origins``, at most five in a run. Without skips
        this costs nothing. ``batches`` must be a function, each step must be an update,
        and the run must have one process.
      audit_every: Steps from one audit for silent data corruption to the next; ``None``
        for no audits. An audited step is taken twice, from copies of the state, and its
        results, loss and gradient norm included, are compared to the bit. If they
        differ, two more trials decide: one result that differs from three is an error,
        before anything is saved; otherwise the step is not deterministic, a warning
        says so, and there are no more audits. An audit needs the memory of one more
        state and the time of a step, and the host waits for it. It does not find a
        device that makes the same mistake each time. Callbacks of the step are called
        again.
      ema: Decay of a moving average of the parameters, as 0.999; the average is that of
        `optax.ema`, without bias. Steps that are skipped, or only accumulate, leave it
        alone. `evaluate` gets the state with the average for its parameters, and the
        stopper and the checkpoints keep the best average. It is held in float32 if
        parameters are of half precision: one more copy of them.
      baseline: The validation loss of a guess without learning, such as the entropy of
        the classes. `diagnose` compares the losses of the run with it; without it, with
        the evaluation before the first step.

    Returns:
      A `FitResult`. A row of the history has these items, as Python numbers:

      * ``step``: steps done;
      * ``train_loss`` and other ``train_*``: means of the metrics of ``train_step``,
        over the finite values since the row before; NaN if there were none. Metrics
        with a name that `optax_guard.metrics` uses are left out;
      * ``grad_norm``, ``clipped_norm``, ``clip_threshold``: of the step with the
        largest finite norm since the row before; NaN if no norm was finite;
      * ``grad_norm_mean``: mean norm over the steps with a finite norm;
      * ``update_cosine``, ``entries_clipped``, ``units_clipped``: means over the same
        steps, if the clip measures them;
      * ``clip_rate``, ``nonfinite_rate``, ``skip_rate``: shares of the steps since the
        row before, in [0, 1]; ``num_skipped``: total of the run, without the skips that
        a rewind has undone. With `accumulate` also ``num_dropped``, the micro-batches
        that were dropped, and the rates are shares of accumulated steps;
      * ``learning_rate`` of the last update, if the state or `learning_rate` has it;
      * ``update_ratio``: norm of a step in units of that of the parameters. With
        ``max_update`` of `guard` it is a mean, as above; else it is that of the last
        step before the row, for which `fit` holds one more copy of the parameters, and
        0 if that step was skipped;
      * ``leaf_norm_ratio``, with two matrices or more: of these, the smallest norm of a
        leaf's gradients in units of the largest; the gradients are the optimizer's mean
        of past ones, or the last step if it keeps none;
      * ``initial_value``, in the first row only: the value before the first step, for
        which ``evaluate`` is called once more. Of a dict it is ``val_loss``, else the
        first value with "loss" in its name. The stopper is not told of it;
      * ``baseline``, in the first row only: the argument;
      * ``stop_reason``, in the row at which the stopper stops: its `StopReason`;
      * ``rewinds``, with `rewind`: rewinds so far;
      * ``value``, or the keys of the dict that ``evaluate`` returned.

      Rows hold norms if the optimizer has a clip, `record_norm` or guard of this
      library. They hold skips if it has a guard. If it has several, the first counts.

    Raises:
      ValueError: If an argument is out of range, or a function returns a wrong shape.
      TypeError: If an argument or the result of a function is of the wrong kind.
      GuardExhaustedError: If the guard skipped too many steps in a row, the stopper
        did not stop, and no rewind is left. The message names the last skipped steps.
      RuntimeError: If all checkpoints are damaged, if another run holds their
        directory, or if an audit finds silent data corruption. The message names them.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.flax import TrainState, fit
      >>> tx = og.guard(optax.sgd(0.1), clip=1.0)
      >>> state = TrainState.create(apply_fn=None, params=jnp.array(0.5), tx=tx)
      >>> def train_step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p - x) ** 2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> result = fit(state, train_step, lambda step: 0.0, num_steps=4, eval_every=2)
      >>> [(row["step"], round(row["train_loss"], 4)) for row in result.history]
      [(2, 0.205), (4, 0.084)]
    """
    num_steps = static_count("num_steps", num_steps)
    eval_every = static_count("eval_every", eval_every)
    state = with_ema(state, ema)
    check_arguments(state, evaluate, stopper, loggers)
    check_checkpointer(checkpointer, state)
    check_host_functions(train_step, learning_rate)
    check_on_skip(on_skip, state, batches)
    source = Source(batches)
    if rewind is not None:
        check_rewind(rewind, state, batches, stopper, checkpointer)
    plan = Plan(
        train_step=train_step,
        step=compiled_step(train_step),
        batch_at=_without_skipped(source.at, rewind),
        source=source,
        eval_every=eval_every,
        evaluate=evaluate,
        stopper=stopper,
        rewind=rewind,
        learning_rate=learning_rate,
        evaluation=Evaluation(
            compiled_judge(stopper),
            writes_rewinds=rewind is not None,
        ),
        explains_skips=on_skip is not None,
        audit=open_audit(audit_every),
    )
    with contextlib.ExitStack() as stack:
        run = open_run(
            stack,
            plan,
            state,
            num_steps=num_steps,
            loggers=loggers,
            progress=progress,
            checkpointer=checkpointer,
            first_items=items_of_baseline(baseline),
        )
        _train(run)
        return result_of(run)


def _without_skipped(
    batch_at: Callable[[int], Any], rewind: Rewind | None
) -> Callable[[int], Any]:
    """The batches but for those that a rewind is told to leave out."""
    if rewind is None:
        return batch_at
    return without(batch_at, as_ranges(rewind.skip_steps))


def _train(run: HostRun) -> None:
    while run.ending is None:
        train_interval(run)
        run.ending = ending_after_steps(run)
        if run.ending is None:
            evaluate_run(run)
            run.ending = ending_after_evaluation(run)
