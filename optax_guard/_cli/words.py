"""What the command prints: in words of the command line, and harmless to a terminal."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from optax_guard._records.readers.values import printable

# The words of Python's functions, and those of the command line, the longer first.
_WORDS = {
    "`columns=`": "`--column NAME=THEIRS`",
    "`columns={'train_loss': ...}`": "`--column train_loss=NAME`",
    "`columns={'val_loss': ...}`": "`--column val_loss=NAME`",
    " of `History.read`": "",
    "`columns={'grad_norm': ...}`": "`--column grad_norm=NAME`",
    "`columns`": "`--column`",
    "`run=`": "`--run NAME`",
    "`run`": "`--run`",
    "`key=`": "`--key NAME`",
    "`key`": "`--key`",
    "`mode=max`": "`--mode max`",
    "`mode=min`": "`--mode min`",
    "`mode`": "`--mode`",
    "`pattern=`": "`--pattern`",
    "`pattern`": "`--pattern`",
    "`max_norm`": "`--max-norm`",
    "`clip_rate`": "`--clip-rate`",
    "`rule`": "`--rule`",
    "`history` must": "the run must",
}

# An entry of a dict of rules is named by what was written after `--rule`.
_NAMED_RULE = re.compile(r"`rules\[(.*?)\]`")


def shown(text: object) -> str:
    """A text with its control characters written out; lines stay lines."""
    return "\n".join(map(printable, str(text).split("\n")))


def say(text: object) -> None:
    """Prints to standard output."""
    print(shown(text), flush=True)


def complain(command: str, message: object) -> None:
    """Prints an error or a warning in the words of the command line."""
    text = str(message)
    for ours, theirs in _WORDS.items():
        text = text.replace(ours, theirs)
    text = _NAMED_RULE.sub(r"`--rule` \1", text)
    print(f"optax-guard {command}: {shown(text)}", file=sys.stderr, flush=True)


def own_command(*arguments: str) -> str:
    """A command line that works where this one worked, whether or not it is on PATH."""
    python, name = Path(sys.executable), "optax-guard"
    found, beside = shutil.which(name), python.with_name(name)
    if found and Path(found).parent == python.parent:
        return shlex.join([name, *arguments])
    program = beside if beside.exists() else python
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    module = [] if program.name == name else ["-m", "optax_guard"]
    return shlex.join([str(program), *module, *arguments])
