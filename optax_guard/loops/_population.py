"""Populations: many runs in one program, each stopping at its own time."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_guard._checks import check_number, static_count
from optax_guard._records.progress import Progress, open_display
from optax_guard.loops._batch import (
    average_each,
    best_of,
    built,
    compiled_batch,
    pick,
    put,
)
from optax_guard.loops._carrier import released
from optax_guard.loops._compiled import taken_apart
from optax_guard.loops._ema import ema_params
from optax_guard.loops._evaluation import tracked
from optax_guard.loops._inputs import check_steps
from optax_guard.loops._lane import Lane
from optax_guard.loops._result import FitResult, as_result, average_params, split_best
from optax_guard.stop._state import EarlyStoppingState

# Number of reports to a display.
_NUM_REPORTS = 50


class PopulationResult(NamedTuple):
    """The result of `train_population`, with the members in the order given.

    Attributes:
      state: The states after each member's last evaluation; leaves have a leading axis
        of n. Their parts that are not arrays (`tx`, `apply_fn`) are the first member's.
      best_params: Parameters of each member's best evaluation, or of its `state` if
        none was finite; leading axis n; ``None`` without a stopper.
      stop: The `EarlyStoppingState` of each member, leading axis n; ``None`` without a
        stopper.
      history: One array a column of `fit`'s history, shape (n, rows). Beyond a member's
        last row, floats are NaN and integers 0.
      num_rows: Evaluations of each member, int32[n].
      best_batch_stats: `batch_stats` of the best evaluation, as `best_params`; ``None``
        if the states have none.
      ema_params: With ``ema``, the average after each member's last step; else
        ``None``.
      average_params: The same of `FitResult`, leading axis n.
    """

    state: Any
    best_params: Any
    stop: EarlyStoppingState | None
    history: dict[str, jax.Array]
    num_rows: jax.Array
    best_batch_stats: Any = None
    ema_params: Any = None
    average_params: Any = None

    def member(self, i: int) -> FitResult:
        """The result that `train_on_device` would return for the i-th member alone.

        Args:
          i: Index of the member, from 0, or from -1 backwards.

        Raises:
          TypeError: If ``i`` is no whole number.
          IndexError: If there is no such member.
        """
        check_number("i", i)
        try:
            i = operator.index(i)
        except TypeError as error:
            raise TypeError(f"`i` must be a whole number, got {i!r}.") from error
        if not -len(self.num_rows) <= i < len(self.num_rows):
            raise IndexError(
                f"`i` must be below the number of members, {len(self.num_rows)}, got "
                f"{i}."
            )
        one = jax.tree.map(lambda leaf: leaf[i], self._asdict())
        result = as_result(one["state"], None, None, one["history"], one["num_rows"])
        kept = "best_params", "best_batch_stats", "stop", "ema_params", "average_params"
        return result._replace(**{name: one[name] for name in kept})


def train_population(
    build: Callable[[Any], Mapping[str, Any]],
    members: Any,
    *,
    num_steps: int,
    eval_every: int,
    progress: bool | Progress = False,
) -> PopulationResult:
    """Trains n runs at once on the device, each stopping at its own time.

    Each member is the run that ``train_on_device(**build(member), ...)`` makes alone,
    to rounding, and none influences another: one that diverges ends, and the others go
    on. All train side by side, and a step of all is one batched step. As soon as no
    more than half of them go on, these are packed into a batch of that size, and so on,
    but not in the last eighth of the steps. So the loop is compiled for at most
    log2(n) + 1 sizes, each at its first use. A second call with the same ``build`` and
    shapes does not compile it again.

    As in any batched program a choice computes both sides: an evaluation copies the
    best parameters of all whether they improved or not, and states are held twice.

    Args:
      build: ``build(member) -> dict`` of the arguments of `train_on_device`: ``state``,
        ``train_step``, ``batches`` and, if wanted, ``evaluate``, ``stopper`` and
        ``ema``. It is
        traced: numbers of the member may set the seed, the order of data, ``max_norm``,
        the learning rate, weight decay or patience, but no shape. Large arrays are best
        passed through `jax.tree_util.Partial`.
      members: A tree of arrays whose leading axis, n, counts the members.
      num_steps: As for `train_on_device`.
      eval_every: As for `train_on_device`.
      progress: Whether to show a progress bar and a table; or the user's own display.
        The host then looks at the run 50 times in all.

    Returns:
      A `PopulationResult`. A member whose guard is exhausted ends without an error:
      ``optax_guard.metrics(result.state)["guard_exhausted"]`` says which.

    Raises:
      ValueError: If an argument is out of range, ``members`` have no common leading
        axis, states do not start at one step, or a function returns a wrong shape.
      TypeError: If an argument or the result of a function is of the wrong kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_guard as og
      >>> from optax_guard.flax import TrainState
      >>> from optax_guard.loops import train_population
      >>> def train_step(state, x):
      ...     loss, grads = jax.value_and_grad(lambda p: (p - x) ** 2)(state.params)
      ...     return state.apply_gradients(grads=grads, value=loss), loss
      >>> def build(member):
      ...     tx = og.guard(optax.sgd(member["rate"]), clip=1.0)
      ...     params = jnp.array(0.5)
      ...     return {
      ...         "state": TrainState.create(apply_fn=None, params=params, tx=tx),
      ...         "train_step": train_step,
      ...         "batches": lambda step: 0.0,
      ...         "evaluate": lambda state: state.params**2,
      ...         "stopper": og.early_stopping(og.stop.target(0.01)),
      ...     }
      >>> members = {"rate": jnp.array([0.1, 0.2, 0.4])}
      >>> result = train_population(build, members, num_steps=9, eval_every=3)
      >>> result.num_rows, result.stop.should_stop
      (Array([3, 2, 1], dtype=int32), Array([ True,  True,  True], dtype=bool))
    """
    num_steps = static_count("num_steps", num_steps)
    eval_every = static_count("eval_every", eval_every)
    if not callable(build):
        raise TypeError(f"`build` must be a function of a member, got {build!r}.")
    size = _size(members)
    function, arguments = taken_apart(build)
    batch = compiled_batch(function)
    start = functools.partial(batch.start, arguments)
    lanes, steps = start(members, num_steps=num_steps, eval_every=eval_every)
    step = _common_step(jax.device_get(steps), num_steps)
    with open_display(progress, num_steps - step) as display:
        lanes = _train(
            functools.partial(batch.advance, arguments),
            members,
            lanes,
            step,
            display,
            size=size,
            num_steps=num_steps,
            eval_every=eval_every,
            is_shown=progress is not False,
        )

    first = jax.tree.map(lambda leaf: leaf[0], members)
    template = jax.eval_shape(lambda: built(build, first)[1])
    state = jax.tree.unflatten(jax.tree.structure(template), lanes.state)
    best = None if lanes.stop is None else best_of(lanes.stop, tracked(state))
    best_params, best_batch_stats = split_best(state, best)
    return PopulationResult(
        state=released(state),
        best_params=best_params,
        stop=lanes.stop,
        history=lanes.rows,
        num_rows=lanes.num_rows,
        best_batch_stats=best_batch_stats,
        ema_params=ema_params(state),
        average_params=average_params(state, lanes.stop, average_each),
    )


def _train(
    advance: Callable[..., Any],
    members: Any,
    lanes: Lane,
    step: int,
    display: Any,
    *,
    size: int,
    num_steps: int,
    eval_every: int,
    is_shown: bool,
) -> Lane:
    """Trains all members to their ends, in ever smaller batches."""
    # A smaller batch has to be compiled, which does not pay for the end of the run.
    late = num_steps - (num_steps - step) // 8
    every = -(-(num_steps - step) // _NUM_REPORTS) if is_shown else num_steps
    places, everyone, batch = np.arange(size), lanes, members
    while True:
        smaller = len(places) // 2 if step < late else 0
        end = late if step < late else num_steps
        now, lanes = advance(
            batch,
            lanes,
            np.int32(step),
            np.int32(min(end, step + every)),
            np.int32(smaller),
            num_steps=num_steps,
            eval_every=eval_every,
        )
        now, is_over = jax.device_get((now, lanes.is_over))
        running = int(np.sum(~is_over))
        display.advance(int(now) - step)
        display.row(_report(int(now), running, lanes))
        step = int(now)
        is_done = step >= num_steps or running == 0
        if not is_done and running > smaller:
            continue
        everyone = lanes if len(places) == size else put(everyone, lanes, places)
        if is_done:
            return everyone
        # Members that have stopped fill up the batch: they change no more.
        places = places[np.argsort(is_over, kind="stable")[:smaller]]
        lanes, batch = pick((everyone, members), places)


def _size(members: Any) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(members)]
    size = shapes[0][0] if shapes and shapes[0] else 0
    if size == 0 or any(shape[:1] != (size,) for shape in shapes):
        raise ValueError(
            "`members` must be a tree of arrays with a common leading axis, the number "
            f"of members, got the shapes {shapes}."
        )
    return size


def _common_step(steps: np.ndarray, num_steps: int) -> int:
    if np.any(steps != steps[0]):
        raise ValueError(
            "`state` of every member must start at the same step, got steps "
            f"{sorted(set(steps.tolist()))}."
        )
    check_steps(int(steps[0]), num_steps)
    return int(steps[0])


def _report(step: int, running: int, lanes: Lane) -> dict[str, float]:
    """A row for the display: the members that go on, and the range of best values."""
    row: dict[str, float] = {"step": step, "running": running}
    if lanes.stop is not None:
        values = np.asarray(lanes.stop.best_value)
        finite = values[np.isfinite(values)]
        row["lowest_best"] = float(finite.min(initial=np.inf))
        row["highest_best"] = float(finite.max(initial=-np.inf))
    return row
