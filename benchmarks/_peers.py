"""Published rules for spikes as Optax transformations, with their faults.

Written from their descriptions; `tests/test_bad_batches.py` holds them to what the
originals were recorded to do, with non-finite numbers, too: what `optax_guard` is
compared with must be neither better nor worse than what people run. The commits are
those of the records: ZClip 584ce4f, OLMo-core fa6c501, MaxText e591f30 and levanter
9263f81.

Norms are `optax.tree.norm`, which is infinite for norms above 1.8e19 in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ZClipState(NamedTuple):
    seen: jax.Array
    warmup_norms: jax.Array
    mean: jax.Array
    var: jax.Array


def zclip(
    z_thresh: float = 2.5,
    *,
    alpha: float = 0.97,
    max_grad_norm: float = 1.0,
    warmup_steps: int = 25,
) -> optax.GradientTransformation:
    """ZClip with its defaults: "zscore", adaptive scaling, and a cap of 1."""

    def init(params: Any) -> ZClipState:
        del params
        zero = jnp.zeros((), jnp.float32)
        norms = jnp.zeros(warmup_steps, jnp.float32)
        return ZClipState(jnp.zeros((), jnp.int32), norms, zero, zero)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        norm = optax.tree.norm(updates)
        is_early = state.seen < warmup_steps
        deviation = jnp.sqrt(state.var)
        z = (norm - state.mean) / (deviation + 1e-6)
        target = state.mean + z_thresh * deviation / (z / z_thresh)
        # A NaN is no spike, and enters.
        entered = jnp.where(z > z_thresh, target, norm)
        limit = jnp.where(is_early, norm, entered)
        limit = jnp.where(max_grad_norm < limit, max_grad_norm, limit)
        factor = jnp.where(norm > limit, limit / (norm + 1e-6), 1.0)
        # In warm-up PyTorch clips, which multiplies by NaN if the norm is.
        factor = jnp.where(is_early & jnp.isnan(norm), jnp.nan, factor)

        norms = state.warmup_norms.at[state.seen].set(norm, mode="drop")
        mean = alpha * state.mean + (1 - alpha) * entered
        var = alpha * state.var + (1 - alpha) * (entered - mean) ** 2
        is_last = state.seen == warmup_steps - 1
        mean = jnp.where(is_early, jnp.where(is_last, norms.mean(), 0.0), mean)
        var = jnp.where(is_early, jnp.where(is_last, norms.var(), 0.0), var)
        clipped = jax.tree.map(lambda g: g * factor, updates)
        return clipped, ZClipState(state.seen + 1, norms, mean, var)

    return optax.GradientTransformation(init, update)


class SkipStepState(NamedTuple):
    seen: jax.Array
    losses: jax.Array
    norms: jax.Array
    is_taken: jax.Array
    inner: Any


def olmo(
    inner: optax.GradientTransformation, window: int = 128, sigma: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """OLMo-core's SkipStep: parameters and moments are multiplied by 0 or 1."""

    def mix(is_taken: jax.Array, new: Any, old: Any) -> Any:
        # As its AdamW's in-place arithmetic does: 0 times NaN is NaN.
        factor = is_taken.astype(jnp.float32)

        def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
            if not jnp.issubdtype(a.dtype, jnp.floating):
                return jnp.where(is_taken, a, b)
            return factor * a + (1 - factor) * b

        return jax.tree.map(leaf, new, old)

    def std(squares: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.sqrt(squares / (count - 1))

    def apply(is_taken: jax.Array, updates: Any, new: Any, old: Any) -> Any:
        updates = jax.tree.map(lambda u: u * is_taken.astype(u.dtype), updates)
        return updates, mix(is_taken, new, old)

    return _skip_step(inner, window, sigma, max(2, window // 2) - 1, std, apply)


def maxtext(
    inner: optax.GradientTransformation, window: int = 128, sigma: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """MaxText's `skip_step_on_spikes`: a true skip. It is given clipped gradients."""

    def std(squares: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.sqrt(squares / jnp.maximum(count - 1, 1))

    def apply(is_taken: jax.Array, updates: Any, new: Any, old: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return _where(is_taken, (updates, new), (zeros, old))

    return _skip_step(inner, window, sigma, max(2, window // 2) - 1, std, apply)


def levanter(
    inner: optax.GradientTransformation, window: int = 128, sigma: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """Levanter's `skip_bad_steps`: updates are multiplied, moments are selected."""

    def std(squares: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sqrt(squares / count), 1e-6)

    def apply(is_taken: jax.Array, updates: Any, new: Any, old: Any) -> Any:
        updates = jax.tree.map(lambda u: u * is_taken.astype(u.dtype), updates)
        return updates, _where(is_taken, new, old)

    return _skip_step(inner, window, sigma, max(2, window // 2), std, apply)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _skip_step(
    inner: optax.GradientTransformation,
    window: int,
    sigma: float,
    min_seen: int,
    std: Any,
    apply: Any,
) -> optax.GradientTransformationExtraArgs:
    """What all three share: windows of losses and norms that everything enters."""

    def init(params: Any) -> SkipStepState:
        return SkipStepState(
            seen=jnp.zeros((), jnp.int32),
            losses=jnp.zeros(window, jnp.float32),
            norms=jnp.zeros(window, jnp.float32),
            is_taken=jnp.ones((), bool),
            inner=inner.init(params),
        )

    def is_usual(x: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
        count = jnp.minimum(seen, window)
        mean = jnp.sum(values) / jnp.maximum(count, 1)
        is_seen = jnp.arange(window) < count
        squares = jnp.sum(jnp.where(is_seen, (values - mean) ** 2, 0.0))
        # False if anything is NaN.
        return x - mean <= sigma * std(squares, count)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        loss, norm = extra["value"], optax.tree.norm(updates)
        seen = state.seen
        is_taken = is_usual(loss, state.losses, seen)
        is_taken &= is_usual(norm, state.norms, seen)
        is_taken |= seen < min_seen
        new_updates, new_inner = inner.update(updates, state.inner, params)
        new_updates, new_inner = apply(is_taken, new_updates, new_inner, state.inner)
        return new_updates, SkipStepState(
            seen=seen + 1,
            losses=state.losses.at[seen % window].set(loss),
            norms=state.norms.at[seen % window].set(norm),
            is_taken=is_taken,
            inner=new_inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)
