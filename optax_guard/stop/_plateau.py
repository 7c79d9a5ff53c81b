"""Plateaus: reduce the learning rate first, and stop when reductions are spent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_guard._checks import check_count, check_fraction, check_kind
from optax_guard._public import answers_wrong_calls
from optax_guard.stop._patience import PatienceState, patience
from optax_guard.stop._rule import (
    Observation,
    StopReason,
    StopRule,
    Verdict,
    as_float,
    as_int,
    verdict_for,
)
from optax_guard.stop._state import EarlyStoppingState


class PlateauState(NamedTuple):
    """State of `plateau`.

    Attributes:
      patience_state: Reference and count of bad evaluations, as of `patience`.
      lr_scale: Factor on the learning rate, float32, shape (); 1 at first.
      num_reductions: Reductions so far, int32, shape (); 0 at first.
      rest_count: Evaluations for which bad ones are not counted, int32, shape (); 0
        at first.
    """

    patience_state: PatienceState
    lr_scale: jax.Array
    num_reductions: jax.Array
    rest_count: jax.Array


@answers_wrong_calls
def plateau(
    n: ArrayLike,
    *,
    factor: ArrayLike = 0.1,
    max_reductions: ArrayLike = 2,
    cooldown: ArrayLike = 0,
    min_delta: ArrayLike = 0.0,
    rel_delta: ArrayLike = 0.0,
) -> StopRule:
    """Reduces the learning rate at stalls, and stops when the reductions are spent.

    The rule holds the factor, `apply_plateau` writes it into the state of the
    optimizer, where `scale_by_plateau` applies it. One stopper decides both, so the
    patience of stopping cannot run out before the rate was ever reduced. Unlike
    Optax's ``reduce_on_plateau``, ``rel_delta`` is right for negative values.

    Args:
      n: Length of a stall: evaluations without an improvement that counts; at least 1.
      factor: Factor of one reduction; above 0, below 1.
      max_reductions: Reductions before a stall stops the run; not negative.
      cooldown: Evaluations after a reduction that never count as bad; not negative.
      min_delta: Least improvement that counts, in units of the value.
      rel_delta: Least improvement that counts, as a share of the reference.

    Returns:
      A rule whose state is a `PlateauState`.

    Raises:
      ValueError: If a concrete number is out of range.

    Examples:
      >>> import optax
      >>> from optax_guard import early_stopping, stop
      >>> tx = optax.chain(optax.sgd(0.1), stop.scale_by_plateau())
      >>> opt_state = tx.init({"w": 1.0})
      >>> stopper = early_stopping(stop.plateau(1, factor=0.5))
      >>> state = stopper.update(2.0, stopper.update(2.0, stopper.init()))
      >>> opt_state = stop.apply_plateau(opt_state, state)
      >>> float(optax.tree.get(opt_state, "lr_scale")), bool(state.should_stop)
      (0.5, False)
    """
    stall = patience(n, min_delta=min_delta, rel_delta=rel_delta)
    check_fraction("factor", factor)
    check_count("max_reductions", max_reductions, least=0)
    check_count("cooldown", cooldown, least=0)

    def init() -> PlateauState:
        return PlateauState(
            patience_state=stall.init(),
            lr_scale=jnp.asarray(1.0, jnp.float32),
            num_reductions=jnp.asarray(0, jnp.int32),
            rest_count=jnp.asarray(0, jnp.int32),
        )

    def update(
        observation: Observation, state: PlateauState
    ) -> tuple[Verdict, PlateauState]:
        judged, waited = stall.update(observation, state.patience_state)
        rests = state.rest_count > 0
        stalls = judged.fired & ~rests
        reduces = stalls & (state.num_reductions < as_int(max_reductions))
        rest = state.rest_count - (rests & observation.counts).astype(jnp.int32)
        new_state = PlateauState(
            waited._replace(bad_count=jnp.where(rests | reduces, 0, waited.bad_count)),
            jnp.where(reduces, as_float(factor) * state.lr_scale, state.lr_scale),
            state.num_reductions + reduces.astype(jnp.int32),
            jnp.where(reduces, as_int(cooldown), rest),
        )
        fired = stalls & ~reduces
        return verdict_for(fired, StopReason.PLATEAU, judged.significant), new_state

    return StopRule(init, update)


class PlateauScaleState(NamedTuple):
    """State of `scale_by_plateau`.

    Attributes:
      lr_scale: Factor on the updates, float32, shape (); 1 until `apply_plateau`
        writes another.
    """

    lr_scale: jax.Array


def scale_by_plateau() -> optax.GradientTransformation:
    """Scales updates by the present factor of `plateau`.

    Put it last in the chain, after the optimizer.

    Returns:
      A transformation whose state is a `PlateauScaleState`.

    Examples:
      >>> import optax
      >>> from optax_guard import stop
      >>> tx = optax.chain(optax.sgd(0.1), stop.scale_by_plateau())
      >>> float(optax.tree.get(tx.init({"w": 1.0}), "lr_scale"))
      1.0
    """

    def init(params: optax.Params) -> PlateauScaleState:
        del params
        return PlateauScaleState(jnp.asarray(1.0, jnp.float32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, PlateauScaleState]:
        del params
        scaled = jax.tree.map(lambda u: u * state.lr_scale.astype(u.dtype), updates)
        return scaled, state

    return optax.GradientTransformation(init, update)


def apply_plateau(opt_state: Any, state: EarlyStoppingState) -> Any:
    """Writes the present factor of `plateau` into the optimizer's state.

    Call it after each update of early stopping; it may be jitted.

    Args:
      opt_state: State of an optimizer with `scale_by_plateau` in its chain.
      state: State of an `early_stopping` whose rule holds one `plateau`.

    Returns:
      The optimizer's state with the factor in it.

    Raises:
      TypeError: If ``state`` is no `EarlyStoppingState`.
      ValueError: If there is no `scale_by_plateau` or not exactly one `plateau`.

    Examples:
      >>> import optax
      >>> from optax_guard import early_stopping, stop
      >>> opt_state = stop.scale_by_plateau().init({"w": 1.0})
      >>> stopper = early_stopping(stop.plateau(1, factor=0.5))
      >>> state = stopper.update(2.0, stopper.update(2.0, stopper.init()))
      >>> stop.apply_plateau(opt_state, state).lr_scale.item()
      0.5
    """
    check_kind("state", state, EarlyStoppingState, "an `EarlyStoppingState`")
    held = optax.tree.get_all_with_path(state.rule_state, "lr_scale")
    if len(held) != 1:
        raise ValueError(
            f"`state` must come from a rule with one `plateau`, found {len(held)}."
        )
    [(_, scale)] = held
    if not optax.tree.get_all_with_path(opt_state, "lr_scale"):
        raise ValueError(
            "`opt_state` has no `lr_scale` to set: put `stop.scale_by_plateau()` last "
            "in the chain of the optimizer."
        )
    return set_lr_scale(opt_state, scale)


def set_lr_scale(opt_state: Any, scale: ArrayLike) -> Any:
    """Writes a copy of ``scale`` over each ``lr_scale``: each may be donated."""
    for path, _ in optax.tree.get_all_with_path(opt_state, "lr_scale"):
        copied = jnp.array(scale, jnp.float32, copy=True)
        opt_state = optax.tree.set(
            opt_state, lambda at, _, path=path: at == path, lr_scale=copied
        )
    return opt_state
