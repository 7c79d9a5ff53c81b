"""Warnings that point at the line of the user."""

import sys
import warnings

# The files whose lines are not the user's.
_INSIDE = ("optax_guard", "contextlib")


def warn_user(message: str) -> None:
    """Warns at the line of the user that led here, however deep this is called."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
