"""Saving and restoring trees of arrays with Orbax."""

import contextlib
import os
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_kind
from optax_guard._guarding.adoption import in_new_layout, in_old_layout
from optax_guard._trees import leaf_types
from optax_guard.loops._intact import METADATA
from optax_guard.stop._state import EarlyStoppingState

# The items of a checkpoint are two trees of arrays and a dict of JSON. `load_best`
# reads the first alone.
VARIABLES, TRAINING = "variables", "training"


def import_orbax(user: str) -> Any:
    """Orbax, or an error that says how to get it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"`{user}` needs Orbax: pip install 'optax-guard[checkpoint]'",
            name=error.name,
        ) from error
    return ocp


def absolute(directory: str | os.PathLike[str]) -> str:
    """The absolute path that Orbax needs; a URL stays as it is."""
    check_kind("directory", directory, (str, os.PathLike), "a path")
    path = os.fspath(directory)
    return path if "://" in path else os.path.abspath(path)


def as_path(directory: str) -> Any:
    """The path as an object that also knows buckets. Orbax brings it along."""
    from etils import epath

    return epath.Path(directory)


def open_manager(directory: str, **options: Any) -> Any:
    """A `CheckpointManager` of the three items."""
    ocp = import_orbax("Checkpointer")
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            VARIABLES: ocp.PyTreeCheckpointHandler(),
            TRAINING: ocp.PyTreeCheckpointHandler(),
            METADATA: ocp.JsonCheckpointHandler(),
        },
    )


class LatestAndBest:
    """Tells Orbax which checkpoints to keep. Orbax asks at each save.

    Orbax's own policy sorts by the metric. A NaN breaks that order, and the latest is
    deleted if it is not among the best.
    """

    def __init__(self, keep: int, keeps_first: bool):
        self.best_step = -1
        self._keep = keep
        self._keeps_first = keeps_first

    def pinned(self, steps: Sequence[int]) -> int:
        """The best step, or the first if there is no best and a rewind may need one."""
        if self.best_step >= 0 or not self._keeps_first:
            return self.best_step
        return min(steps)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Implements Orbax's `PreservationPolicy`."""
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self._keep :], self.pinned(steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def read_metadata(manager: Any, step: int) -> dict[str, Any]:
    """The item of JSON."""
    args = import_orbax("Checkpointer").args
    with _readable(manager, step):
        found = manager.restore(step, args=args.Composite(metadata=args.JsonRestore()))
        return found[METADATA]


def restore_as_numpy(manager: Any, step: int, item: str) -> Any:
    """One item as nested dicts and lists of NumPy arrays."""
    ocp = import_orbax("load_best")
    with _readable(manager, step):
        as_numpy = jax.tree.map(
            lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray),
            _saved_tree(manager, step, item),
        )
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]


def restore(manager: Any, step: int, targets: dict[str, Any]) -> dict[str, Any]:
    """Items as trees like their targets: structure, dtypes and placement."""
    ocp = import_orbax("Checkpointer")

    def restore_args(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)

    arguments = {}
    for name, target in targets.items():
        tree = jax.tree.map(_without_key, jax.tree.map(like, target))
        with _readable(manager, step):
            saved = _saved_tree(manager, step, name)
        if leaf_types(saved).keys() == leaf_types(in_old_layout(tree)).keys():
            tree = in_old_layout(tree)
        tree = _as_on_disk(tree)
        _check_same_tree(saved, tree, f"{manager.directory}, step {step}")
        arguments[name] = ocp.args.PyTreeRestore(
            item=tree, restore_args=jax.tree.map(restore_args, tree)
        )
    with _readable(manager, step):
        found = manager.restore(step, args=ocp.args.Composite(**arguments))
    return {
        name: jax.tree.map(_placed, target, in_new_layout(_as_in_memory(found[name])))
        for name, target in targets.items()
    }


def savable(tree: Any) -> Any:
    """Leaves as Orbax takes them.

    Typed keys of `jax.random` become their integers. With several processes, an array
    that each process has for itself becomes a NumPy array, which the first one saves.
    """

    def as_saved(leaf: Any) -> Any:
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        is_own = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
        return np.asarray(leaf) if is_own and jax.process_count() > 1 else leaf

    return jax.tree.map(as_saved, _as_on_disk(tree))


# A stopper's state as it was before it could average.
_Unaveraged = namedtuple("_Unaveraged", EarlyStoppingState._fields[:-1])


def _as_on_disk(tree: Any) -> Any:
    """The tree without averages that are not there, as in older checkpoints."""

    def plain(x: EarlyStoppingState) -> Any:
        return x if x.recent_params else _Unaveraged(*x[:-1])

    return _map_states(plain, tree, EarlyStoppingState)


def _as_in_memory(tree: Any) -> Any:
    return _map_states(lambda x: EarlyStoppingState(*x), tree, _Unaveraged)


def _map_states(function: Callable[[Any], Any], tree: Any, cls: type[Any]) -> Any:
    return jax.tree.map(
        lambda x: function(x) if isinstance(x, cls) else x,
        tree,
        is_leaf=lambda x: isinstance(x, cls),
    )


def like(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, and its sharding if it must stay where it is.

    An array that is not committed to its device gets no sharding: it follows the
    batches to their devices, and must do so after a restart too.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    is_placed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.ShapeDtypeStruct(
        np.shape(leaf),
        jnp.result_type(leaf),
        sharding=leaf.sharding if is_placed else None,
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_key(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _placed(target: Any, found: Any) -> Any:
    target = like(target)
    if isinstance(found, np.ndarray | np.generic):
        # A copy: the buffer of the host's array must not be donated.
        found = jnp.array(found, copy=True)
    if _is_key(target):
        impl = jax.random.key_impl(jnp.empty((), target.dtype))
        found = jax.random.wrap_key_data(found, impl=impl)
        if target.sharding is not None:
            found = jax.device_put(found, target.sharding)
    return found


def _saved_tree(manager: Any, step: int, item: str) -> Any:
    return manager.item_metadata(step)[item].tree


def _check_same_tree(saved: Any, target: Any, where: str) -> None:
    # Orbax knows the names along a path, but not whether they are keys or attributes.
    was, now = leaf_types(saved), leaf_types(target)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise ValueError(
                f"`state` and `stopper` must be those of the run that is resumed: "
                f"{name} is {now.get(name, 'not there')}, in the checkpoint it is "
                f"{was.get(name, 'not there')} ({where}). Resume with the model, the "
                "optimizer and the rule of that run, or give another directory."
            )


@contextlib.contextmanager
def _readable(manager: Any, step: int) -> Iterator[None]:
    """Turns an error into advice. The user decides whether to resume from another."""
    try:
        yield
    except Exception as error:
        others = [other for other in manager.all_steps() if other != step]
        left = f"step {max(others)}" if others else "the beginning"
        raise RuntimeError(
            f"The checkpoint of step {step} in {manager.directory} cannot be read "
            f"({type(error).__name__}). If it is damaged, remove its directory: a "
            f"resumed run then goes on from {left}."
        ) from error
