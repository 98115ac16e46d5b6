"""Where the alarms of a run go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from foreshock.alarms.event import Event
from foreshock.alarms.settings import SNAPSHOT, Action


@dataclass(frozen=True)
class Outlets:
    """folder: for ``alarms.jsonl`` and evidence, None for neither; terminal: for a line an event, None for none.

    on_alarm: called with every event; actions: by severity, what is done beside (``alarms.settings``).
    Raises ValueError for the action ``snapshot`` without a folder.
    """

    folder: Path | None = None
    terminal: TextIO | None = field(default_factory=lambda: sys.stderr)
    on_alarm: tuple[Callable[[Event], Any], ...] = ()
    actions: Mapping[str, tuple[Action, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None and any(SNAPSHOT in of_severity for of_severity in self.actions.values()):
            raise ValueError("actions='snapshot' is not allowed without out=: it needs a folder")
