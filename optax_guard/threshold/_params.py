"""Thresholds by ratio to the norm of the parameters: a bound on the relative step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_positive
from optax_guard._public import answers_wrong_calls
from optax_guard._trees import as_float, increment
from optax_guard.threshold._base import Limits, ParamNorms, Threshold


class RelativeToParamsState(NamedTuple):
    """State of ``relative_to_params``.

    Attributes:
      num_compared: int32[], finite updates so far. 0 after ``init``; in a guard it
        starts at the ``count`` of the optimizer inside, if that has one.
    """

    num_compared: jax.Array


@answers_wrong_calls
def relative_to_params(
    ratio: ArrayLike = 0.01, *, start: ArrayLike = 0.1, min_rms: ArrayLike = 1e-3
) -> Threshold:
    r"""Clips norms above a ratio to the norm of the parameters.

    It is made for updates, after the optimizer: as ``max_update`` of ``guard``, or in a
    clip at the end of a chain. Such a bound keeps a learning rate that is too high from
    destroying the parameters. No threshold on gradients can, because gradients do not
    know the learning rate.

    At update :math:`t = 1, 2, \dots` an update :math:`u` of parameters
    :math:`\theta` is clipped to the norm

    .. math:: \tau_t \max(\|\theta\|, \rho \sqrt n), \qquad
              \tau_t = \max(r, s / \sqrt t),

    where :math:`n` is how many parameters share the norm (all, a leaf, a group) and
    :math:`\rho` is the root mean square of all parameters, at least ``min_rms``. So a
    bias that is zero can grow. The bound is loose at first, because training starts
    with large steps.

    Args:
      ratio: The ratio :math:`r` in the long run. Adam moves each parameter by about the
        learning rate, so its own ratio is that rate divided by the root mean square of
        the parameters.
      start: The ratio :math:`s` at the first update; it falls as :math:`1/\sqrt t` to
        ``ratio``. For a constant bound, make it equal to ``ratio``.
      min_rms: The smallest root mean square that is assumed of the parameters, in
        their units; that of Adafactor. All numbers are positive, and may be traced.

    Returns:
      A threshold with a ``RelativeToParamsState``. Clips need ``params`` for it, and
      read them once more.

    Raises:
      ValueError: If a concrete number is not positive.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
      >>> bound = og.threshold.relative_to_params()
      >>> tx = og.guard(optax.sgd(10.0), clip=1.0, max_update=bound)
      >>> params = jnp.array([3.0, 4.0])
      >>> grads = jnp.array([1.0, 0.0])
      >>> og.apply_gradients(tx, params, tx.init(params), grads=grads)[0]
      Array([2.5, 4. ], dtype=float32)

    References:
      You et al., `Large batch training of convolutional networks
      <https://arxiv.org/abs/1708.03888>`_, 2017, whose rates are relative to parameters

      Shazeer and Stern, `Adafactor: Adaptive learning rates with sublinear memory cost
      <https://arxiv.org/abs/1804.04235>`_, 2018, for ``min_rms``
    """
    check_positive("ratio", ratio)
    check_positive("start", start)
    check_positive("min_rms", min_rms)

    def limits(
        norm: jax.Array, global_norm: jax.Array, state: RelativeToParamsState
    ) -> Limits:
        del global_norm
        t = 1 + state.num_compared.astype(norm.dtype)
        falling = as_float(start, norm.dtype) * jax.lax.rsqrt(t)
        limit = jnp.maximum(as_float(ratio, norm.dtype), falling)
        return limit, limit

    def learn(
        norm: jax.Array, clipped_norm: jax.Array, state: RelativeToParamsState
    ) -> RelativeToParamsState:
        del norm, clipped_norm
        return RelativeToParamsState(increment(state.num_compared))

    def unit(params: ParamNorms) -> jax.Array:
        rms = jnp.maximum(params.rms, as_float(min_rms, params.rms.dtype))
        return jnp.maximum(params.norms, rms * jnp.sqrt(params.counts))

    return Threshold(
        lambda shape: RelativeToParamsState(jnp.zeros((), jnp.int32)),
        limits,
        learn,
        unit,
    )
