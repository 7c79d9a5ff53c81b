"""Gradient accumulation: the mean of the good micro-batches makes one step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_state
from optax_guard._guarding.accumulate_state import AccumulateState
from optax_guard._guarding.guard import guard
from optax_guard._guarding.judging import (
    check_one_loss,
    checked_loss,
    with_one_loss,
)
from optax_guard._guarding.masking import Mask, hide
from optax_guard._guarding.mean_gradient import (
    as_gradients,
    check_shapes,
    empty_mean,
    mean_loss,
    mean_with,
    weigh,
)
from optax_guard._guarding.state import GuardState
from optax_guard._guarding.step import StepParts, take_or_keep
from optax_guard._models import trained
from optax_guard._norms.statistics import as_float32
from optax_guard._public import answers_wrong_calls
from optax_guard._rows import empty_rows, rows_of
from optax_guard._transformation import (
    TransformationLike,
    cached,
    parts_of,
    transformation,
)
from optax_guard._trees import increment
from optax_guard.skip import SkipReason, is_nonfinite


@answers_wrong_calls
def accumulate(
    inner: TransformationLike,
    every_k: ArrayLike | Callable[[jax.Array], ArrayLike],
) -> optax.GradientTransformationExtraArgs:
    """Makes one step of the mean gradient of every ``every_k`` micro-batches.

    On clean data the result is that of ``optax.MultiSteps``. A micro-batch is dropped
    and counted if its gradients, or its loss given as ``value=``, are not finite; the
    mean is over the others. So a bad micro-batch costs one micro-batch, whereas
    ``MultiSteps`` keeps the NaN in its accumulator for good. If no micro-batch of a
    group is good, the guard skips the step and records the last micro-batch. Put
    ``accumulate`` outermost, around the guard. The norm, the clip, the skip rules and
    their statistics are then those of accumulated steps.

    Micro-batches of different size: give each call the number of its tokens as
    ``weight=``, with the mean per token as loss and gradients. The means of the group
    are then per token. The weights of dropped micro-batches do not count. A micro-batch
    without ``weight=`` has the weight 1; one of weight 0 adds nothing, and a group of
    these alone makes no step. A weight that is negative or not finite drops the
    micro-batch.

    The last group of an epoch may be smaller, if ``every_k`` is a function. With 10
    micro-batches in an epoch, ``lambda groups: jnp.where(groups % 3 == 2, 2, 4)`` makes
    groups of 4, 4 and 2. Dropped micro-batches count for the size of a group, so groups
    and epochs stay together. With a number, what an epoch leaves over joins the first
    group of the next.

    A micro-batch that closes no group gives zeros as updates; ``apply_gradients`` does
    not touch the parameters. The gradients are read once to judge them and once to add
    them, by a branch on every platform. The accumulator is the only new array as large
    as the parameters. Leaves that do not count by the guard's ``mask`` have none, so
    frozen parameters cost no memory; ``inner`` gets their gradients of the last
    micro-batch.

    Args:
      inner: A ``guard``, or any optimizer. An optimizer is put into ``guard(inner)``,
        which only skips.
      every_k: Micro-batches that make a step; a whole number of at least 1, may be
        traced, or a function of the number of groups closed so far, as in
        ``MultiSteps``.

    Returns:
      A transformation whose state is an ``AccumulateState``. ``inner`` is given the
      mean in the wider of the dtypes of gradient and parameter, the mean of the good
      micro-batches' losses as ``value=``, if each call has it, and all other extra
      arguments of the call that closes the group, but ``weight``.

    Raises:
      TypeError: If ``inner`` is no transformation.
      ValueError: If ``every_k`` is concrete and no whole number of at least 1; in
        ``update``, if gradients do not have the shapes of the parameters, as gradients
        per example (``optax.contrib.dpsgd``) do not.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.accumulate(og.guard(optax.sgd(1.0), clip=1.0), every_k=3)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for grad, tokens in [(0.25, 30), (jnp.nan, 50), (0.75, 10)]:
      ...     grads = jnp.array([grad, 0.0])
      ...     params, state = og.apply_gradients(
      ...         tx, params, state, grads=grads, weight=tokens
      ...     )
      >>> params, og.metrics(state)["num_dropped"].item()
      (Array([-0.375,  0.   ], dtype=float32), 1)
    """
    around: Any = inner if _is_guard(inner) else guard(inner)
    parts: Any = parts_of(around, StepParts)
    if not callable(every_k):
        check_count("every_k", every_k)
    config = _Config(around, parts.apply_gradients, parts.judge, parts.mask, every_k)

    def init(params: optax.Params) -> AccumulateState:
        return _first_state(config, params, config.guard.init(params))

    def wrap_state(params: optax.Params, inner_state: Any) -> AccumulateState:
        return _first_state(config, params, parts.wrap_state(params, inner_state))

    @functools.partial(cached, check=functools.partial(check_one_loss, "accumulate"))
    def update(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        return _update(config, updates, state, params, extra_args)

    @functools.partial(cached, check=functools.partial(check_one_loss, "accumulate"))
    def apply_gradients(
        params: optax.Params,
        state: AccumulateState,
        *,
        grads: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Params, AccumulateState]:
        return _apply_gradients(config, params, state, grads, extra_args)

    return transformation(init, update, StepParts(apply_gradients, wrap_state))


def _is_guard(inner: Any) -> bool:
    is_transformation = isinstance(inner, optax.GradientTransformation)
    parts = parts_of(inner, StepParts) if is_transformation else None
    return parts is not None and parts.judge is not None


class _Config(NamedTuple):
    """The guard of ``accumulate``, three of its parts, and the size of a group."""

    guard: optax.GradientTransformationExtraArgs
    apply_gradients: Callable[..., tuple[optax.Params, GuardState]]
    judge: Callable[..., GuardState]
    mask: Mask
    every_k: ArrayLike | Callable[[jax.Array], ArrayLike]


class _Gathered(NamedTuple):
    """A micro-batch, judged and added.

    Attributes:
      is_step: bool[], whether a step is to be taken now.
      state: The new state; the guard has not taken the step.
      extra_args: Extra arguments for the guard.
    """

    is_step: jax.Array
    state: AccumulateState
    extra_args: dict[str, Any]


def _first_state(
    config: _Config, params: optax.Params, guard_state: Any
) -> AccumulateState:
    return AccumulateState(
        **empty_rows(AccumulateState),
        grad_mean=jax.tree.map(empty_mean, _counted(config, trained(params))),
        guard_state=guard_state,
    )


def _counted(config: _Config, tree: Any) -> Any:
    return tree if config.mask is True else hide(config.mask, tree)


def _gather(
    config: _Config,
    updates: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> _Gathered:
    check_state("accumulate", state, AccumulateState)
    counted = _counted(config, updates)
    check_shapes(counted, state.grad_mean)
    before = state.group_weight, state.group_weight_rest
    weight = weigh(before, extra_args.get("weight"))
    extra_args = {k: v for k, v in extra_args.items() if k != "weight"}
    judged: GuardState = config.judge(
        updates, state.guard_state, params, extra_args, weight.is_usable
    )
    is_dropped = is_nonfinite(judged.skip_reason)
    is_added = ~is_dropped & weight.counts
    kept = state.group_kept + jnp.where(is_dropped, 0, 1)
    words = state.value_mean, state.value_mean_rest
    if (value := checked_loss(extra_args)) is not None:
        words = mean_loss(words, as_float32(value), weight.num, is_added)
        extra_args = with_one_loss(extra_args, words[0])
    k = config.every_k(state.num_groups) if callable(config.every_k) else config.every_k
    seen = state.group_seen + 1
    is_last = seen >= k
    total, rest = (
        jnp.where(is_added, new, old)
        for new, old in zip(weight.total, before, strict=True)
    )
    numbers = {
        "group_seen": jnp.where(is_last, 0, seen),
        "group_kept": jnp.where(is_last, 0, kept),
        "num_groups": increment(state.num_groups, is_last),
        "num_micro_batches": increment(state.num_micro_batches),
        "num_dropped": increment(state.num_dropped, is_dropped),
        "drop_reason": jnp.where(is_dropped, judged.skip_reason, SkipReason.NONE),
        "value_mean": words[0],
        "value_mean_rest": words[1],
        "group_weight": jnp.where(is_last, 0.0, total),
        "group_weight_rest": jnp.where(is_last, 0.0, rest),
    }
    new = AccumulateState(
        **rows_of(AccumulateState, numbers),
        grad_mean=mean_with(counted, state.grad_mean, weight.num, is_added),
        guard_state=_records_of(is_last & (kept == 0), judged, state.guard_state),
    )
    return _Gathered(is_last & (total > 0), new, extra_args)


def _records_of(
    is_lost: jax.Array, judged: GuardState, before: GuardState
) -> GuardState:
    """The guard's state before its step, or with the record of a lost group.

    Without a good micro-batch there is no mean. The guard then keeps the record of the
    last micro-batch. Its optimizer's state is neither touched nor chosen between.
    """
    inner_state = before.wrapped_state
    records = optax.tree.where(
        is_lost, judged._replace(wrapped_state=()), before._replace(wrapped_state=())
    )
    return records._replace(wrapped_state=inner_state)


def _update(
    config: _Config,
    updates: optax.Updates,
    state: AccumulateState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, AccumulateState]:
    is_step, state, extra_args = _gather(config, updates, state, params, extra_args)

    def take(grads: Any, guard_state: GuardState) -> tuple[Any, ...]:
        return config.guard.update(grads, guard_state, params, **extra_args)

    new_updates, guard_state = take_or_keep(
        is_step,
        take,
        as_gradients(state.grad_mean, updates, params),
        (state.guard_state,),
        use_cond=True,
    )
    return new_updates, state._replace(guard_state=guard_state)


def _apply_gradients(
    config: _Config,
    params: optax.Params,
    state: AccumulateState,
    grads: optax.Updates,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, AccumulateState]:
    is_step, state, extra_args = _gather(config, grads, state, params, extra_args)

    def take(grads: Any, params: Any, guard_state: GuardState) -> tuple[Any, ...]:
        return config.apply_gradients(params, guard_state, grads=grads, **extra_args)

    new_params, guard_state = take_or_keep(
        is_step,
        take,
        as_gradients(state.grad_mean, grads, params),
        (params, state.guard_state),
        use_cond=True,
    )
    return new_params, state._replace(guard_state=guard_state)
