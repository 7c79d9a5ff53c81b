"""The carrier of a model of Flax NNX, with its optimizer, metrics and generators."""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from optax_guard._guarding.state import GuardState
from optax_guard._guarding.undoing import keep_if_skipped
from optax_guard._trees import find_states
from optax_guard.loops._carrier import Carrier

# The places of the model and of its optimizer among the objects of a state. They come
# first, so that a variable that others share counts as the model's.
_MODEL, _OPTIMIZER = 0, 1
# Before Flax 0.12 the class of all objects had another name.
_OBJECT: Any = getattr(nnx, "Pytree", None) or nnx.Object


class NnxForm(NamedTuple):
    """The parts of a state of NNX that are no arrays.

    Attributes:
      container: The structure of the user's tuple or dict, whose leaves are objects.
      places: The place of each of these objects, in their order.
      graph: The `nnx.GraphDef` of the objects in the order of places.
      of_params: The structure of the variables that are trained.
      of_stats: That of the batch statistics.
      of_optimizer: That of the variables of the optimizer.
    """

    container: Any
    places: tuple[int, ...]
    graph: Any
    of_params: Any
    of_stats: Any
    of_optimizer: Any


@dataclasses.dataclass(frozen=True)
class NnxCarrier(Carrier):
    """Carries objects of NNX.

    Attributes:
      step: The optimizer's count of steps.
      params: The variables of the model that the optimizer trains, an `nnx.State` with
        arrays in place of variables.
      opt_state: The state of the Optax optimizer, also of arrays.
      batch_stats: The `nnx.BatchStat` of the model, or ``None`` if it has none.
      rngs: Counts and keys of all generators. They move on at a skipped step.
      rest: All other variables: metrics, averages, caches.
      form: The rest of the state.
    """

    step: Any
    params: Any
    opt_state: Any
    batch_stats: Any
    rngs: Any
    rest: Any
    form: NnxForm

    def replace(self, **fields: Any) -> Self:
        """The carrier with other values of fields."""
        return dataclasses.replace(self, **fields)

    def released(self) -> Any:
        """The objects, new ones, so that nobody changes what is carried."""
        form = self.form
        objects = nnx.merge(
            form.graph,
            form.of_params.unflatten(jax.tree.leaves(self.params)),
            form.of_stats.unflatten(jax.tree.leaves(self.batch_stats)),
            # The graph has another order than Optax. They get their values below.
            form.of_optimizer.unflatten([0] * form.of_optimizer.num_leaves),
            *jax.tree.map(lambda x: x, (self.rngs, self.rest)),
        )
        optimizer = objects[_OPTIMIZER]
        _set(optimizer.step, self.step)
        variables = jax.tree.leaves(optimizer.opt_state, is_leaf=_is_variable)
        values = jax.tree.leaves(self.opt_state)
        for variable, value in zip(variables, values, strict=True):
            _set(variable, value)
        return form.container.unflatten([objects[place] for place in form.places])

    def after_step(self, state: Any) -> Any:
        """The carrier after a step. What a bad batch may have spoilt is undone."""
        new = enter_nnx(state) if holds_optimizer(state) else None
        if new is None or new.form != self.form:
            raise TypeError(
                "`train_step` must return the objects that it was given, with the same "
                "variables and settings: make caches, sown values and metrics before "
                "the run, and change modes such as `model.train()` before it too."
            )
        if not find_states(new.opt_state, GuardState):
            return new
        after, before = ({"s": x.batch_stats, "r": x.rest} for x in (new, self))
        kept = keep_if_skipped(new.opt_state, after, before)
        return new.replace(batch_stats=kept["s"], rest=kept["r"])


jax.tree_util.register_dataclass(
    NnxCarrier,
    ["step", "params", "opt_state", "batch_stats", "rngs", "rest"],
    ["form"],
)


def holds_optimizer(state: Any) -> bool:
    """Whether a tuple, a dict or another tree holds an `nnx.Optimizer`."""
    leaves = jax.tree.leaves(state, is_leaf=_is_object)
    return any(isinstance(leaf, nnx.Optimizer) for leaf in leaves)


def enter_nnx(state: Any) -> NnxCarrier:
    """The carrier of the objects in a tuple or dict."""
    named, container = jax.tree.flatten_with_path(state, is_leaf=_is_object)
    places = _places(named)
    ordered: list[Any] = [None] * len(named)
    for place, (_, node) in zip(places, named, strict=True):
        ordered[place] = node
    optimizer = ordered[_OPTIMIZER]
    is_trained = nnx.filterlib.to_predicate(optimizer.wrt)
    graph, params, stats, of_optimizer, rngs, rest = nnx.split(
        ordered,
        lambda path, x: path[0] == _MODEL and is_trained(path[1:], x),
        lambda path, x: path[0] == _MODEL and isinstance(x, nnx.BatchStat),
        lambda path, x: path[0] == _OPTIMIZER and path[1] in ("step", "opt_state"),
        _is_generator,
        ...,
    )
    if not jax.tree.leaves(params):
        raise ValueError(
            f"`state` has a model without a variable for its optimizer, whose `wrt` is "
            f"{optimizer.wrt!r}."
        )
    forms = map(jax.tree.structure, (params, stats, of_optimizer))
    return NnxCarrier(
        step=optimizer.step[...],
        params=_arrays(params)[_MODEL],
        opt_state=_arrays(optimizer.opt_state),
        batch_stats=_arrays(stats)[_MODEL] if jax.tree.leaves(stats) else None,
        rngs=rngs,
        rest=rest,
        form=NnxForm(container, places, graph, *forms),
    )


def _places(named: list[tuple[Any, Any]]) -> tuple[int, ...]:
    """The place of each object: the model's first, then its optimizer's."""
    optimizers = [i for i, (_, x) in enumerate(named) if isinstance(x, nnx.Optimizer)]
    models = [
        i
        for i, (_, x) in enumerate(named)
        if isinstance(x, nnx.Module) and not isinstance(x, nnx.Optimizer | nnx.Metric)
    ]
    if len(models) > 1:
        keys = [jax.tree_util.keystr(path, simple=True) for path, _ in named]
        models = [i for i in models if keys[i] == "model"]
    if len(models) != 1 or len(optimizers) != 1:
        raise ValueError(
            "`state` of NNX must hold one `nnx.Optimizer` and one `nnx.Module`, or one "
            "that a NamedTuple or dict calls `model`, as in `(model, optimizer)`, "
            f"got {[type(x).__name__ for _, x in named]}."
        )
    first = [models[0], optimizers[0]]
    order = first + [i for i in range(len(named)) if i not in first]
    return tuple(order.index(i) for i in range(len(named)))


def _is_object(node: Any) -> bool:
    return isinstance(node, _OBJECT | nnx.Variable)


def _is_generator(path: Any, leaf: Any) -> bool:
    del path
    if _is_variable(leaf):
        return isinstance(leaf, nnx.RngState)
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _arrays(tree: Any) -> Any:
    """The tree with the arrays of its variables."""
    return jax.tree.map(
        lambda x: x[...] if _is_variable(x) else x, tree, is_leaf=_is_variable
    )


def _set(variable: Any, value: Any) -> None:
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:  # Flax before 0.12.
        variable.value = value
