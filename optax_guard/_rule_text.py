"""A stop rule from its text, as in a command: no code is run."""

import ast
import inspect
from typing import Any

from optax_guard import stop
from optax_guard._stop_base import StopRule


def parse_rule(text: str) -> StopRule:
    """The rule that a call such as ``any_of(patience(5), target(0.1))`` describes.

    Args:
      text: A call of a rule or a combinator of `optax_guard.stop`, whose arguments are
        numbers, strings or such calls.

    Returns:
      The rule.

    Raises:
      ValueError: If it is anything else, or the rule refuses its arguments.

    Examples:
      >>> parse_rule("patience(5, min_delta=0.01)").needs
      frozenset()
    """
    try:
        rule = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"`rule` must be a call, got {text!r}.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"`rule` {text!r}: {error}") from error
    if not isinstance(rule, StopRule):
        raise ValueError(f"`rule` must be a call of a rule, got {text!r}.")
    return rule


def _value(node: ast.AST) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    known = {
        name: function
        for name, function in vars(stop).items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation is StopRule
    }
    if name not in known:
        raise ValueError(f"no rule {name!r}; there are {', '.join(sorted(known))}.")
    if any(isinstance(x, ast.Starred) for x in node.args) or any(
        keyword.arg is None for keyword in node.keywords
    ):
        raise ValueError("arguments must be written out, without stars.")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return known[name](*map(_value, node.args), **arguments)
