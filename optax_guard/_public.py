"""The public face: names of modules, and answers to calls with wrong arguments."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from optax_guard._wrong_guesses import WRONG_GUESSES

P = ParamSpec("P")
R = TypeVar("R")


def publish(module: str, states: Sequence[str] = ()) -> None:
    """Gives the public objects of a module its name as their ``__module__``.

    Pickles then name a public path, which stays when a file moves, and tracebacks and
    ``help`` show the path that a user imports. An object that an earlier public module
    has published keeps the name of that one.

    Args:
      module: ``__name__`` of a public module. All in its ``__all__`` is published.
      states: Further names: classes of states, which users meet but never construct.
    """
    namespace = vars(sys.modules[module])
    for name in (*namespace["__all__"], *states):
        value = namespace.get(name)  # A module that is imported on first use is absent.
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if "._" in value.__module__:
            value.__module__ = module


def answers_wrong_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a call that does not fit the signature fail with advice.

    Users of Optax, Keras, Torch and Flax guess the names that these use. A call that
    fits pays for one more Python call and nothing else.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            trace = error.__traceback__
            # An error of the binding has no frame below this one.
            if trace is None or trace.tb_next is not None:
                raise
            raise TypeError(_answer(function, args, kwargs, error)) from None

    return call


def _answer(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> str:
    name = function.__qualname__.replace(".<locals>", "")
    parameters = inspect.signature(function).parameters
    known = {
        guess: advice
        for guesses, advice in WRONG_GUESSES.get(name, {}).items()
        for guess in guesses.split()
    }
    for guess, value, problem in _problems(parameters, args, kwargs):
        if guess in known:
            shown = (
                repr(value) if isinstance(value, bool | int | float | str) else "..."
            )
            advice = known[guess].replace("{}", shown)
            return f"`{function.__name__}` {problem}. {advice}"
    text = str(error).removesuffix(".").replace(".<locals>", "")
    several = {p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL}
    named = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [name for name in named if name not in several]
    for guess in [k for k in kwargs if k not in named]:
        close = difflib.get_close_matches(guess, named, n=1)
        if close and "Did you mean" not in text:
            text += f". Did you mean `{close[0]}`?"
    end = "" if text.endswith("?") else "."
    listed = ", ".join([*(f"`*{n}`" for n in several), *(f"`{n}`" for n in named)])
    return f"{text}{end} The arguments are {listed}."


def _problems(
    parameters: Mapping[str, inspect.Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[tuple[str, Any, str]]:
    """Yields a key of the table, the value given and the problem in words."""
    kinds = [p.kind for p in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        several = {p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL}
        for guess in [k for k in kwargs if k not in parameters.keys() - several]:
            yield guess, kwargs[guess], f"has no argument `{guess}`"
    positional = [
        p.name
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(args) > len(positional):
        yield "*", args[len(positional)], "got too many arguments without a name"
    given = {*positional[: len(args)], *kwargs}
    for p in parameters.values():
        is_one = p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if is_one and p.default is p.empty and p.name not in given:
            yield p.name, None, f"needs the argument `{p.name}`"
