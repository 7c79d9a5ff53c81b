"""Silent data corruption: a step is repeated, and must come out the same to the bit."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_guard._checks import static_count
from optax_guard._trees import path_names
from optax_guard.loops._warning import warn_user

# How often a step is computed if two results differ, and how many of these must agree
# for the others to be faults of the device. Fewer mean that the step is not
# deterministic.
_NUM_TRIALS, _NUM_SAME = 4, 3


def open_audit(audit_every: int | None) -> "Audit | None":
    """The audit of a run, or ``None`` without one."""
    if audit_every is None:
        return None
    return Audit(static_count("audit_every", audit_every))


class Audit:
    """Computes some steps of a run twice.

    Args:
      every: Steps from one audit to the next.
    """

    def __init__(self, every: int):
        self._every = every
        self._is_on = True

    def is_due(self, step: int) -> bool:
        """Whether this step is one to repeat."""
        return self._is_on and step % self._every == 0

    def take(
        self, run_step: Callable[..., Any], carry: Any, batch: Any, step: int
    ) -> Any:
        """Takes a step from copies, so that what it began with is there to repeat it.

        Args:
          run_step: ``run_step(*carry, batch) -> carry``, which donates the carry.
          carry: State and interval.
          batch: The batch.
          step: Steps done.

        Raises:
          RuntimeError: If one result differs from those of the other trials.
        """

        def trial() -> tuple[Any, tuple[int, ...]]:
            new = run_step(*jax.tree.map(jnp.copy, carry), batch)
            return new, _checksums(new)

        trials = [trial()[1]]
        new, found = trial()
        if found == trials[0]:
            return new
        names = path_names(new)
        del new  # There is one state more than without an audit, and not two.
        trials.append(found)
        while len(trials) < _NUM_TRIALS:
            trials.append(trial()[1])
        common, count = collections.Counter(trials).most_common(1)[0]
        odd = next(found for found in trials if found != common)
        where = [n for n, x, y in zip(names, odd, common, strict=True) if x != y]
        if count >= _NUM_SAME:
            raise RuntimeError(_corruption(step, where, carry))
        self._is_on = False
        warn_user(
            f"`audit_every` audits no more: at step {step} the same state and batch "
            f"gave different results, {len(set(trials))} in {_NUM_TRIALS} trials, in "
            f"{', '.join(where[:3])}. The step has an operation that is not "
            "deterministic, such as a scatter on a GPU. Set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true to audit it."
        )
        return run_step(*carry, batch)


def _corruption(step: int, where: list[str], carry: Any) -> str:
    devices = {
        str(device)
        for leaf in jax.tree.leaves(carry)
        if isinstance(leaf, jax.Array)
        for device in leaf.sharding.addressable_devices
    }
    more = f" and {len(where) - 3} other arrays" if len(where) > 3 else ""
    return (
        f"Silent data corruption at step {step}: of {_NUM_TRIALS} trials of this step, "
        f"from the same state and batch, one differs in {', '.join(where[:3])}{more}. "
        "Nothing of it is saved. Take the machine out of the run (devices "
        f"{', '.join(sorted(devices))}), and resume from the last checkpoint."
    )


def _checksums(tree: Any) -> tuple[int, ...]:
    """A number for each leaf, which every flip of a single bit changes."""
    sums = jax.device_get(_sums_of_bits(jax.tree.leaves(tree)))
    return tuple(int(x) for x in sums)


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(leaf) for leaf in leaves]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    # A sum of whole numbers is the same in any order.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_ or "int4" in x.dtype.name or "int2" in x.dtype.name:
        x = x.astype(jnp.int8)
    size = min(x.dtype.itemsize, 4)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
