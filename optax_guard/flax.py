"""Flax: a `TrainState` for guarded optimizers, and `fit` with its checkpoints."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

try:
    from flax import struct
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
    from flax.training.dynamic_scale import DynamicScale
except ImportError as error:
    raise ImportError(
        "`optax_guard.flax` needs Flax: pip install 'optax-guard[flax]'",
        name=error.name,
    ) from error

from optax_guard._checks import check_kind, check_leaves, check_transformation
from optax_guard._guarding.nesting import warn_if_nested
from optax_guard._guarding.state import GuardState
from optax_guard._guarding.step import apply_gradients
from optax_guard._guarding.undoing import keep_if_skipped, last_reasons
from optax_guard._public import answers_wrong_calls, publish
from optax_guard._trees import find_states
from optax_guard.loops._checkpoint import Checkpointer, load_best
from optax_guard.loops._fit import fit
from optax_guard.loops._result import FitResult
from optax_guard.loops._rewind import Rewind
from optax_guard.skip import is_nonfinite

__all__ = [
    "Checkpointer",
    "FitResult",
    "Rewind",
    "TrainState",
    "fit",
    "load_best",
    "update_dynamic_scale",
]


class TrainState(train_state.TrainState):
    """A Flax `TrainState` in which a skipped step changes nothing but `step`.

    It is a subclass of Flax's class, with its methods and the same results. Three
    things differ in `apply_gradients`. It takes the one-pass step of
    `optax_guard.apply_gradients`. Keyword arguments that are not fields go to the
    optimizer, so that a guard gets the loss (``value=loss``). Fields that it is given
    keep their old values if the guard skips the step. Any Optax optimizer works, with a
    guard or without.

    Flax' own class replaces fields by all keyword arguments, so its guard gets no loss,
    and `batch_stats` of a skipped step stay. If you cannot take this class, write the
    step out, with `optax_guard.keep_if_skipped` for `batch_stats`::

        params, opt_state = og.apply_gradients(
            state.tx, state.params, state.opt_state, grads=grads, value=loss
        )
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    Attributes:
      step: int32[], calls of `apply_gradients`, skipped steps included: a key folded
        with it is fresh after a skipped step too; 0 after `create`.
      batch_stats: The collection of the same name, ``None`` if the model has none.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> import optax_guard as og
      >>> from optax_guard.flax import TrainState
      >>> model = nn.Dense(1, use_bias=False)
      >>> params = {"kernel": jnp.ones((2, 1))}
      >>> tx = og.guard(optax.sgd(0.5), clip=1.0)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> grads = {"kernel": jnp.array([[3.0], [4.0]])}
      >>> state = state.apply_gradients(grads=grads, value=2.0)
      >>> state.params["kernel"].ravel()
      Array([0.7, 0.6], dtype=float32)
    """

    # Keyword-only, so that a subclass may add fields without defaults, as Flax's can.
    batch_stats: Any = struct.field(default=None, kw_only=True)

    @answers_wrong_calls
    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """Takes one optimizer step, unless the guard skips it.

        Args:
          grads: Gradients with the structure of `params`.
          **kwargs: New values of fields, such as `batch_stats` or a moving average in
            a subclass; and extra arguments of the optimizer, such as ``value=loss``.

        Returns:
          The state after the step. If the guard skipped the step, it is the state
          before it, with the guard's records and ``step + 1``. Fields that are not part
          of the tree are replaced in both cases.

        Raises:
          TypeError: If an argument is not a field but is spelt almost like one, or is
            a field that the step itself computes.
          ValueError: If a new value does not have the structure of the old one.
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        replaced = {k: v for k, v in kwargs.items() if k in fields}
        extra_args = {k: v for k, v in kwargs.items() if k not in fields}
        for name in extra_args:
            # An optimizer ignores an unknown argument, so the field would not change.
            if close := difflib.get_close_matches(name, fields, n=1, cutoff=0.8):
                raise TypeError(
                    f"`apply_gradients` got `{name}`, which is not a field of "
                    f"`{type(self).__name__}`: did you mean `{close[0]}`?"
                )

        params, opt_state = apply_gradients(
            self.tx,
            _trained(self.params),
            self.opt_state,
            grads=_trained(grads),
            **extra_args,
        )
        is_guarded = bool(find_states(opt_state, GuardState))

        def unless_skipped(name: str, new: Any, old: Any) -> Any:
            if not is_guarded:
                return new
            if jax.tree.structure(new) != jax.tree.structure(old):
                raise ValueError(
                    f"`{name}` must keep its structure, so that a skipped step can "
                    f"keep the old value: got {jax.tree.structure(new)} for "
                    f"{jax.tree.structure(old)}. Give `create` the initial value: "
                    f"`create(..., {name}=...)`."
                )
            return keep_if_skipped(opt_state, new, old)

        if _has_overwritten(grads):
            name = OVERWRITE_WITH_GRADIENT
            kept = unless_skipped(name, grads[name], self.params[name])
            params = {"params": params, name: kept}
        for name, new in replaced.items():
            if fields[name].metadata.get("pytree_node", True):
                replaced[name] = unless_skipped(name, new, getattr(self, name))
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **replaced
        )

    @classmethod
    @answers_wrong_calls
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: Any, **kwargs: Any
    ) -> Self:
        """Makes the state before the first step.

        No two leaves share a buffer, so the state can be donated even if one tree is
        given twice, as for ``params=params, ema_params=params``.

        Args:
          apply_fn: Usually ``model.apply``.
          params: Parameters.
          tx: The optimizer.
          **kwargs: Other fields: `batch_stats`, and those of a subclass.

        Returns:
          A state whose ``step`` is an array, not a Python number as in Flax: it has the
          type of all later steps, and it can be donated.

        Raises:
          TypeError: If ``tx`` is not a transformation, or ``params`` not arrays.
        """
        check_transformation("tx", tx)
        check_leaves("params", params)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            opt_state=tx.init(_trained(params)),
            **kwargs,
        )
        warn_if_nested(state)
        seen: set[int] = set()

        def unshared(leaf: Any) -> Any:
            if isinstance(leaf, jax.Array) and id(leaf) in seen:
                leaf = jnp.copy(leaf)
            seen.add(id(leaf))
            return leaf

        return jax.tree.map(unshared, state)


