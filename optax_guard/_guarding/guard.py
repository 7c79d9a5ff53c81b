"""The guard: a bad step changes nothing but the guard's own records."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_state
from optax_guard._guarding.config import checked_config
from optax_guard._guarding.entries import Kept, kept_entries, told_by
from optax_guard._guarding.entry_step import take_entries
from optax_guard._guarding.judging import (
    Judged,
    check_one_loss,
    judge_step,
    recorded,
    with_one_loss,
)
from optax_guard._guarding.masking import hide
from optax_guard._guarding.state import GuardConfig, GuardState, first_state
from optax_guard._guarding.step import StepParts, check_same_tree
from optax_guard._guarding.update_bound import added, bound_updates
from optax_guard._models import params_of
from optax_guard._norms.mesh_axes import unchecked_axes
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import TransformationLike, cached, transformation
from optax_guard._trees import first_difference
from optax_guard.skip import SkipReason, SkipRule
from optax_guard.threshold._base import Threshold


@answers_wrong_calls
def guard(
    inner: TransformationLike,
    clip: ArrayLike
    | optax.Schedule
    | Threshold
    | Mapping[str, Any]
    | optax.GradientTransformationExtraArgs
    | None = None,
    *,
    skip: SkipRule | Sequence[SkipRule] = (),
    mask: Any = True,
    max_update: ArrayLike
    | optax.Schedule
    | Threshold
    | Mapping[str, Any]
    | optax.GradientTransformationExtraArgs
    | None = None,
    max_consecutive_skips: ArrayLike = 10,
    use_cond: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps bad steps away from parameters and from the state of ``inner``.

    A step is bad if its gradients, or the loss given as ``value=``, hold a NaN or an
    infinity, or if a skip rule says so. A bad step is skipped: the updates are zeros,
    and the state of ``inner`` (moments, schedules, counts) stays as it was, bit for
    bit. A good step is clipped and goes to ``inner``. Put the guard outermost, and the
    clip in ``clip``. The guard then reads the gradients once for norm, verdict and all
    statistics.

    The optimizer is not trusted either. Of finite gradients it can make a NaN, by a
    division by zero in float16, by a schedule, by a square that overflows. Where a
    parameter or one of its moments would not be finite after the step, that entry
    keeps its old value and all its moments; the others take the step. So parameters
    and state that are finite stay finite. On GPU (measured) and TPU (compiled) this is
    part of the mask and costs no traffic. On CPU, with more than 131072 gradients, the
    step is computed twice: once to look. If all entries of the smallest leaves (at most
    1/1024 of all entries, or a part of one leaf) kept their old values, the step counts
    as skipped, as ``NONFINITE_UPDATE``, although counts inside ``inner`` advance. If
    some did, ``num_partial`` counts it. If parameters in these leaves were not finite
    before the step, a non-finite step counts as ``NONFINITE_PARAMS``. Gradients whose
    norm after clipping is above 1.8e19 are skipped as ``OVERFLOW``. Without a clip,
    smaller ones are taken, and a gradient of 1e10 already freezes Adam for thousands of
    steps: give a clip. ``analysis.frozen_moments`` finds the leaves that are frozen.

    A non-finite step is never applied. After ``max_consecutive_skips`` of them without
    a step that was taken, the guard sets ``guard_exhausted``, and
    ``raise_if_exhausted`` and stop rules read it. A rule cannot skip finite steps for
    ever: it has a bound of its own on such rows, ``max_consecutive``, after which the
    guard takes the next finite step and starts the rule afresh. So a lasting change of
    scale does not end a run, and is no alarm.

    The guard sees gradients, loss, parameters and optimizer state, and nothing else.
    Batch statistics and averages of parameters need ``keep_if_skipped``, which shows
    two lines for each library, or `optax_guard.flax.TrainState`, which has it inside.

    Args:
      inner: The optimizer, from ``optax.adamw`` to any chain, or any object with its
        ``init`` and ``update``. A clip of Optax belongs into this chain.
      clip: A threshold for the global norm (number, schedule or one of
        ``optax_guard.threshold``), a clip of this library, or ``None`` to only measure.
      skip: One or several rules of ``optax_guard.skip``.
      mask: The leaves that count: a tree of bools (a tree prefix of the parameters), or
        a function that returns one, as for ``optax.masked``. The other leaves are not
        in the norm, are not clipped, and may be NaN in a step that is taken. They
        go to ``inner`` as they are, and entries that become NaN are left alone. Use it
        for frozen parameters, whose gradients would make the norm too large, and for
        leaves whose update replaces the value. `accumulate` does not average these
        leaves.
        ``optax.inject_hyperparams`` mistakes a function for a schedule: pass it
        ``static_args=("inner", "mask")``.
      max_update: A bound on the norm of the update, after the optimizer, as for
        ``clip``. With ``threshold.relative_to_params()`` a learning rate that is
        too high does not destroy the parameters. ``update`` then needs ``params``.
        Entries that the guard keeps do not count in the norm. An update whose norm
        float32 cannot hold is not applied. The norm must be known before anything is
        written: compiled for v5e and H100, a step of float32 has 11.0 and 11.6 passes
        over the parameters instead of 8.0, one of bfloat16 13.0 and 12.0, and the
        updates are a temporary array. An H100 took 1.4 to 2.5 times as long for the
        step of the optimizer, 1.5 % of a whole step of a transformer. A CPU took 3.3
        times AdamW's time instead of 2.5.
      max_consecutive_skips: Non-finite steps that are too many if none was taken in
        between; a whole number of at least 1, may be traced. Steps that a rule skips do
        not count.
      use_cond: If true, TPU and GPU do not compute ``inner`` in a bad step, by a
        ``lax.cond``. By default they compute it and mask the result, which needs no
        branch; on CPU there is always a branch. Use it if ``inner`` does more than read
        and write (Muon, Shampoo) and bad steps are not rare, or if its state is
        offloaded to ``pinned_host`` memory. The cost around AdamW is compiled for v5e
        and H100, and was not run. ``apply_gradients`` has one conditional and no more
        traffic; with offloaded moments, on v5e, it has 24.0 passes over the parameters
        instead of 26.2 (unguarded: 23.0). Moments there are not looked at entry by
        entry. ``update`` has 11.0 passes instead of 8.0 and
        a copy of the parameters. Under ``vmap`` the ``lax.cond`` becomes a mask.

    Returns:
      A transformation whose state is a ``GuardState``. ``value=`` and all other extra
      arguments of ``update`` go on to ``inner`` as they are. ``loss=`` is read as
      ``value=`` is: one real number, of any dtype, of shape () or (1,). Under
      ``jax.shard_map`` and ``jax.pmap``, gradients that are split over devices need a
      clip with ``axis_name`` (to only measure, ``record_norm(axis_name=...)``). Average
      ``value`` by ``jax.lax.pmean``, so that it is the same on all devices. All devices
      then reach one verdict. In ``in_specs`` and ``out_specs`` only the
      ``wrapped_state`` of the state is split, as it is without a guard; all else has
      ``PartitionSpec()``.

    Raises:
      TypeError: If ``inner``, ``clip``, ``skip`` or ``mask`` is none of the above.
      ValueError: If a concrete number is out of range; in ``update``, if ``value`` is
        known to differ between devices that take a step together, or if ``value`` and
        ``loss`` are two objects.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> tx = og.guard(optax.adamw(1e-3), clip=1.0)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> grads = jnp.array([1.0, jnp.nan])
      >>> params, state = og.apply_gradients(tx, params, state, grads=grads)
      >>> params, state.num_skipped.item()
      (Array([1., 1.], dtype=float32), 1)
      >>> tx = og.guard(optax.sgd(1.0), clip=1.0, mask={"lora": True, "base": False})
      >>> grads = {"lora": jnp.array([3.0, 4.0]), "base": jnp.array([100.0])}
      >>> tx.update(grads, tx.init(grads))[1].clip_state.stats.grad_norm.item()
      5.0
    """
    config = checked_config(
        inner,
        clip,
        skip=skip,
        mask=mask,
        max_update=max_update,
        max_consecutive_skips=max_consecutive_skips,
        use_cond=use_cond,
    )

    def init(params: optax.Params) -> GuardState:
        return first_state(config, params, config.inner.init(params))

    @functools.partial(cached, check=functools.partial(check_one_loss, "guard"))
    def update(
        updates: optax.Updates,
        state: GuardState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GuardState]:
        return _update(config, updates, state, params, extra_args)

    @functools.partial(cached, check=functools.partial(check_one_loss, "guard"))
    def apply_gradients(
        params: optax.Params,
        state: GuardState,
        *,
        grads: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Params, GuardState]:
        return _apply_gradients(config, params, state, grads, extra_args)

    step_parts = StepParts(
        apply_gradients,
        wrap_state=functools.partial(first_state, config),
        judge=functools.partial(_judge, config),
        mask=config.mask,
    )
    return transformation(init, update, step_parts)


