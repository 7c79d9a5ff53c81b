"""Populations: many runs in one program, each stopping at its own time."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_guard._checks import check_number, static_count
from optax_guard._records.progress import Progress, open_display
from optax_guard._trees import as_argument
from optax_guard.loops._evaluation import tracked
from optax_guard.loops._inputs import (
    Functions,
    check_arguments,
    check_functions,
    check_steps,
    copied,
)
from optax_guard.loops._lane import (
    Lane,
    advance,
    evaluation_of,
    first_lane,
    next_evaluation,
)
from optax_guard.loops._result import FitResult, as_result, split_best
from optax_guard.stop._state import EarlyStoppingState

# How often a display hears of the run.
_NUM_REPORTS = 50


class PopulationResult(NamedTuple):
    """What `train_population` returns; members in the order in which they were given.

    Attributes:
      state: The states after each member's last evaluation; leaves have a leading axis
        of n. What is not an array in them (`tx`, `apply_fn`) is the first member's.
      best_params: Parameters of each member's best evaluation, or of its `state` if
        none was finite; leading axis n; ``None`` without a stopper.
      stop: The `EarlyStoppingState` of each, leading axis n; ``None`` without a
        stopper.
      history: One array a column of `fit`'s history, shape (n, rows). Beyond a member's
        last row, floats are NaN and integers 0.
      num_rows: Evaluations of each member, int32[n].
      best_batch_stats: `batch_stats` of the best evaluation, as `best_params`; ``None``
        if the states have none.
    """

    state: Any
    best_params: Any
    stop: EarlyStoppingState | None
    history: dict[str, jax.Array]
    num_rows: jax.Array
    best_batch_stats: Any = None

    def member(self, i: int) -> FitResult:
        """What `train_on_device` would have returned for the i-th member alone.

        Args:
          i: Index of the member, from 0, or from -1 backwards.

        Raises:
          TypeError: If it is no whole number.
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
        result = as_result(
            one["state"], None, one["stop"], one["history"], one["num_rows"]
        )
        return result._replace(
            best_params=one["best_params"], best_batch_stats=one["best_batch_stats"]
        )


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
    on. All train side by side, a step of all being one batched step, until no more than
    half of them go on; then these are packed into a batch of that size, and so on, but
    not in the last eighth of the steps. So the loop is compiled for at most log2(n) + 1
    sizes, each at its first use, and not again by a second call with the same ``build``
    and shapes.

    As in any batched program a choice computes both sides: an evaluation copies the
    best parameters of all whether they improved or not, and states are held twice.

    Args:
      build: ``build(member) -> dict`` of the arguments of `train_on_device`: ``state``,
        ``train_step``, ``batches`` and, if wanted, ``evaluate`` and ``stopper``. It is
        traced: numbers of the member may set the seed, the order of data, ``max_norm``,
        the learning rate, weight decay or patience, but no shape. Large arrays are best
        passed through `jax.tree_util.Partial`.
      members: A tree of arrays whose leading axis, n, counts the members.
      num_steps: As for `train_on_device`.
      eval_every: As for `train_on_device`.
      progress: Whether to show a progress bar and a table; or a display of one's own.
        The host then looks at the run now and then, 50 times in all.

    Returns:
      A `PopulationResult`. A member whose guard is exhausted ends without an error:
      ``optax_guard.metrics(result.state)["guard_exhausted"]`` says which.

    Raises:
      ValueError: If an argument is out of range, ``members`` have no common leading
        axis, states do not start at one step, or a function returns a wrong shape.
      TypeError: If an argument or what a function returns is of the wrong kind.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_guard as og
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
    build = as_argument(build)
    lanes, steps = start(build, members, num_steps=num_steps, eval_every=eval_every)
    step = _common_step(jax.device_get(steps), num_steps)
    # A smaller batch has to be compiled, which does not pay for the end of the run.
    late = num_steps - (num_steps - step) // 8
    every = (
        -(-(num_steps - step) // _NUM_REPORTS) if progress is not False else num_steps
    )

    places, everyone, batch = np.arange(size), lanes, members
    with open_display(progress, num_steps - step) as display:
        while True:
            smaller = len(places) // 2 if step < late else 0
            end = late if step < late else num_steps
            now, lanes = advance_all(
                build,
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
                break
            # Who has stopped fills up the batch: nothing changes them any more.
            places = places[np.argsort(is_over, kind="stable")[:smaller]]
            lanes, batch = pick((everyone, members), places)

    first = jax.tree.map(lambda leaf: leaf[0], members)
    template = jax.eval_shape(lambda: built(build, first)[1])
    state = jax.tree.unflatten(jax.tree.structure(template), everyone.state)
    best = None if everyone.stop is None else best_of(everyone.stop, tracked(state))
    best_params, best_batch_stats = split_best(state, best)
    return PopulationResult(
        state=state,
        best_params=best_params,
        stop=everyone.stop,
        history=everyone.rows,
        num_rows=everyone.num_rows,
        best_batch_stats=best_batch_stats,
    )


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
    """A row for the display: how many go on, and between what the best values lie."""
    row: dict[str, float] = {"step": step, "running": running}
    if lanes.stop is not None:
        values = np.asarray(lanes.stop.best_value)
        finite = values[np.isfinite(values)]
        row["lowest_best"] = float(finite.min(initial=np.inf))
        row["highest_best"] = float(finite.max(initial=-np.inf))
    return row


_NEEDED = {"state", "train_step", "batches"}
_KNOWN = _NEEDED | {"evaluate", "stopper"}
# The axis along which members lie, for the one question they answer together.
_AXIS = "members"


def built(
    build: Callable[[Any], Mapping[str, Any]], member: Any
) -> tuple[Functions, Any]:
    """A member's functions, and the state it starts from."""
    made = build(member)
    if not (isinstance(made, Mapping) and _NEEDED <= made.keys() <= _KNOWN):
        got = sorted(made) if isinstance(made, Mapping) else repr(made)
        raise TypeError(
            f"`build` must return a dict with the keys {sorted(_NEEDED)} and, if "
            f"wanted, {sorted(_KNOWN - _NEEDED)}, got {got}."
        )
    functions = Functions(
        made["train_step"],
        made["batches"],
        made.get("evaluate"),
        made.get("stopper"),
    )
    check_arguments(made["state"], functions.evaluate, functions.stopper)
    check_functions(functions)
    return functions, made["state"]


# A state may hold functions that `build` makes anew each time it is traced. So between
# programs there are only its leaves; each program puts them into a state of its own.


@functools.partial(jax.jit, static_argnames=("num_steps", "eval_every"))
def start(
    build: Any, members: Any, *, num_steps: int, eval_every: int
) -> tuple[Lane, jax.Array]:
    def one(member: Any) -> tuple[Lane, jax.Array]:
        functions, state = built(build, member)
        state = copied(state)
        lane = first_lane(
            functions, evaluation_of(functions), state, num_steps, eval_every
        )
        return lane._replace(state=jax.tree.leaves(lane.state)), state.step

    return jax.vmap(one)(members)


@functools.partial(
    jax.jit, static_argnames=("num_steps", "eval_every"), donate_argnames="lanes"
)
def advance_all(
    build: Any,
    members: Any,
    lanes: Lane,
    step: jax.Array,
    until: jax.Array,
    smaller: jax.Array,
    *,
    num_steps: int,
    eval_every: int,
) -> tuple[jax.Array, Lane]:
    """Trains until a step, or until so few go on that a smaller batch holds them."""

    def one(member: Any, lane: Lane) -> tuple[jax.Array, Lane]:
        functions, state = built(build, member)
        judge = evaluation_of(functions)

        # The same for all members: a condition of each one's own would make the loop
        # choose between old and new states at every step.
        def goes_on(carry: tuple[jax.Array, Lane]) -> jax.Array:
            step, lane = carry
            running = jax.lax.psum((~lane.is_over).astype(jnp.int32), _AXIS)
            return (step < until) & (running > smaller)

        def go(carry: tuple[jax.Array, Lane]) -> tuple[jax.Array, Lane]:
            step, old = carry
            then = next_evaluation(step, num_steps, eval_every)
            new = advance(functions, judge, old, step, then)
            rows = new.rows
            new, old = new._replace(rows={}), old._replace(rows={})
            kept = jax.tree.map(functools.partial(jnp.where, old.is_over), old, new)
            return then, kept._replace(rows=rows)

        state = jax.tree.unflatten(jax.tree.structure(state), lane.state)
        carry = step, lane._replace(state=state)
        now, lane = jax.lax.while_loop(goes_on, go, carry)
        return now, lane._replace(state=jax.tree.leaves(lane.state))

    vmapped = jax.vmap(one, axis_name=_AXIS, out_axes=(None, 0))
    return vmapped(members, lanes)


@functools.partial(jax.jit, donate_argnums=0)
def put(everyone: Any, lanes: Any, places: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a.at[places].set(b), everyone, lanes)


@jax.jit
def pick(everyone: Any, places: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[places], everyone)


@jax.jit
@jax.vmap
def best_of(stop: EarlyStoppingState, params: Any) -> Any:
    has_best = functools.partial(jnp.where, stop.best_eval >= 0)
    return jax.tree.map(has_best, stop.best_params, params)
