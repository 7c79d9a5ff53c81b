"""Undoing other changes of a skipped step, by the records of guards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_guard._guarding.accumulate_state import AccumulateState
from optax_guard._guarding.state import GuardState
from optax_guard._guarding.step import take_or_keep
from optax_guard._models import arrays_of, with_statics_of
from optax_guard._trees import is_variable, outermost_states
from optax_guard.skip import SkipReason


def keep_if_skipped(opt_state: optax.OptState, new: Any, old: Any) -> Any:
    """Undoes other changes of a step if the guard skipped it.

    Use it for trees outside of ``params`` and ``opt_state`` that the forward pass of a
    bad batch may spoil: batch statistics, moving averages of parameters, a loss scale.
    A guard cannot see these. After one batch with a NaN, the statistics of a batch
    norm are NaN for good, although the parameters are safe.

    Flax' own ``TrainState``, after ``new = state.apply_gradients(grads=grads)``::

        stats = og.keep_if_skipped(new.opt_state, new_stats, state.batch_stats)
        state = new.replace(batch_stats=stats)

    NNX, whose forward pass changes the statistics in place, so that a copy is needed::

        old = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
        ...  # Loss, gradients, `optimizer.update(model, grads, value=loss)`.
        new = nnx.state(model, nnx.BatchStat)
        nnx.update(model, og.keep_if_skipped(optimizer.opt_state, new, old))

    Equinox: ``model_state = og.keep_if_skipped(opt_state, new_state, model_state)``.
    Haiku's state is kept in the same way.

    Args:
      opt_state: Optimizer state after the step, with a guard in it.
      new: A tree of arrays, after the step. Functions and flags in it, as a model of
        Equinox has them, stay.
      old: The same tree before the step.

    Returns:
      ``old``, bit for bit, if the last step was skipped, else ``new``. With several
      guards (as under ``optax.partition``), ``old`` if any of them skipped its step.

    Raises:
      ValueError: If there is no guard in ``opt_state``, if the structures of ``new``
        and ``old`` differ, or if their NNX variables are the same objects.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.sgd(0.1))
      >>> updates, opt_state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.zeros(1)))
      >>> og.keep_if_skipped(opt_state, new=jnp.array([jnp.nan]), old=jnp.array([2.0]))
      Array([2.], dtype=float32)
    """
    reasons = last_reasons(opt_state)
    if not reasons:
        raise ValueError(
            "`opt_state` must hold a `GuardState`, found none. Wrap the optimizer in "
            "`guard`, and pass the state after its update."
        )
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            "`new` and `old` must have the same structure, got "
            f"{jax.tree.structure(new)} and {jax.tree.structure(old)}."
        )
    pairs = zip(
        *(jax.tree.leaves(x, is_leaf=is_variable) for x in (new, old)), strict=True
    )
    if any(x is y and is_variable(x) for x, y in pairs):
        raise ValueError(
            "`old` must be a copy from before the step, but its NNX variables are "
            "those of `new`, which the step has changed in place. Take the copy before "
            "the forward pass: `old = jax.tree.map(jnp.copy, nnx.state(model, "
            "nnx.BatchStat))`."
        )
    whole, (new, old) = new, jax.tree.map(jnp.asarray, arrays_of((new, old)))
    is_taken = functools.reduce(jnp.maximum, reasons) == SkipReason.NONE
    [chosen] = take_or_keep(is_taken, lambda new, old: (new,), new, (old,))
    return with_statics_of(whole, chosen)


def last_reasons(tree: Any) -> list[jax.Array]:
    """The reason of each guard and accumulator for the batch of the last call.

    A guard inside of an accumulation judges only the calls that close a group. After
    other calls its record does not count.
    """
    reasons = []
    for state in outermost_states(
        tree, (AccumulateState, GuardState, optax.MultiStepsState)
    ):
        if isinstance(state, GuardState):
            reasons += [state.skip_reason, *last_reasons(state.wrapped_state)]
        elif isinstance(state, AccumulateState):
            inner = last_reasons(state.guard_state)
            reasons += [state.drop_reason, *_at(state.group_seen == 0, inner)]
        else:
            inner = last_reasons(state.inner_opt_state)
            reasons += _at(jnp.asarray(state.mini_step) == 0, inner)
    return reasons


def _at(is_judged: jax.Array, reasons: list[jax.Array]) -> list[jax.Array]:
    none = jnp.int32(SkipReason.NONE)
    return [jnp.where(is_judged, reason, none) for reason in reasons]
