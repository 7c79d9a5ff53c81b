"""`optax-guard replay`: where stop rules would have stopped a recorded run."""

import ast
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optax_guard import stop
from optax_guard._cli.report import fresh
from optax_guard._records.history import History
from optax_guard.analysis._replay import Replayed, replay
from optax_guard.analysis._table import table
from optax_guard.stop._rule import StopRule

# Deeper nesting than a reader could follow would exhaust Python's own parser.
_LONGEST = 1000
# What to write for a rule of which only the name was given.
EXAMPLES = {
    "all_of": "all_of(patience(5), target(0.1))",
    "any_of": "any_of(patience(5), target(0.1))",
    "budget": "budget(evaluations=50)",
    "cooldown": "cooldown(patience(5), 3)",
    "divergence": "divergence(2.0)",
    "generalization_loss": "generalization_loss(5.0)",
    "held_for": "held_for(target(0.1), 3)",
    "lag": "lag(5)",
    "monitor": "monitor('val_accuracy', patience(5))",
    "not_before": "not_before(patience(5), evaluations=10)",
    "overfitting": "overfitting(5)",
    "patience": "patience(5)",
    "plateau": "plateau(10)",
    "progress_quotient": "progress_quotient(0.5, 5)",
    "skip_storm": "skip_storm(3)",
    "successive_rises": "successive_rises(3)",
    "target": "target(0.1)",
}
DEFAULT_RULES = tuple(f"patience({n})" for n in (1, 2, 3, 5, 8, 13, 20))


def play(
    path: Path, texts: Sequence[str], *, key: str | None, mode: str | None, **how: Any
) -> tuple[History, list[Replayed]]:
    """Reads a run and plays it to the rules; ``how`` as for `History.read`."""
    history = History.read(path, **how)
    rules = {text: parse_rule(text) for text in texts or DEFAULT_RULES}
    return history, replay(history, rules, key=key, mode=mode)


def as_json(replayed: Sequence[Replayed]) -> str:
    """One JSON object; numbers that are not finite are null."""
    return json.dumps(
        {
            "rules": [
                {
                    name: None if isinstance(x, float) and not math.isfinite(x) else x
                    for name, x in (one._asdict() | {"reason": one.reason.name}).items()
                }
                for one in replayed
            ]
        },
        allow_nan=False,
    )


def write(
    history: History, replayed: Sequence[Replayed], out: Path, *, key: str | None
) -> list[Path]:
    """Writes the table, and with matplotlib the figure, into the folder."""
    text = fresh(out / "replay.txt")
    text.write_text(table(replayed) + "\n", encoding="utf-8")
    try:
        from optax_guard.plotting._replay import plot_replay
    except ImportError:
        return [text]
    picture = fresh(out / "replay.png")
    plot_replay(history, replayed, key=key).savefig(picture)
    return [text, picture]


def parse_rule(text: str) -> StopRule:
    """Makes the rule of a call such as ``any_of(patience(5), target(0.1))``.

    Args:
      text: A call of a rule or a combinator of `optax_guard.stop`. Its arguments are
        numbers, strings or such calls.

    Returns:
      The rule.

    Raises:
      ValueError: If the text is anything else, or the rule refuses its arguments.

    Examples:
      >>> parse_rule("patience(5, min_delta=0.01)").needs
      frozenset()
    """
    if len(text) > _LONGEST:
        raise ValueError(
            f"`rule` must have at most {_LONGEST} characters, got {len(text)}."
        )
    if text.strip() in EXAMPLES:
        raise ValueError(
            f"`rule` must be a call, got {text!r}: write {EXAMPLES[text.strip()]}."
        )
    try:
        rule = _node_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"`rule` must be a call such as patience(5), got {text!r}."
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"`rule` {text!r}: {error}") from error
    if not isinstance(rule, StopRule):
        raise ValueError(
            f"`rule` must be a call of a rule, such as patience(5), got {text!r}."
        )
    return rule


def _known_rules() -> dict[str, Callable[..., StopRule]]:
    return {
        name: function
        for name, function in vars(stop).items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation is StopRule
    }


def _node_value(node: ast.AST) -> Any:
    if isinstance(node, ast.Name) and node.id in EXAMPLES:
        raise ValueError(f"{node.id!r} must be a call: write {EXAMPLES[node.id]}.")
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            words = ast.unparse(node)
            raise ValueError(f"{words!r} must be a number, a text or a call.") from None
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    known = _known_rules()
    if name not in known:
        raise ValueError(f"no rule {name!r}; there are {', '.join(sorted(known))}.")
    if any(isinstance(x, ast.Starred) for x in node.args) or any(
        keyword.arg is None for keyword in node.keywords
    ):
        raise ValueError("arguments must be written out, without stars.")
    arguments = {
        str(keyword.arg): _node_value(keyword.value) for keyword in node.keywords
    }
    return known[name](*map(_node_value, node.args), **arguments)
