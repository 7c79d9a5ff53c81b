"""The guard: a bad step changes nothing but the guard's own records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_flag, check_part, check_state
from optax_guard._clipping.global_norm import clip_by_global_norm, record_norm
from optax_guard._clipping.parts import Measurement
from optax_guard._guarding.judging import (
    SkipLog,
    as_rules,
    check_shared,
    checked_loss,
    empty_log,
    is_lost_in_rounding,
    logged,
    verdict,
)
from optax_guard._guarding.masking import counting_only, hide
from optax_guard._guarding.step import cast_like, check_same_tree, take_or_keep
from optax_guard._public import answers_wrong_calls
from optax_guard._transformation import cached, part_of, transformation
from optax_guard._trees import first_difference, increment, select
from optax_guard.skip import SkipReason, SkipRule
from optax_guard.threshold._base import Threshold
from optax_guard.threshold._coerce import as_threshold


class GuardState(NamedTuple):
    """State of ``guard``.

    Attributes:
      num_skipped: int32[], steps skipped; 0 after ``init``.
      skip_streak: int32[], steps skipped in a row up to the last; 0 after ``init``.
      skip_reason: int32[], a ``SkipReason`` for the last step: 0 if it was taken.
      guard_exhausted: bool[], whether the last ``max_consecutive_skips`` steps or more
        were all skipped; False after ``init`` and again after a step that is taken.
      num_vanished: int32[], steps taken whose clipping has made the gradients' norm
        smaller than a quarter of the parameters' machine epsilon times what it was
        (bfloat16: 1/512; without parameters: the gradients'; of several dtypes that
        count: the coarsest): where the optimizer scales its updates with the gradients,
        as SGD does, a parameter of that dtype then keeps its bits, unless its update
        would have been larger than itself without the clip; 0 after ``init``.
      skip_log: The last 16 skipped steps, a ``SkipLog``.
      clip_state: State of the clip, with the norm's statistics.
      rule_states: States of the skip rules, a tuple.
      wrapped_state: State of the optimizer inside, as of the last step taken.
    """

    num_skipped: jax.Array
    skip_streak: jax.Array
    skip_reason: jax.Array
    guard_exhausted: jax.Array
    num_vanished: jax.Array
    skip_log: SkipLog
    clip_state: Any
    rule_states: tuple[Any, ...]
    wrapped_state: Any


@answers_wrong_calls
def guard(
    inner: optax.GradientTransformation,
    clip: ArrayLike
    | optax.Schedule
    | Threshold
    | Mapping[str, Any]
    | optax.GradientTransformationExtraArgs
    | None = None,
    *,
    skip: SkipRule | Sequence[SkipRule] = (),
    mask: Any = True,
    max_consecutive_skips: ArrayLike = 10,
    use_cond: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps bad steps away from parameters and from the state of ``inner``.

    A step is bad if its gradients, or the loss given as ``value=``, hold a NaN or an
    infinity, or if a skip rule says so. On a bad step the updates are zeros and the
    state of ``inner`` (moments, schedules, counts) is that of before, bit for bit. Good
    steps are clipped and go to ``inner``. Put the guard outermost, and the clip in
    ``clip``: the gradients are then read once for norm, verdict and all statistics.

    Non-finite steps are never applied, however many there are: after
    ``max_consecutive_skips`` in a row ``guard_exhausted`` is set, for
    ``raise_if_exhausted`` and stop rules to read. Finite steps skipped by a rule are
    bounded: after that many bad steps in a row, the next finite one is taken and the
    rules start afresh, so that a lasting change of scale cannot stop a run for good.

    Args:
      inner: The optimizer, from ``optax.adamw`` to any chain; a clip of Optax's own
        goes in here.
      clip: A threshold for the global norm (number, schedule or one of
        ``optax_guard.threshold``), a clip of this library, or ``None`` to only measure.
      skip: One or several rules of ``optax_guard.skip``.
      mask: Which leaves count: a tree of bools like the parameters, or like the top of
        their tree, or a function from the tree to that, as for ``optax.masked``. The
        others are not in the norm, are not clipped, and may be NaN without the step
        being skipped; on a good step they go to ``inner`` as they are. For frozen
        parameters, whose gradients would make the norm too large, and for what is
        overwritten rather than added to. ``optax.inject_hyperparams`` takes a function
        for a schedule, unless told ``static_args=("inner", "mask")``.
      max_consecutive_skips: Bad steps in a row that count as too many; a whole number
        of at least 1, may be traced.
      use_cond: Whether a bad step leaves ``inner`` out on TPU and GPU, too, as it does
        on CPU, by a ``lax.cond``. By default all is computed there and masked, which
        needs no branch. Worth it if ``inner`` does more than read and write (Muon,
        Shampoo) and bad steps are not rare, or if its state is offloaded to
        ``pinned_host`` memory, where a mask would choose between old and new. Around
        AdamW, compiled for v5e and H100 and not run: by ``apply_gradients`` one
        conditional and no more traffic, by ``update`` 11.0 passes over the parameters
        instead of 8.0 and a copy of them; with offloaded moments, on v5e, 24.0 passes
        instead of 26.2 (unguarded: 23.0). Under ``vmap`` it is a mask again.

    Returns:
      A transformation whose state is a ``GuardState``. ``value=`` and all other extra
      arguments of ``update`` go on to ``inner``. Under ``jax.shard_map`` and
      ``jax.pmap``, gradients that are split over devices need a clip with
      ``axis_name`` (to only measure, ``record_norm(axis_name=...)``), and ``value``
      must be the same on all, by ``jax.lax.pmean``: all devices then come to one
      verdict.

    Raises:
      TypeError: If ``inner``, ``clip``, ``skip`` or ``mask`` is none of the above.
      ValueError: If a Python number is out of range; in ``update``, if ``value`` is
        known to differ between devices that take a step together.

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
    if not isinstance(inner, optax.GradientTransformation):
        advice = (
            " Call its `gradient_transformation()`."
            if isinstance(inner, optax.MultiSteps)
            else ""
        )
        raise TypeError(
            "`inner` must be an optax transformation such as `optax.adamw(1e-3)`, got "
            f"{inner!r} of type {type(inner).__name__}.{advice}"
        )
    inner = optax.with_extra_args_support(inner)
    clip_init, measure, rescale = _clip_parts(clip)
    if mask is not True:
        clip_init, measure, rescale = counting_only(mask, clip_init, measure, rescale)
    # Without a clip, `inner` may read the updates in the same pass as the guard, which
    # it could not if it had to wait for the verdict.
    hides_bad = clip is not None
    rules = as_rules(skip)
    check_count("max_consecutive_skips", max_consecutive_skips)
    check_flag("use_cond", use_cond)

    def start_rules() -> tuple[Any, ...]:
        return tuple(rule.start() for rule in rules)

    def step_inside(
        updates: optax.Updates, inner_state: Any, params: Any, extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        try:
            return inner.update(updates, inner_state, params, **extra_args)
        except (AttributeError, TypeError, ValueError) as error:
            # Looked for once it is too late: to trace `init` takes time.
            like = updates if params is None else params
            if jax.tree.structure(updates) != jax.tree.structure(like):
                raise ValueError(
                    "`updates` of `guard` must have the structure of `params`, "
                    f"{jax.tree.structure(like)}, got {jax.tree.structure(updates)}."
                ) from error
            fitting = jax.eval_shape(inner.init, like)
            if difference := first_difference(inner_state, fitting):
                raise ValueError(
                    "`state` of `guard` must be that of `inner` for these parameters: "
                    f"{difference}."
                ) from error
            raise

    def wrap_state(params: optax.Params, inner_state: Any) -> GuardState:
        return GuardState(
            num_skipped=jnp.zeros((), jnp.int32),
            skip_streak=jnp.zeros((), jnp.int32),
            skip_reason=jnp.zeros((), jnp.int32),
            guard_exhausted=jnp.zeros((), jnp.bool_),
            num_vanished=jnp.zeros((), jnp.int32),
            skip_log=empty_log(),
            clip_state=clip_init(params),
            rule_states=start_rules(),
            wrapped_state=inner_state,
        )

    def init(params: optax.Params) -> GuardState:
        return wrap_state(params, inner.init(params))

    def judge(
        updates: optax.Updates,
        state: GuardState,
        params: optax.Params | None,
        extra_args: dict[str, Any],
    ) -> tuple[Measurement, GuardState]:
        """Measures, and records the verdict; ``wrapped_state`` is still the old one."""
        check_state("guard", state, GuardState)
        check_part("guard", "skip rules", state.rule_states, start_rules)
        value = checked_loss(extra_args.get("value"))
        measured, clip_state = measure(updates, state.clip_state, params, **extra_args)
        check_shared(value, measured.norm.value)
        reason, rule_states = verdict(
            rules,
            measured,
            value,
            state.rule_states,
            state.skip_streak >= max_consecutive_skips,
        )
        is_skipped = reason != SkipReason.NONE
        streak = jnp.where(is_skipped, increment(state.skip_streak, True), 0)
        num_vanished = state.num_vanished
        if clip is not None:  # What only watches makes nothing smaller.
            like = updates if params is None else params
            counted = like if mask is True else hide(mask, like)
            has_vanished = is_lost_in_rounding(clip_state.stats, counted)
            num_vanished = increment(num_vanished, ~is_skipped & has_vanished)
        # What the clip learns steers later steps, so a skipped step must not teach it;
        # what it counts and shows is a record of every step.
        clip_state = clip_state._replace(
            threshold=select(
                is_skipped, state.clip_state.threshold, clip_state.threshold
            )
        )
        return measured, GuardState(
            num_skipped=increment(state.num_skipped, is_skipped),
            skip_streak=streak,
            skip_reason=reason,
            guard_exhausted=streak >= max_consecutive_skips,
            num_vanished=num_vanished,
            skip_log=logged(
                state.skip_log,
                measured,
                value,
                reason,
                update=state.clip_state.stats.num_updates,
                num_skipped=state.num_skipped,
                num_leaves=len(jax.tree.leaves(updates)),
            ),
            clip_state=clip_state,
            rule_states=rule_states,
            wrapped_state=state.wrapped_state,
        )

    @cached
    def update(
        updates: optax.Updates,
        state: GuardState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GuardState]:
        measured, state = judge(updates, state, params, extra_args)

        def take(updates: optax.Updates, inner_state: Any) -> tuple[Any, Any]:
            clipped = rescale(updates, measured)
            return step_inside(clipped, inner_state, params, extra_args)

        def keep(like: Any, updates: optax.Updates, inner_state: Any) -> Any:
            del updates
            zeros = jax.tree.map(jnp.zeros_like, like[0])
            return zeros, cast_like(inner_state, like[1])

        new_updates, new_inner_state = take_or_keep(
            state.skip_reason == SkipReason.NONE,
            take,
            keep,
            updates,
            state.wrapped_state,
            hides_bad=hides_bad,
            use_cond=use_cond,
        )
        return new_updates, state._replace(wrapped_state=new_inner_state)

    @cached
    def apply_gradients(
        params: optax.Params, state: GuardState, grads: optax.Updates, **extra_args: Any
    ) -> tuple[optax.Params, GuardState]:
        measured, state = judge(grads, state, params, extra_args)
        check_same_tree(params, grads)

        def take(grads: Any, params: Any, inner_state: Any) -> tuple[Any, Any]:
            clipped = rescale(grads, measured)
            updates, inner_state = step_inside(clipped, inner_state, params, extra_args)
            return optax.apply_updates(params, updates), inner_state

        def keep(like: Any, grads: Any, params: Any, inner_state: Any) -> Any:
            del grads
            return cast_like((params, inner_state), like)

        new_params, new_inner_state = take_or_keep(
            state.skip_reason == SkipReason.NONE,
            take,
            keep,
            grads,
            params,
            state.wrapped_state,
            hides_bad=hides_bad,
            use_cond=use_cond,
        )
        return new_params, state._replace(wrapped_state=new_inner_state)

    return transformation(
        init,
        update,
        apply_gradients=apply_gradients,
        judge=judge,
        wrap_state=wrap_state,
    )


def _clip_parts(clip: Any) -> tuple[Callable[..., Any], ...]:
    """``init``, ``measure`` and ``rescale`` of what was given as ``clip=``."""
    if clip is None:
        tx = record_norm()
    elif isinstance(clip, optax.GradientTransformation):
        tx = clip
    else:
        tx = clip_by_global_norm(as_threshold("clip", clip))
    measure, rescale = part_of(tx, "measure"), part_of(tx, "rescale")
    if measure is None or rescale is None:
        raise TypeError(
            "`clip` must be a number, a schedule, a threshold or one of this library's "
            "own clips, got another transformation. Put that one inside: "
            "`guard(optax.chain(clip, optimizer))`; the guard then only measures."
        )
    return tx.init, measure, rescale
