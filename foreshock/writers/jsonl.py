"""Readings and alarms as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from foreshock.alarms.event import Event


class JsonLines:
    """A line for each step, ``{"step": 10, "values": {...}}``, and for each alarm, ``{"alarm": {...}}``.

    Numbers that are not finite are the texts ``"nan"``, ``"inf"`` and ``"-inf"``. A line is on the disk when its step
    has ended. ``open`` raises OSError where the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        plain = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "values": plain}) + "\n")

    def alarm(self, event: Event) -> None:
        self._file.write(f'{{"alarm": {event.json()}}}\n')

    def close(self) -> None:
        self._file.close()
