"""Quantiles of the norms that a run has seen."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from optax_guard._states import find_states
from optax_guard._statistics import NormStats, sketch_quantile


def norm_quantile(state: Any, q: ArrayLike) -> jax.Array:
    """The ``q``-quantile of all finite global norms so far, before clipping.

    From the sketch that ``guard``, every clip and ``record_norm`` carry; it counts
    withheld steps, too. A run that only watches so tells which threshold would have
    clipped how often: ``norm_quantile(state, 0.9)`` as ``max_norm`` clips one in ten.
    Works on the host and inside a jitted step.

    Args:
      state: An optimizer state, a Flax ``TrainState`` or an ``nnx.Optimizer``. Where it
        holds several, the first in ``find_states``' order counts.
      q: One or several numbers in [0, 1], shape S; may be traced.

    Returns:
      float32[S], in units of the gradient; within 2 % of the exact quantile for norms
      from 1e-12 to 1e12, beyond which they count as 0 or 1e12; NaN before the first
      finite norm.

    Raises:
      ValueError: If nothing in ``state`` carries norms, or ``q`` is a Python number out
        of range.

    Examples:
      >>> import jax.numpy as jnp, optax_guard as og
      >>> tx = og.record_norm()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 9.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> abs(og.norm_quantile(state, 0.5).item() - 2.0) <= 0.02 * 2.0
      True
    """
    if not isinstance(q, jax.Array):
        q = np.asarray(q, np.float32)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"`q` must be in [0, 1], got {q}.")
    stats = find_states(state, NormStats)
    if not stats:
        raise ValueError(
            "`state` holds no norms. Wrap the optimizer in `guard`, or chain "
            "`clip_by_global_norm` or `record_norm` before it."
        )
    return sketch_quantile(stats[0].norm_sketch, q)
