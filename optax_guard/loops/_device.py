"""The loop on the device: steps, evaluation, early stopping, with no host between."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_guard._checks import static_count
from optax_guard._guarding.readout import metrics
from optax_guard._guarding.state import GuardState
from optax_guard._trees import find_states
from optax_guard.loops._compiled import CompiledFor, put_together, taken_apart
from optax_guard.loops._ema import with_ema
from optax_guard.loops._ending import flags_of_guard, is_over
from optax_guard.loops._evaluation import tracked
from optax_guard.loops._inputs import (
    Functions,
    check_arguments,
    check_functions,
    check_steps,
    copied,
)
from optax_guard.loops._interval import with_metrics_in_range
from optax_guard.loops._lane import (
    Lane,
    advance,
    evaluation_of,
    first_lane,
    next_evaluation,
)
from optax_guard.loops._result import FitResult, as_result
from optax_guard.stop._state import EarlyStopping


def train_on_device(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, Any]],
    batches: Callable[[Any], Any],
    *,
    num_steps: int,
    eval_every: int,
    evaluate: Callable[[Any], Any] | None = None,
    stopper: EarlyStopping | None = None,
    ema: float | None = None,
) -> FitResult:
    """Trains in one program on the device, evaluation and early stopping included.

    The arguments, the rows of the history and the order of judgment are those of
    `optax_guard.loops.fit`. The host dispatches once and reads once, so this is for
    steps that take less time than Python needs to dispatch them. There are four
    differences: `fit` alone records the size of the last step and the value before the
    first; all functions are traced, the run ends exactly at the evaluation that
    stops it, and nothing is logged before the end.

    The program is compiled once for the same functions, ``stopper``, ``num_steps``,
    ``eval_every`` and shapes: another seed or another first state does not compile it
    again. Arrays that a function closes over become constants in it, which is slow to
    compile if they are large. Pass these through `jax.tree_util.Partial`, whose arrays
    are arguments.

    Args:
      state: A state as `fit` takes it. It is copied, not donated; the steps work in
        place on the copy.
      train_step: ``train_step(state, batch) -> (state, metrics)`` with ``metrics`` a
        dict of scalars with ``"loss"`` among them, or the loss alone.
      batches: A function ``step -> batch`` of a traced int32[]. It may index arrays on
        the device.
      num_steps: Value of ``state.step`` to train to, as in ``range(state.step,
        num_steps)``.
      eval_every: Steps between evaluations. There is one at every multiple and one at
        the end.
      evaluate: ``evaluate(state) -> scalar or dict of scalars``.
      stopper: An `early_stopping`. It gets the value, the parameters, the steps, the
        mean training loss since the evaluation before and the optimizer's state. A
        better value copies the parameters; any other moves nothing.
      ema: As for `fit`: the decay of an average of the parameters, which is evaluated
        and kept in their place.

    Returns:
      A `FitResult` whose ``state`` is that of the last evaluation.

    Raises:
      ValueError: If an argument is out of range, a function returns a wrong shape, or
        the rule of ``stopper`` needs seconds, which only a host can tell.
      TypeError: If an argument or the result of a function is of the wrong kind.
      GuardExhaustedError: If the guard skipped too many steps in a row and the stopper
        did not stop; the message names the last skipped steps.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from jax.tree_util import Partial
      >>> from optax_guard.flax import TrainState
      >>> from optax_guard.loops import train_on_device
      >>> tx = og.guard(optax.sgd(0.1), clip=1.0)
      >>> state = TrainState.create(apply_fn=None, params=jnp.array(0.5), tx=tx)
      >>> def train_step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p - x) ** 2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> batches = Partial(lambda data, step: data[step % 2], jnp.array([0.0, 0.1]))
      >>> result = train_on_device(state, train_step, batches, num_steps=9,
      ...     eval_every=3, evaluate=lambda state: state.params ** 2,
      ...     stopper=og.early_stopping(og.stop.target(0.05)))
      >>> [(row["step"], round(row["value"], 3)) for row in result.history]
      [(3, 0.074), (6, 0.03)]
    """
    num_steps = static_count("num_steps", num_steps)
    eval_every = static_count("eval_every", eval_every)
    state = with_ema(state, ema)
    check_arguments(state, evaluate, stopper)
    functions = Functions(train_step, batches, evaluate, stopper)
    check_functions(functions)
    step = int(state.step)
    check_steps(step, num_steps)
    run, given = compiled_run(functions)
    lane, best = run(
        copied(state),
        np.int32(step),
        num_steps=num_steps,
        eval_every=eval_every,
        **given,
    )
    flags: dict[str, Any] = {}
    if find_states(lane.state, GuardState):
        flags |= flags_of_guard(metrics(lane.state))
    if lane.stop is not None:
        flags["should_stop"] = lane.stop.should_stop
    is_over(jax.device_get(flags), lane.state)
    return as_result(lane.state, best, lane.stop, lane.rows, lane.num_rows)


def compiled_run(functions: Functions) -> tuple[Any, dict[str, Any]]:
    """The program of a run with these functions, and what it is given of them.

    It does not hold them, and lives as long as they do.
    """
    parts = [taken_apart(function) for function in functions[:3]]
    stopper = functions.stopper
    judges = (None,) * 4
    if stopper is not None:
        judges = stopper.init, stopper.update, stopper.best, stopper.average
    program = _program_for(*(function for function, _ in parts), *judges)
    return program, {
        "arguments": [arguments for _, arguments in parts],
        "needs": None if stopper is None else stopper.needs,
    }


@CompiledFor
def _program_for(*gets: Callable[[], Any]) -> Any:
    def run(
        state: Any,
        begin: jax.Array,
        *,
        arguments: list[Any],
        needs: frozenset[str] | None,
        num_steps: int,
        eval_every: int,
    ) -> tuple[Lane, Any]:
        train_step, batches, evaluate = (
            put_together(get(), bound)
            for get, bound in zip(gets[:3], arguments, strict=True)
        )
        stopper = None
        if needs is not None:
            init, update, best, average = (get() for get in gets[3:])
            # Nothing on the device resets it.
            stopper = EarlyStopping(init, update, best, average, _no_reset, needs)
        functions = Functions(train_step, batches, evaluate, stopper)
        return _run(state, begin, functions, num_steps, eval_every)

    return jax.jit(
        run,
        static_argnames=("needs", "num_steps", "eval_every"),
        donate_argnames="state",
    )


def _no_reset(state: Any, *, keep_best: bool = True) -> Any:
    raise NotImplementedError


def _run(
    state: Any,
    begin: jax.Array,
    functions: Functions,
    num_steps: int,
    eval_every: int,
) -> tuple[Lane, Any]:
    train_step = with_metrics_in_range(functions.train_step)
    functions = functions._replace(train_step=train_step)
    evaluate_lane = evaluation_of(functions)
    stopper = functions.stopper

    def goes_on(carry: tuple[jax.Array, Lane]) -> jax.Array:
        step, lane = carry
        return (step < num_steps) & ~lane.is_over

    def go(carry: tuple[jax.Array, Lane]) -> tuple[jax.Array, Lane]:
        step, lane = carry
        until = next_evaluation(step, num_steps, eval_every)
        return until, advance(functions, evaluate_lane, lane, step, until)

    # Nobody reads the places that stay unfilled. A NaN would trip `jax_debug_nans`.
    lane = first_lane(
        functions, evaluate_lane, state, num_steps, eval_every, unfilled=0.0
    )
    _, lane = jax.lax.while_loop(goes_on, go, (begin, lane))
    best = None
    if stopper is not None and lane.stop is not None:
        best = stopper.best(lane.stop, tracked(lane.state))
    return lane, best
