"""The origin of what made a guard skip a step."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optax_guard import _guarding
from optax_guard._trees import is_inexact
from optax_guard.debug._bodies import open_devices, to_outside
from optax_guard.debug._entries import Entry
from optax_guard.debug._execution import Devices, run
from optax_guard.debug._find import Traced, as_origin, choose, origin_among, trace
from optax_guard.debug._origin import NonfiniteOrigin
from optax_guard.debug._program import Program, Step, flatten
from optax_guard.debug._source import frames_of
from optax_guard.debug._walk import walk_back

_GUARD = f"{Path(_guarding.__path__[0])}/"


def explain_step(
    train_step_or_loss: Callable[[Any, Any], Any], state: Any, batch: Any
) -> NonfiniteOrigin | None:
    """Finds the operation that made a training step non-finite, and its source line.

    A guard's own results are finite, so the gradients and the loss are examined as they
    enter the guard. Without a guard, all results are. If the first result is a scalar,
    as that of a loss, so is its gradient with respect to ``state``.

    Args:
      train_step_or_loss: ``train_step(state, batch)`` or ``loss(params, batch)``. It is
        traced, so its side effects on Python objects happen once more.
      state: Its first argument: parameters, a ``TrainState``, a module of Equinox or
        NNX. It does not change.
      batch: The batch that was bad.

    Returns:
      The origin, as of `find_nonfinite`; ``None`` if all is finite.

    Raises:
      TypeError: If ``train_step_or_loss`` is no function.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> def train_step(state, x):
      ...     params, opt_state = state
      ...     loss, grads = jax.value_and_grad(lambda p: p * jnp.log(x))(params)
      ...     return og.apply_gradients(tx, params, opt_state, grads=grads), loss
      >>> state = jnp.ones(()), tx.init(jnp.ones(()))
      >>> origin = og.debug.explain_step(train_step, state, jnp.float32(-1.0))
      >>> origin.kind, origin.primitive
      ('nan', 'log')
    """
    if not callable(train_step_or_loss):
        raise TypeError(
            "`train_step_or_loss` must be a function of state and batch, got "
            f"{train_step_or_loss!r}."
        )
    traced = trace(train_step_or_loss, (state, batch), {})
    program = traced.program
    if targets := _read_by_guard(program, traced.inputs_of("args/1")):
        return origin_among(traced, targets)
    for step in program.steps:
        if step.eqn.primitive.name == "shard_map" and _holds_guard(step):
            return _explain_inside(traced, step)
    origin = origin_among(traced, program.outputs)
    first = traced.first_result
    if origin is not None or first is None or first.shape or not is_inexact(first):
        return origin
    gradient = trace(
        lambda state: train_step_or_loss(state, batch), (state,), {}, of_gradient=True
    )
    return origin_among(gradient, gradient.program.outputs)


def _explain_inside(traced: Traced, step: Step) -> NonfiniteOrigin | None:
    """The origin for a guard in the body of ``shard_map``."""
    program = traced.program
    last = program.steps.index(step)
    values, _ = run(program, Devices(), traced.inputs, set(step.inputs), last)
    inside, body, inputs = open_devices(step, [values[i] for i in step.inputs])
    _, flags = run(body, inside, inputs, (), len(body.steps))
    kind, bad = choose(flags, _read_by_guard(body, ()))
    if not bad:
        return None
    source = walk_back(body, inside, inputs, bad, kind, flags)
    if isinstance(source, Entry):
        outside = to_outside(step, inside, inputs, source)
        targets = {step.inputs[outside.position]: outside.at}
        source = walk_back(program, Devices(), traced.inputs, targets, kind)
    return as_origin(traced, source, kind, min(bad))


def _holds_guard(step: Step) -> bool:
    return _read_by_guard(flatten(step.eqn.params["jaxpr"]), ()) != []


def _read_by_guard(program: Program, also: Sequence[int]) -> list[int]:
    """The values that a guard reads: gradients and loss, and sometimes parameters.

    Inputs of the program do not count unless they are among ``also``: the state of an
    optimizer may hold a legal Inf.
    """
    steps = [step for step in program.steps if _is_of_guard(step)]
    own = {i for step in steps for i in step.outputs}
    own |= {*program.constants, *program.inputs} - {*also}
    return [i for step in steps for i in step.inputs if i not in own]


def _is_of_guard(step: Step) -> bool:
    return any(
        frame.file_name.startswith(_GUARD)
        for eqn in (step.eqn, *step.callers)
        for frame in frames_of(eqn)
    )
