"""What a command without Hydra says of itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def show_help(arguments: Sequence[str], text: str | None) -> None:
    """Print what the command is for and end it with code 0, where ``--help`` or ``-h`` is asked for."""
    if {"--help", "-h"} & set(arguments):
        print((text or "").strip())
        sys.exit(0)


def misused(usage: str) -> NoReturn:
    """End a command whose arguments are not its own with one line, how it is called, and code 2."""
    print(f"usage: {usage}", file=sys.stderr)
    sys.exit(2)


def fail(message: str) -> NoReturn:
    """End a command with one line and code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
