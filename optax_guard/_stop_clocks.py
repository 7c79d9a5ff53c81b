"""Limits in evaluations, steps or seconds of training."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._base import check_count, check_positive
from optax_guard._stop_base import Observation


def reached(
    observation: Observation,
    evaluations: ArrayLike | None,
    steps: ArrayLike | None,
    seconds: ArrayLike | None,
) -> jax.Array:
    """Says whether any of the given totals is reached, bool, shape ()."""
    clocks = [
        (observation.num_evals, evaluations),
        (observation.step, steps),
        (observation.seconds, seconds),
    ]
    spent = jnp.asarray(False)
    for clock, limit in clocks:
        if clock is not None and limit is not None:
            spent |= clock >= jnp.asarray(limit, clock.dtype)
    return spent


def check_limits(
    name: str,
    evaluations: ArrayLike | None,
    steps: ArrayLike | None,
    seconds: ArrayLike | None,
) -> None:
    """Refuses concrete limits that are out of range; ``name`` is that of the first."""
    if evaluations is not None:
        check_count(name, evaluations)
    if steps is not None:
        check_count("steps", steps)
    if seconds is not None:
        check_positive("seconds", seconds)


def clock_needs(steps: object, seconds: object) -> frozenset[str]:
    """Names the arguments of `update` that limits in steps and seconds need."""
    wanted = {"step": steps, "seconds": seconds}
    return frozenset(name for name, limit in wanted.items() if limit is not None)
