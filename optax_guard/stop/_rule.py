"""Stop rules: their inputs, their verdict, and the reasons that they may name."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_guard._checks import check_choice, uncalled


class StopReason(enum.IntEnum):
    """Why a run stopped; ``message`` says it in words, with advice.

    The numbers are written into checkpoints: none ever gets another meaning.
    """

    message: str

    # A default, because mypy checks `StopReason(1)` as a call of this.
    def __new__(cls, number: int, message: str = "") -> "StopReason":
        """Attaches the message to the number."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.message = message
        return member

    RUNNING = 0, "No rule has fired."
    PATIENCE = (
        1,
        "No improvement that counts within the patience. If the curve was still "
        "falling, raise the patience or lower `min_delta`; a `Checkpointer` with "
        "`continue_stopped=True` goes on in the same directory.",
    )
    TARGET = 2, "The target was reached."
    DIVERGED = (
        3,
        "The value passed the divergence threshold. Lower the learning rate, or "
        "clip the gradients.",
    )
    NONFINITE = (
        4,
        "The value was NaN or infinite. Look at the last batches and gradient norms; "
        "`guard` skips steps with non-finite gradients.",
    )
    BUDGET = (
        5,
        "The budget of evaluations, steps or seconds is spent. To go on, call `reset` "
        "of a stopper with a larger budget.",
    )
    GENERALIZATION_LOSS = (
        6,
        "The value rose too far above its best (Prechelt's GL). Regularize, or raise "
        "`alpha`.",
    )
    PROGRESS_QUOTIENT = (
        7,
        "The value rose above its best while training hardly progressed (Prechelt's "
        "PQ). Lower the learning rate, or raise `alpha`.",
    )
    SUCCESSIVE_RISES = (
        8,
        "The value rose in strip after strip (Prechelt's UP). Regularize, or raise "
        "`s` or `k`.",
    )
    LAG = (
        9,
        "The value is worse than it was `k` evaluations ago. If it is only noisy, "
        "smooth it or raise `s`.",
    )
    OVERFITTING = (
        10,
        "Training still improves while the value gets worse: the model overfits. "
        "Regularize, add data, or make the model smaller.",
    )
    SKIP_STORM = (
        11,
        "The guard skips too many steps. Look at the skipped steps it recorded, and "
        "at the data.",
    )
    PLATEAU = (
        12,
        "The value stalled again after the last reduction of the learning rate. More "
        "training at this rate will not help.",
    )
    EXTERNAL = 13, "A rule that is not part of this library fired."


# With these reasons, training went wrong. With the others it is done.
GONE_BAD = (StopReason.DIVERGED, StopReason.NONFINITE, StopReason.SKIP_STORM)


class Observation(NamedTuple):
    """The inputs of a rule at one evaluation.

    Attributes:
      value: Value to judge, float32, shape (); smoothed if asked, with the sign that
        makes smaller better. It has no meaning unless ``valid``.
      raw: The value before smoothing, float32, shape ().
      valid: Whether the value is finite and past the warm-up, bool, shape (). Only
        such a value may enter references and windows.
      counts: Whether the evaluation uses up patience, bool, shape (): it is valid,
        or non-finite under ``nonfinite="wait"``.
      num_evals: Evaluations so far, this one included, int32, shape ().
      sign: 1.0 if smaller is better, -1.0 if larger is; a Python number.
      metrics: The values that `monitor` names, as the user gave them, float32.
      bad_counts: Whether non-finite values count; a Python bool.
      visible: Whether the warm-up is over, bool, shape ().
      step: Training steps done, int32, shape (), or None if not given.
      seconds: Seconds of training so far, float32, shape (), or None if not given.
      train_value: Training values since the last evaluation, float32, shape (m,), as
        the user gave them, or None if no rule needs them.
      opt_state: State of the optimizer, or None if no rule needs it.
    """

    value: jax.Array
    raw: jax.Array
    valid: jax.Array
    counts: jax.Array
    num_evals: jax.Array
    sign: float
    metrics: dict[str, jax.Array]
    bad_counts: bool
    visible: jax.Array
    step: jax.Array | None = None
    seconds: jax.Array | None = None
    train_value: jax.Array | None = None
    opt_state: Any = None


class Verdict(NamedTuple):
    """The answer of a rule: whether it is true now, and why.

    Attributes:
      fired: Whether the rule is true now, bool, shape ().
      reason: Its `StopReason`, int32, shape (); without meaning unless ``fired``.
      significant: Whether the value improved by enough to count, bool, shape (), or
        None if the rule does not say.
    """

    fired: jax.Array
    reason: jax.Array
    significant: jax.Array | None = None


class StopRule(NamedTuple):
    """A pair of pure functions that says, at each evaluation, "true now" or not.

    A rule does not remember that it was true: only `early_stopping` latches. So
    rules compose: a stall that ends before the time of `not_before` stops nothing.

    Attributes:
      init: Function of no arguments that returns the rule's state, a pytree of arrays
        whose structure, shapes and dtypes never change.
      update: Function ``(observation, state) -> (verdict, state)``.
      needs: The names among ``step``, ``seconds``, ``train_value`` and ``opt_state``
        that the rule reads; a loop that cannot provide one refuses the rule.
      keys: Keys that the rule reads from a ``value`` that is a dict.
    """

    init: Callable[[], Any]
    update: Callable[[Observation, Any], tuple[Verdict, Any]]
    needs: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()


def verdict_for(
    fired: jax.Array, reason: StopReason, significant: jax.Array | None = None
) -> Verdict:
    """Builds a `Verdict` whose reason is fixed."""
    return Verdict(fired, jnp.asarray(int(reason), jnp.int32), significant)


def no_state() -> tuple[()]:
    """Returns the state of a rule that has none."""
    return ()


def train_values(observation: Observation) -> jax.Array:
    """Returns the training values that a rule needs, float32, shape (m,)."""
    values = observation.train_value
    assert values is not None  # `needs` has been checked
    return values.astype(jnp.float32)


def as_float(number: ArrayLike) -> jax.Array:
    """Casts a hyperparameter to float32, the dtype of the values."""
    return jnp.asarray(number, jnp.float32)


def as_int(number: ArrayLike) -> jax.Array:
    """Casts a hyperparameter to int32, the dtype of the counts."""
    return jnp.asarray(number, jnp.int32)


def check_rule(rule: object, where: str) -> None:
    """Refuses anything that is not a `StopRule`."""
    if not isinstance(rule, StopRule):
        raise TypeError(
            f"`rule` of `{where}` must be a stop rule such as `stop.patience(5)`, got "
            f"{rule!r} of type {type(rule).__name__}.{uncalled(rule)}"
        )


def sign_of(mode: str) -> float:
    """Returns the factor that makes smaller better, or refuses the mode."""
    check_choice("mode", mode, ("min", "max"))
    return 1.0 if mode == "min" else -1.0
