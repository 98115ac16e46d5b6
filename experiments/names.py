"""Names from configurations and files: those that become parts of a path are plain file names, those of a list differ.

Needs only the standard library.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 100
"""Of a name; a file's name joins several, and most systems end it at 255 bytes."""


def check_name(name: Any, field: str) -> str:
    """The name, where it is a plain file name: it cannot leave the folder that it is put in.

    Allowed: 1 to ``MOST_CHARACTERS`` characters without ``/``, ``\\`` and control characters, neither ``.`` nor ``..``,
    without spaces around it. field: what the name is called. Raises ValueError that names field and value.
    """
    plain = (
        isinstance(name, str)
        and 0 < len(name) <= MOST_CHARACTERS
        and name not in (".", "..")
        and name == name.strip()
        and not any(character in "/\\" or unicodedata.category(character).startswith("C") for character in name)
    )
    if not plain:
        raise ValueError(
            f"{field}={name!r} is not allowed: a plain file name of 1 to {MOST_CHARACTERS} characters, without a slash"
        )
    return name


def check_index_names(index: Mapping[str, Any]) -> None:
    """Check every name of an experiment's index (``experiment.json``) that becomes a path. Raises ValueError."""
    check_name(index["experiment"]["name"], "experiment.name")
    check_name(index["scale"]["name"], "scale.name")
    for model in index["experiment"]["models"]:
        check_name(model, "experiment.models")
    for cell in index["runs"]:
        check_name(cell["run_id"], "run_id")


def repeated(names: Iterable[Any]) -> Any | None:
    """The first name that stands in a list twice; None where all differ."""
    seen = []
    for name in names:
        if name in seen:
            return name
        seen.append(name)
    return None


def check_distinct(names: Sequence[Any], where: str) -> None:
    """Raises ValueError for a name that stands there twice."""
    twice = repeated(names)
    if twice is not None:
        raise ValueError(f"{where}={','.join(map(str, names))} is not allowed: {twice} stands there twice")