def _update(
    config: GuardConfig,
    updates: optax.Updates,
    state: GuardState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, GuardState]:
    judged = judge_step(config, updates, state, params, extra_args)

    def take(updates: optax.Updates, inner_state: Any) -> tuple[Any, Any]:
        clipped = config.clip.rescale(updates, judged.measured)
        return _step_inside(config, clipped, inner_state, params, extra_args)

    def find(results: tuple[Any, Any], kept: tuple[Any, ...]) -> Kept:
        new_updates, inner_state = results
        # A bound may yet make the update of a parameter smaller, and looks at the sum.
        if params is None or config.bound is not None:
            return kept_entries(new_updates, inner_state, *kept)
        would_be = jax.tree.map(added, new_updates, params_of(new_updates, params))
        return kept_entries(would_be, inner_state, *kept)

    kept = (state.wrapped_state,)
    new_updates, state = _guarded(
        config, judged, state, params, take, find, updates, kept
    )
    if config.bound is None:
        return new_updates, state
    own = params_of(new_updates, params)
    bounded, bound_state = bound_updates(config, new_updates, own, state)
    return bounded, state._replace(bound_state=bound_state)


def _apply_gradients(
    config: GuardConfig,
    params: optax.Params,
    state: GuardState,
    grads: optax.Updates,
    extra_args: dict[str, Any],
) -> tuple[optax.Params, GuardState]:
    check_state("guard", state, GuardState)
    check_same_tree(params, grads)
    if config.bound is not None:  # Which reads the updates before they are applied.
        updates, state = _update(config, grads, state, params, extra_args)
        is_taken = state.skip_reason == SkipReason.NONE
        new = optax.apply_updates(params, updates)
        return optax.tree.where(is_taken, new, params), state
    judged = judge_step(config, grads, state, params, extra_args)

    def take(grads: Any, params: Any, inner_state: Any) -> tuple[Any, Any]:
        clipped = config.clip.rescale(grads, judged.measured)
        updates, inner_state = _step_inside(
            config, clipped, inner_state, params, extra_args
        )
        return optax.apply_updates(params, updates), inner_state

    def find(results: tuple[Any, Any], kept: tuple[Any, ...]) -> Kept:
        return kept_entries(*results, kept[-1])

    kept = (params, state.wrapped_state)
    return _guarded(config, judged, state, params, take, find, grads, kept)


