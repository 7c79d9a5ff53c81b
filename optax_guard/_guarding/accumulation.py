"""Gradient accumulation: the mean of the good micro-batches makes one step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_part, check_state
from optax_guard._guarding.guard import GuardState, guard
from optax_guard._guarding.step import cast_like, take_or_keep
from optax_guard._norms.statistics import as_float32
from optax_guard._norms.tree_norm import accumulator_dtype
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import cached, part_of, transformation
from optax_guard._trees import increment, is_inexact, select
from optax_guard.skip import SkipReason, is_nonfinite


class AccumulateState(NamedTuple):
    """State of ``accumulate``. A group is the micro-batches that make one step.

    Attributes:
      group_seen: int32[], micro-batches of the group at hand so far; 0 after ``init``
        and after a call that closed a group.
      group_kept: int32[], how many of them were good; 0 after ``init``.
      num_groups: int32[], groups closed; 0 after ``init``.
      num_micro_batches: int32[], micro-batches in all; 0 after ``init``.
      num_dropped: int32[], how many of them were dropped; 0 after ``init``.
      drop_reason: int32[], a ``SkipReason`` for the last micro-batch: 0 if it was kept.
      value_mean: float32[], mean loss of the good ones of the group at hand, or, if it
        has none yet, of the group before; 0 after ``init``.
      grad_mean: Their mean gradient, float32 (float64 for doubles, complex64 for
        complex) and shaped like the parameters; zeros after ``init``.
      guard_state: State of the guard that takes the steps, a ``GuardState``.
    """

    group_seen: jax.Array
    group_kept: jax.Array
    num_groups: jax.Array
    num_micro_batches: jax.Array
    num_dropped: jax.Array
    drop_reason: jax.Array
    value_mean: jax.Array
    grad_mean: Any
    guard_state: GuardState


@answers_wrong_calls
def accumulate(
    inner: optax.GradientTransformation,
    every_k: ArrayLike | Callable[[jax.Array], ArrayLike],
) -> optax.GradientTransformationExtraArgs:
    """Makes one step of the mean gradient of every ``every_k`` micro-batches.

    What ``optax.MultiSteps`` does, and on clean data with the same result, except that
    a micro-batch whose gradients, or whose loss given as ``value=``, are not finite is
    dropped and counted, and the mean is over the others. So one of them costs one
    micro-batch, where ``MultiSteps`` keeps the NaN in its accumulator for good. A group
    without a good micro-batch is a step that the guard skips, on the record of its
    last micro-batch. Put ``accumulate`` outermost, around the guard: norm, clip, skip
    rules and their statistics are then those of accumulated steps.

    A micro-batch that closes no group gives zeros as updates; by ``apply_gradients`` it
    leaves the parameters out. It is read once to be judged and once to be added, by a
    branch on every platform; the only new array as large as the parameters is the
    accumulator.

    Args:
      inner: A ``guard``, or any optimizer, which is then put into one that only
        skips: ``guard(inner)``.
      every_k: Micro-batches that make a step; a whole number of at least 1, may be
        traced, or a function of the number of groups closed so far, as in
        ``MultiSteps``.

    Returns:
      A transformation whose state is an ``AccumulateState``. ``inner`` is given the
      mean in the wider of the dtypes of gradient and parameter, the mean of the good
      micro-batches' losses as ``value=``, if each call has it, and all other extra
      arguments of the call that closes the group.

    Raises:
      TypeError: If ``inner`` is no transformation.
      ValueError: If ``every_k`` is a Python number and no whole number of at least 1.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.accumulate(og.guard(optax.sgd(1.0), clip=1.0), every_k=3)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for grad in [0.25, jnp.nan, 0.75]:
      ...     grads = jnp.array([grad, 0.0])
      ...     params, state = og.apply_gradients(tx, params, state, grads=grads)
      >>> params, og.metrics(state)["num_dropped"].item()
      (Array([-0.5,  0. ], dtype=float32), 1)
    """
    is_guard = isinstance(inner, optax.GradientTransformation) and part_of(
        inner, "judge"
    )
    inner = optax.with_extra_args_support(inner if is_guard else guard(inner))
    judge, take_step, wrap_inner = (
        getattr(inner.update, name)
        for name in ("judge", "apply_gradients", "wrap_state")
    )
    if not callable(every_k):
        check_count("every_k", every_k)

    def around(params: optax.Params, guard_state: Any) -> AccumulateState:
        return AccumulateState(
            group_seen=jnp.zeros((), jnp.int32),
            group_kept=jnp.zeros((), jnp.int32),
            num_groups=jnp.zeros((), jnp.int32),
            num_micro_batches=jnp.zeros((), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            drop_reason=jnp.zeros((), jnp.int32),
            value_mean=jnp.zeros((), jnp.float32),
            grad_mean=jax.tree.map(_accumulator, params),
            guard_state=guard_state,
        )

    def init(params: optax.Params) -> AccumulateState:
        return around(params, inner.init(params))

    def wrap_state(params: optax.Params, inner_state: Any) -> AccumulateState:
        return around(params, wrap_inner(params, inner_state))

    def gather(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[jax.Array, AccumulateState, dict[str, Any]]:
        """Judges a micro-batch and adds it; whether a step is to be taken now."""
        check_state("accumulate", state, AccumulateState)
        check_part(
            "accumulate",
            "parameters",
            state.grad_mean,
            lambda: jax.tree.map(_accumulator, updates),
        )
        judged: GuardState = judge(updates, state.guard_state, params, extra_args)[1]
        is_dropped = is_nonfinite(judged.skip_reason)
        kept = state.group_kept + jnp.where(is_dropped, 0, 1)
        value_mean = state.value_mean
        if (value := extra_args.get("value")) is not None:
            value = as_float32(jnp.asarray(value))
            value_mean = _running_mean(value_mean, value, kept, is_dropped)
            extra_args = extra_args | {"value": value_mean}
        k = every_k(state.num_groups) if callable(every_k) else every_k
        seen = state.group_seen + 1
        is_last = seen >= k
        # Without a good micro-batch there is no mean: the guard records what it has
        # just judged. Its optimizer's state is not touched, nor chosen between.
        is_lost = is_last & (kept == 0)
        records = select(
            is_lost,
            judged._replace(wrapped_state=()),
            state.guard_state._replace(wrapped_state=()),
        )
        return (
            is_last & (kept > 0),
            AccumulateState(
                group_seen=jnp.where(is_last, 0, seen),
                group_kept=jnp.where(is_last, 0, kept),
                num_groups=increment(state.num_groups, is_last),
                num_micro_batches=increment(state.num_micro_batches, True),
                num_dropped=increment(state.num_dropped, is_dropped),
                drop_reason=jnp.where(
                    is_dropped, judged.skip_reason, jnp.int32(SkipReason.NONE)
                ),
                value_mean=value_mean,
                grad_mean=jax.tree.map(
                    lambda g, mean: (
                        _running_mean(mean, g.astype(mean.dtype), kept, is_dropped)
                        if is_inexact(g)
                        else mean
                    ),
                    updates,
                    state.grad_mean,
                ),
                guard_state=records._replace(
                    wrapped_state=state.guard_state.wrapped_state
                ),
            ),
            extra_args,
        )

    @cached
    def update(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        is_taken, state, extra_args = gather(updates, state, params, extra_args)

        def take(grads: Any, guard_state: GuardState) -> tuple[Any, Any]:
            return inner.update(grads, guard_state, params, **extra_args)

        def keep(like: Any, grads: Any, guard_state: GuardState) -> Any:
            del grads
            zeros = jax.tree.map(jnp.zeros_like, like[0])
            return zeros, cast_like(guard_state, like[1])

        new_updates, guard_state = take_or_keep(
            is_taken,
            take,
            keep,
            _as_gradients(state.grad_mean, updates, params),
            state.guard_state,
            use_cond=True,
        )
        return new_updates, state._replace(guard_state=guard_state)

    @cached
    def apply_gradients(
        params: optax.Params,
        state: AccumulateState,
        *,
        grads: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Params, AccumulateState]:
        is_taken, state, extra_args = gather(grads, state, params, extra_args)

        def take(grads: Any, params: Any, guard_state: GuardState) -> tuple[Any, Any]:
            return take_step(params, guard_state, grads=grads, **extra_args)

        def keep(like: Any, grads: Any, params: Any, guard_state: GuardState) -> Any:
            del grads
            return cast_like((params, guard_state), like)

        new_params, guard_state = take_or_keep(
            is_taken,
            take,
            keep,
            _as_gradients(state.grad_mean, grads, params),
            params,
            state.guard_state,
            use_cond=True,
        )
        return new_params, state._replace(guard_state=guard_state)

    return transformation(
        init, update, apply_gradients=apply_gradients, wrap_state=wrap_state
    )


def _accumulator(leaf: Any) -> Any:
    """Zeros, shaped and sharded like a parameter; a hole where there is no mean."""
    if not is_inexact(leaf):
        return optax.MaskedNode()
    dtype = leaf.dtype if jnp.iscomplexobj(leaf) else accumulator_dtype([leaf])
    return jnp.zeros_like(leaf, dtype=dtype)


def _running_mean(
    mean: jax.Array, new: jax.Array, num: jax.Array, is_dropped: jax.Array
) -> jax.Array:
    """The mean of ``num`` values with ``new``; the first replaces what was there."""
    weight = jnp.maximum(num, 1).astype(mean.dtype)
    moved = jnp.where(num <= 1, new, mean + (new - mean) / weight)
    return jnp.where(is_dropped, mean, moved)


def _as_gradients(mean: Any, grads: Any, params: Any) -> Any:
    """The mean as gradients; what has none is that of the last micro-batch."""

    def leaf(g: Any, mean: Any, param: Any) -> Any:
        if not is_inexact(g):
            return g
        return mean.astype(jnp.promote_types(g.dtype, param.dtype))

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(leaf, grads, mean, grads if params is None else params)
