"""One guarded step of which each entry is taken only if it is finite."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_guard._guarding.entries import Kept, Told, is_any, with_old_entries
from optax_guard._guarding.step import keeping, zeros_unless

# On CPU, a mask of up to so many gradients costs less than a branch. Of more, the
# copies that XLA makes for the mask cost more than a look before the step.
_SMALL = 1 << 17


class EntryStep(NamedTuple):
    """A step of which each entry is taken only if it is finite; see ``entries.py``.

    Attributes:
      take: ``take(grads, *kept)`` gives parameters or updates, and the optimizer's
        state. ``kept`` is parameters and state before the step, or the state alone.
      keep: ``keep(grads, *kept)`` gives the results of a step that is not taken.
      find: ``find(results, kept)`` gives the ``Kept`` of a step.
      tell: ``tell(found)`` gives the records of it; of ``None`` those of a step that is
        not taken.
    """

    take: Callable[..., tuple[Any, Any]]
    keep: Callable[..., tuple[Any, Any]]
    find: Callable[[tuple[Any, Any], tuple[Any, ...]], Kept]
    tell: Callable[[Kept | None], Told]

    def masked(self, is_taken: Any, grads: Any, *kept: Any) -> tuple[Any, Told]:
        """The step by a selection: of all entries, and of each."""
        results, old = self.take(grads, *kept), self.keep(grads, *kept)
        found = self.find(results, kept)
        each = zip(results, old, found, strict=True)
        first, state = (with_old_entries(*trees, is_taken) for trees in each)
        return (first, state), self.tell(found)

    def untouched(self, grads: Any, *kept: Any) -> tuple[Any, Told]:
        return self.keep(grads, *kept), self.tell(None)

    def by_branch(self, is_taken: jax.Array, grads: Any, *kept: Any) -> Any:
        """The step by a branch, with the selection of each entry inside of it."""
        branches = [self.untouched, functools.partial(self.masked, True)]
        return lax.switch(is_taken.astype(jnp.int32), branches, grads, *kept)

    def looked_at_first(self, is_taken: jax.Array, grads: Any, *kept: Any) -> Any:
        """The step is computed once to look, and once to take all of it or some."""
        found = self.find(self.take(grads, *kept), kept)
        is_clean, told = ~is_any(found), self.tell(found)
        trees = self.keep(grads, *kept)
        for is_here, act in (
            (is_taken & ~is_clean, self._take_some),
            (is_taken & is_clean, self._take_all),
        ):
            act = functools.partial(act, 2 - len(kept))
            trees = lax.switch(is_here.astype(jnp.int32), [_pass, act], grads, *trees)
        return trees, told

    def _take_some(self, num_first: int, grads: Any, *trees: Any) -> tuple[Any, ...]:
        # XLA on CPU keeps the copies of a selection inside of a loop. A branch with
        # copies would make it copy in the branches beside it. It removes a loop of one
        # turn, so there is a turn before, which takes nothing.
        def turn(trees: Any, is_taken: jax.Array) -> tuple[Any, None]:
            return self.masked(is_taken, grads, *trees[num_first:])[0], None

        return lax.scan(turn, trees, jnp.array([False, True]))[0]

    def _take_all(self, num_first: int, grads: Any, *trees: Any) -> tuple[Any, ...]:
        return self.take(grads, *trees[num_first:])


def _pass(grads: Any, *trees: Any) -> tuple[Any, ...]:
    del grads
    return trees


def take_entries(
    is_taken: jax.Array,
    take: Callable[..., tuple[Any, Any]],
    find: Callable[[tuple[Any, Any], tuple[Any, ...]], Kept],
    tell: Callable[[Kept | None], Told],
    grads: Any,
    kept: tuple[Any, ...],
    *,
    hides_bad: bool,
    use_cond: bool,
) -> tuple[tuple[Any, Any], Told]:
    """As ``take_or_keep``, but each entry is taken only if the result is finite.

    Args:
      is_taken: bool[].
      take: As of ``EntryStep``.
      find: As of ``EntryStep``.
      tell: As of ``EntryStep``.
      grads: The gradients.
      kept: Parameters and state before the step, or the state alone.
      hides_bad: As for ``take_or_keep``.
      use_cond: As for ``take_or_keep``.

    Returns:
      The results, and what is told of the entries that kept their old values.
    """
    take = jax.jit(take, inline=True)
    keep: Any = keeping(jax.eval_shape(take, grads, *kept), len(kept))
    step = EntryStep(take, keep, find, tell)

    is_small = _is_small(grads)

    def mask(grads: Any, *kept: Any) -> tuple[Any, Told]:
        seen = zeros_unless(is_taken, grads) if hides_bad or is_small else grads
        return step.masked(is_taken, seen, *kept)

    if use_cond:
        return step.by_branch(is_taken, grads, *kept)
    if is_small:
        return mask(grads, *kept)
    cpu = step.by_branch if _is_manual() else step.looked_at_first
    cpu = functools.partial(cpu, is_taken)
    return lax.platform_dependent(grads, *kept, cpu=cpu, default=mask)


def _is_small(tree: Any) -> bool:
    return sum(x.size for x in jax.tree.leaves(tree)) <= _SMALL


def _is_manual() -> bool:
    """Whether devices run the step by hand; they must take one branch together."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
