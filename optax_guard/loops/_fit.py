"""The host loop: evaluation, early stopping and logs, without a stall."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optax

from optax_guard._checks import static_count
from optax_guard._public import answers_wrong_calls
from optax_guard._records.progress import Progress
from optax_guard._records.writers import Logger
from optax_guard.loops._begin import open_run
from optax_guard.loops._checkpoint import Checkpointer, check_checkpointer
from optax_guard.loops._evaluation import Evaluation, compiled_judge
from optax_guard.loops._host import open_source
from optax_guard.loops._host_run import (
    Plan,
    ending_after_evaluation,
    ending_after_steps,
    evaluate_run,
    result_of,
    train_interval,
)
from optax_guard.loops._inputs import check_arguments, check_host_functions
from optax_guard.loops._interval import compiled_step
from optax_guard.loops._result import FitResult
from optax_guard.loops._rewind import Rewind, check_rewind
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
) -> FitResult:
    """Trains on the host's loop, with evaluation, early stopping and logging.

    The device never waits for the host: what an evaluation found, the stop flag
    included, is read after the next ``eval_every`` steps have been dispatched. So an
    early stop comes up to one interval late, always at the same step, and the best
    parameters are those of the stopper, which has not moved since. An exhausted guard
    is found out at the same time.

    At an evaluation, in this order: these parameters are evaluated, the stopper is
    updated with them, and the loop goes on. There is one at every multiple of
    ``eval_every`` and one at the end.

    With a checkpointer, the device waits at each evaluation until it is read and what
    is saved has left the device. The best parameters are then on disk and not a second
    time on the device, and a stop comes at its evaluation. If the directory holds a
    checkpoint, the run goes on from there, and becomes bit for bit what it would have
    been: rows, stop and best. If it had stopped, or come to ``num_steps``, `fit`
    returns the same result at once.

    The first Ctrl-C ends the run after the step at hand, and `fit` returns what there
    is; the second raises ``KeyboardInterrupt``. SIGTERM, by which schedulers announce
    that they take the machine away, ends the run at the next evaluation: with a
    checkpointer once that is saved, without one an interval later, as an early stop
    comes. Handlers of one's own for these signals are left in force. Whatever is
    raised, loggers have got every row first.

    On several processes, all call `fit` with the same arguments, and it returns the
    same on all. ``batches`` must return global arrays, of which each process need hold
    only its own part, and ``evaluate`` the value of all data, not that of its part.
    Loggers and display are called on process 0 only. At each evaluation the processes
    agree on the clock and on SIGTERM, in one collective of two numbers a device, so
    that all end at the same one, whichever was told to; a rule that needs the time then
    waits for the device. Ctrl-C raises, and what becomes of the others if a process
    dies is up to `jax.distributed.initialize`, by its ``heartbeat_timeout_seconds``.

    Args:
      state: A `TrainState` of Flax or of this library, or any tree of arrays with
        ``step``, ``params`` and ``opt_state``. It is copied, not donated.
      train_step: ``train_step(state, batch) -> (state, metrics)`` with ``metrics`` a
        dict of scalars, ``"loss"`` among them, or the loss alone. It is jitted here,
        with the state donated, and traced once as long as batches have one shape.
      batches: A function ``step -> batch``, or an iterable of batches. Only the
        function lets a resumed run go on with the right data.
      num_steps: Value of ``state.step`` to train to, as in ``range(state.step,
        num_steps)``. An iterable that ends earlier ends the run, with a warning.
      eval_every: Steps between evaluations.
      evaluate: ``evaluate(state) -> scalar or dict of scalars``. Called as it is: jit
        it, or what it calls, and return arrays without converting them to Python's
        numbers, which would wait for the device.
      stopper: An `early_stopping`. It is told the value, the parameters, the steps,
        the mean training loss since the evaluation before, the optimizer's state and
        the seconds on the host's clock. If its rule holds a `stop.plateau`, its factor
        is written into the optimizer's state.
      loggers: Functions ``(step, row)``, or writers: CLU's, tensorboardX's
        (`optax-guard[log]`) or PyTorch's, which get names in groups such as
        ``grad/norm`` and stay open. Rows of before a resumption are not sent again.
      progress: Whether to show a progress bar and a table, and what
        `optax_guard.analysis.diagnose` finds when it first holds; or a display of one's
        own.
      checkpointer: A `Checkpointer`, to save, and to resume what it finds. The state
        needs ``replace``, as Flax's has, and ``batches`` must be a function to resume.
        Configuration is not saved: optimizer, rule and functions are those given now.
      rewind: A `Rewind`, to go back to the best checkpoint if the run goes bad.
      learning_rate: The schedule that the optimizer was given, to be recorded. Not
        needed with ``optax.inject_hyperparams``, whose state tells the rate.

    Returns:
      A `FitResult`. A row of the history has, as Python numbers:

      * ``step``: steps done;
      * ``train_loss`` and other ``train_*``: means of the metrics of ``train_step``
        over the finite values since the row before, NaN if there were none. Metrics
        with a name that `optax_guard.metrics` uses are left out here;
      * ``grad_norm``, ``clipped_norm``, ``clip_threshold``: of the worst step since the
        row before, the one with the largest finite norm; NaN if there was none; and
        ``grad_norm_mean``, the mean norm over the same steps;
      * ``update_cosine``, ``entries_clipped``, ``units_clipped``, of the clips that
        tell them: means over the same steps;
      * ``clip_rate``, ``nonfinite_rate``, ``skip_rate``: shares of the steps since the
        row before, in [0, 1]; ``num_skipped``: total of the run, of which a rewind
        takes back those since its checkpoint; with `accumulate` also ``num_dropped``,
        the micro-batches left out, and the rates are shares of accumulated steps;
      * ``learning_rate`` of the last update, if the state or `learning_rate` tells it;
      * ``rewinds``, with `rewind`: how often the run had gone back before;
      * ``value``, or the keys of the dict that ``evaluate`` returned.

      Those of norms are there if something of this library measures them, those of
      skips if there is a guard; with several, the first counts.

    Raises:
      ValueError: If an argument is out of range, or a function returns a wrong shape.
      TypeError: If an argument or what a function returns is of the wrong kind.
      GuardExhaustedError: If the guard skipped too many steps in a row, the stopper
        did not stop, and no rewind is left; the message names the last skipped steps.
      RuntimeError: If a checkpoint is damaged; the message says which.

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
    check_arguments(state, evaluate, stopper, loggers)
    check_checkpointer(checkpointer, state)
    check_host_functions(train_step, learning_rate)
    batch_at = open_source(batches)
    if rewind is not None:
        check_rewind(rewind, state, batches, stopper, checkpointer)
    evaluation = Evaluation(
        compiled_judge(stopper),
        keeps_best=checkpointer is None,
        writes_rewinds=rewind is not None,
    )
    plan = Plan(
        train_step=train_step,
        step=compiled_step(train_step),
        batch_at=batch_at,
        eval_every=eval_every,
        evaluate=evaluate,
        stopper=stopper,
        rewind=rewind,
        learning_rate=learning_rate,
        evaluation=evaluation,
    )
    with contextlib.ExitStack() as stack:
        run = open_run(
            stack,
            plan,
            state,
            batches,
            num_steps=num_steps,
            loggers=loggers,
            progress=progress,
            checkpointer=checkpointer,
        )
        while run.ending is None:
            train_interval(run)
            run.ending = ending_after_steps(run)
            if run.ending is None:
                evaluate_run(run)
                run.ending = ending_after_evaluation(run)
        return result_of(run)