def update_dynamic_scale(dynamic_scale: DynamicScale, opt_state: Any) -> DynamicScale:
    """Updates the loss scale after a step, by the guard's verdict on that step.

    Training in float16 unscales the gradients, judges them once and clips them then.
    `DynamicScale.value_and_grad` unscales and judges. If its ``dynamic_scale`` and
    ``is_finite`` are not used, XLA removes its pass over the gradients, and the guard's
    is the only one. The scale backs off if gradients or loss were not finite; a finite
    step that a rule skipped counts as finite. Write the result into the state with
    ``replace``: as a field of `apply_gradients` it would be undone on a skipped step.

    Args:
      dynamic_scale: The scale with which the gradients were computed.
      opt_state: Optimizer state after the step, with a guard in it. With
        `optax_guard.accumulate`, the verdict is the one on the micro-batch.

    Returns:
      The new scale, by the rule of `DynamicScale`.

    Raises:
      ValueError: If there is no guard in ``opt_state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> from flax.training.dynamic_scale import DynamicScale
      >>> from optax_guard.flax import update_dynamic_scale
      >>> tx = og.guard(optax.sgd(0.1))
      >>> updates, opt_state = tx.update(jnp.array([jnp.inf]), tx.init(jnp.zeros(1)))
      >>> update_dynamic_scale(DynamicScale(scale=1024.0), opt_state).scale.item()
      512.0
    """
    check_kind("dynamic_scale", dynamic_scale, DynamicScale, "a `DynamicScale`")
    reasons = last_reasons(opt_state)
    if not reasons:
        raise ValueError(
            "`opt_state` must hold a `GuardState`, found none. Without a guard take "
            "the scale that `DynamicScale.value_and_grad` returns."
        )
    is_bad = jnp.any(jnp.stack([is_nonfinite(reason) for reason in reasons]))
    # This applies Flax's own rule to one number in place of all gradients.
    stand_in = dynamic_scale.value_and_grad(lambda x: x * jnp.where(is_bad, jnp.nan, 0))
    return stand_in(jnp.zeros(())).dynamic_scale


def _has_overwritten(tree: Any) -> bool:
    # In this collection of Flax's fp8 layers the "gradients" are the new values.
    return isinstance(tree, Mapping) and OVERWRITE_WITH_GRADIENT in tree


def _trained(tree: Any) -> Any:
    return tree["params"] if _has_overwritten(tree) else tree


def __dir__() -> list[str]:
    return list(__all__)


publish(__name__)
