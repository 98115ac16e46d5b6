"""Lines on the terminal, which no training waits for."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO


def say(line: str, terminal: TextIO | None) -> None:
    """Print a line after the project's name; to nobody where there is no terminal, or where it is closed or broken."""
    if terminal is not None:
        with suppress(OSError, ValueError):
            print(f"foreshock: {line}", file=terminal)
