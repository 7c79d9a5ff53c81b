"""Leaves that a huge gradient of the past has frozen, by the optimizer's moments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._norms.readout import norm_quantile
from optax_guard._norms.statistics import NormStats
from optax_guard._trees import find_states, is_inexact, path_names, states_with

# Adam divides by the root of the second moment. With such a root an entry moves by at
# most 1e-4 of the learning rate.
_TIMES = 1e4


class FrozenMoment(NamedTuple):
    """A leaf whose second moment is far too large for its gradients.

    Attributes:
      leaf: Path of the leaf among the moments.
      root: The largest root of an entry's second moment, in units of the gradient.
      norm: The larger of the median and the last global norm of the gradients.
      largest_norm: The largest finite norm of the run.
    """

    leaf: str
    root: float
    norm: float
    largest_norm: float

    def __str__(self) -> str:
        return (
            f"The second moment of {self.leaf} is frozen: its root is {self.root:.3g}, "
            f"and gradients now have a norm of at most {self.norm:.3g} (the largest so "
            f"far: {self.largest_norm:.3g}). Go back to a checkpoint from before that "
            "gradient, or start the optimizer's state afresh by `tx.init(params)`. A "
            "clip keeps such gradients out: `guard(tx, clip=...)`."
        )


def frozen_moments(opt_state: Any) -> list[FrozenMoment]:
    """Finds leaves that a huge gradient of the past has frozen.

    Adam and its kin divide by the root of a moving mean of squared gradients. One
    gradient of 1e10 stays in that mean for thousands of steps, in which nothing moves.
    A leaf is frozen if the largest root is above 1e4 times the norm of the gradients,
    and above 1e4 times the largest first moment, if there is one. This waits for the
    device and reads all moments once, so call it at an evaluation, or on a checkpoint.

    Args:
      opt_state: An optimizer state with a guard, a clip or ``record_norm`` in it, a
        ``TrainState`` or an ``nnx.Optimizer``. Looked at are the states in it that have
        a second moment called ``nu``, as Adam, AMSGrad, Lamb, NAdam and RMSProp do.

    Returns:
      The leaves that are frozen; empty if there are none, or no such optimizer.

    Raises:
      ValueError: If no norm was recorded in ``opt_state``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.analysis import frozen_moments
      >>> tx = og.guard(optax.adam(0.1))
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for size in [1.0, 1e10, *[1.0] * 250]:
      ...     _, state = tx.update({"w": jnp.full(2, size)}, state)
      >>> [(found.leaf, found.norm > 1) for found in frozen_moments(state)]
      [('w', True)]
    """
    stats = find_states(opt_state, NormStats)
    if not stats:
        raise ValueError(
            "`opt_state` holds no norms to compare with. Wrap the optimizer in "
            "`guard`, or chain `record_norm` before it."
        )
    now = jax.device_get(stats[0]._replace(norm_sketch=()))
    norms = [float(now.grad_norm), float(norm_quantile(opt_state, 0.5))]
    norm = max((x for x in norms if np.isfinite(x)), default=np.nan)
    largest = {
        name: (float(root), float(first))
        for state in states_with(opt_state, "nu")
        for name, (root, first) in jax.device_get(_sizes(state)).items()
    }
    return [
        FrozenMoment(name, root, norm, float(now.norm_max))
        for name, (root, first) in largest.items()
        if root > _TIMES * max(norm, first)
    ]


def _sizes(state: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By leaf: the largest root of a second moment, the largest first moment."""
    seconds, names = jax.tree.leaves(state.nu), path_names(state.nu)
    firsts = jax.tree.leaves(getattr(state, "mu", None))
    firsts = firsts if len(firsts) == len(seconds) else [jnp.zeros(1)] * len(seconds)
    return {
        name: (jnp.sqrt(_largest(second)), _largest(first))
        for name, second, first in zip(names, seconds, firsts, strict=True)
        if is_inexact(second) and second.size
    }


def _largest(moment: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(moment)).astype(jnp.float32)
