"""A value held against those that are allowed."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any


def check_choice(field: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises ValueError that names the field, its value, what is allowed, and the nearest of that."""
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], n=1, cutoff=0.5)
    nearest = f"; the nearest is {close[0]!r}" if close else ""
    raise ValueError(f"{field}={value!r} is not allowed: one of {', '.join(map(str, allowed))}{nearest}")
