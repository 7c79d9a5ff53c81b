"""Published rules as Optax transformations, by their definitions, each with its source.

Numbers may be traced. ZClip, OLMo and MaxText are in `benchmarks._peers`. A "leaf" is a
tensor of the model: stacked layers are taken apart before (`_runs.by_layer`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class HistoryState(NamedTuple):
    """The norms of all updates so far, sorted; infinite where there is none yet."""

    seen: jax.Array
    sorted_norms: jax.Array


def autoclip(percentile: Any, most_steps: int) -> optax.GradientTransformation:
    """AutoClip: clips to a percentile of all global norms, this one's included.

    Seetharaman et al., arXiv 2007.14469; pseeth/autoclip, `autoclip_torch.py`:
    `np.percentile`, linear between two norms; PyTorch's clip, hence 1e-6. The paper's
    percentile is 10.
    """

    def init(params: Any) -> HistoryState:
        del params
        return HistoryState(jnp.zeros((), jnp.int32), jnp.full(most_steps, jnp.inf))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        norm = optax.tree.norm(updates)
        norms, places = state.sorted_norms, jnp.arange(most_steps)
        place = jnp.sum(norms < norm)
        after = jnp.where(places == place, norm, jnp.roll(norms, 1))
        norms = jnp.where(places < place, norms, after)
        at = percentile / 100 * state.seen.astype(jnp.float32)
        low = jnp.floor(at).astype(jnp.int32)
        share = at - low
        high = jnp.minimum(low + 1, state.seen)
        limit = (1 - share) * norms[low] + share * norms[high]
        # A norm that is not finite poisons the percentile for good.
        limit = jnp.where(jnp.isfinite(norm), limit, jnp.nan)
        factor = jnp.minimum(1.0, limit / (norm + 1e-6))
        clipped = jax.tree.map(lambda g: g * factor, updates)
        return clipped, HistoryState(state.seen + 1, norms)

    return optax.GradientTransformation(init, update)


class MeansState(NamedTuple):
    """A mean of clipped norms for each leaf."""

    seen: jax.Array
    means: Any


def adagc(
    lambda_rel: Any, lambda_abs: Any, beta: float = 0.98, warmup_steps: int = 100
) -> optax.GradientTransformation:
    """AdaGC: clips each leaf relative to the running mean of its clipped norms.

    Wang et al., arXiv 2502.11034v2; lishuai-97/AdaGC: relative 1.05, absolute 1, beta
    0.98, 100 steps of warm-up, in which the global norm is clipped and each mean is the
    smallest clipped norm.
    """

    def init(params: Any) -> MeansState:
        means = jax.tree.map(lambda _: jnp.full((), jnp.inf), params)
        return MeansState(jnp.zeros((), jnp.int32), means)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        is_early = state.seen + 1 < warmup_steps
        norms = jax.tree.map(optax.tree.norm, updates)
        in_warmup = jnp.minimum(1.0, lambda_abs / (optax.tree.norm(updates) + 1e-8))

        def factor(norm: jax.Array, mean: jax.Array) -> jax.Array:
            later = jnp.minimum(1.0, lambda_rel * mean / (norm + 1e-8))
            return jnp.where(is_early, in_warmup, later)

        def learned(norm: jax.Array, mean: jax.Array) -> jax.Array:
            clipped = norm * factor(norm, mean)
            later = beta * mean + (1 - beta) * clipped
            return jnp.where(is_early, jnp.minimum(mean, clipped), later)

        factors = jax.tree.map(factor, norms, state.means)
        clipped = jax.tree.map(lambda g, c: g * c, updates, factors)
        means = jax.tree.map(learned, norms, state.means)
        return clipped, MeansState(state.seen + 1, means)

    return optax.GradientTransformation(init, update)


def aggc(
    high: Any, num_steps: Any, low: float = 0.98, beta: float = 0.99
) -> optax.GradientTransformation:
    """AGGC: keeps each group's norm in a band around the mean of its past.

    Li et al., arXiv 2601.11864; ZhiyuanLi218/AGGC, `grad_clip.py` with the numbers of
    its script for reinforcement learning, in which both sides of the band act: from
    0.98 to 0.7 of the mean, which learns scaled norms from zero on, with beta 0.99; the
    upper side rises to 0.999 / 0.7 of that from 60 to 80 % of the run; no factor is
    below 0.9 or above 1.1. Groups are leaves.
    """

    def init(params: Any) -> MeansState:
        means = jax.tree.map(lambda _: jnp.zeros(()), params)
        return MeansState(jnp.zeros((), jnp.int32), means)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        late = jnp.clip((state.seen / num_steps - 0.6) / 0.2, 0.0, 1.0)
        upper = high * (1 - late + late * 0.999 / 0.7)

        def factor(norm: jax.Array, mean: jax.Array) -> jax.Array:
            down = jnp.maximum(upper * mean / (norm + 1e-12), 0.9)
            up = jnp.minimum(low * mean / (norm + 1e-12), 1.1)
            is_above = (mean > 0) & (norm > upper * mean)
            is_below = (norm < low * mean) & (norm > 0)
            return jnp.where(is_above, down, jnp.where(is_below, up, 1.0))

        norms = jax.tree.map(optax.tree.norm, updates)
        factors = jax.tree.map(factor, norms, state.means)
        scaled = jax.tree.map(lambda g, c: g * c, updates, factors)
        means = jax.tree.map(
            lambda mean, norm, c: beta * mean + (1 - beta) * norm * c,
            state.means,
            norms,
            factors,
        )
        return scaled, MeansState(state.seen + 1, means)

    return optax.GradientTransformation(init, update)


class SquaresState(NamedTuple):
    seen: jax.Array
    squares: Any


def spam_clip(
    threshold: Any, decay: float = 0.999, first_step: int = 20
) -> optax.GradientTransformation:
    """SPAM's spike-aware clip: an entry's square is at most so many times its mean.

    Huang et al., arXiv 2501.06842; TianjinYellow/SPAM-Optimizer: 5000, against Adam's
    second moments before this step and without correction, from the 20th step on. Its
    resets of the moments and warm-ups after them are not part of the clip.
    """

    def init(params: Any) -> SquaresState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SquaresState(jnp.zeros((), jnp.int32), zeros)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        is_on = state.seen >= first_step

        def clip(g: jax.Array, v: jax.Array) -> jax.Array:
            is_spike = is_on & (g * g > threshold * v)
            return jnp.where(is_spike, jnp.sign(g) * jnp.sqrt(threshold * v), g)

        clipped = jax.tree.map(clip, updates, state.squares)
        squares = jax.tree.map(
            lambda v, g: decay * v + (1 - decay) * g * g, state.squares, clipped
        )
        return clipped, SquaresState(state.seen + 1, squares)

    return optax.GradientTransformation(init, update)


def larc(trust: Any, learning_rate: Any) -> optax.GradientTransformation:
    """LARC in its clipping mode: a leaf's own rate, but at most the learning rate.

    You et al., arXiv 1708.03888; NVIDIA/apex, `LARC.py`: trust coefficient 0.02, eps
    1e-8. It scales the gradient before the optimizer.
    """

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def leaf(g: jax.Array, p: jax.Array) -> jax.Array:
            norm, size = optax.tree.norm(g), optax.tree.norm(p)
            factor = jnp.minimum(trust * size / (norm + 1e-8) / learning_rate, 1.0)
            return g * jnp.where((size != 0) & (norm != 0), factor, 1.0)

        return jax.tree.map(leaf, updates, params), state

    return optax.GradientTransformation(init, update)


def stable_adam(
    learning_rate: Any, limit: Any, decay: Any
) -> optax.GradientTransformation:
    """StableAdamW without weight decay: Adam, slower where gradients outgrow moments.

    Wortsman et al., arXiv 2304.13013, algorithm 2: a leaf's rate is divided by
    max(1, RMS / d), RMS = sqrt(mean(g^2 / max(u, eps^2))), u the second moment with
    this gradient in it; d is 1, beta 0.9 and 0.99, eps 1e-8.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, updates)
        nu = jax.tree.map(
            lambda v, g: decay * v + (1 - decay) * g * g, state.nu, updates
        )

        def leaf(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            m, v = m / (1 - 0.9**count), v / (1 - decay**count)
            rms = jnp.sqrt(jnp.mean(g * g / jnp.maximum(v, 1e-16)))
            rate = learning_rate / jnp.maximum(1.0, rms / limit)
            return -rate * m / (jnp.sqrt(v) + 1e-8)

        steps = jax.tree.map(leaf, updates, mu, nu)
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
