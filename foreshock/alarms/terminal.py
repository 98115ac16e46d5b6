"""Lines on the terminal, which no training waits for."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO

MOST_SAID = 200
"""Characters of an error that are said."""


def in_one_line(error: BaseException) -> str:
    """An error's class and message, in one line of at most ``MOST_SAID`` characters."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= MOST_SAID else f"{line[: MOST_SAID - 3]}..."


def say(line: str, terminal: TextIO | None) -> None:
    """Print a line after the project's name; to nobody where there is no terminal, or where it is closed or broken."""
    if terminal is not None:
        with suppress(OSError, ValueError):
            print(f"foreshock: {line}", file=terminal)