def _guarded(
    config: GuardConfig,
    judged: Judged,
    state: GuardState,
    params: optax.Params | None,
    take: Callable[..., tuple[Any, Any]],
    find: Callable[..., Kept],
    grads: optax.Updates,
    kept: tuple[Any, ...],
) -> tuple[Any, GuardState]:
    norm = judged.measured.norm.value
    counted, old = grads, params_of(grads, params)
    if config.mask is not True:
        counted = hide(config.mask, grads)
        old = None if old is None else hide(config.mask, old)
    unchecked = unchecked_axes(counted, config.clip.axis_name)
    (first, inner_state), told = take_entries(
        judged.reason == SkipReason.NONE,
        take,
        find,
        lambda found: told_by(found, old, norm, unchecked),
        grads,
        kept,
        # Without a clip, `inner` may read the gradients in the same pass as the guard.
        # It could not if it had to wait for the verdict.
        hides_bad=config.is_clipping,
        use_cond=config.use_cond,
    )
    records = recorded(config, judged, state, told)
    return first, records._replace(wrapped_state=inner_state)


def _judge(
    config: GuardConfig,
    updates: optax.Updates,
    state: GuardState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
    is_usable: jax.Array | None = None,
) -> GuardState:
    """The records of a step that is not taken by this guard."""
    judged = judge_step(config, updates, state, params, extra_args, is_usable)
    return recorded(config, judged, state)


def _step_inside(
    config: GuardConfig,
    updates: optax.Updates,
    inner_state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """A step of the optimizer; its errors say whether its state fits."""
    try:
        passed_on = with_one_loss(extra_args)
        return config.inner.update(updates, inner_state, params, **passed_on)
    except (AttributeError, TypeError, ValueError) as error:
        # Checked only after a failure, because it takes time to trace `init`.
        like = updates if params is None else params_of(updates, params)
        if jax.tree.structure(updates) != jax.tree.structure(like):
            raise ValueError(
                "`updates` of `guard` must have the structure of `params`, "
                f"{jax.tree.structure(like)}, got {jax.tree.structure(updates)}."
            ) from error
        whole = params if isinstance(params, optax.LookaheadParams) else like
        fitting = jax.eval_shape(config.inner.init, whole)
        if difference := first_difference(inner_state, fitting):
            raise ValueError(
                "`state` of `guard` must be that of `inner` for these parameters: "
                f"{difference}."
            ) from error
        raise
