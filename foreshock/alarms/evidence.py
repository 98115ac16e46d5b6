"""What is kept of the moment of an alarm: the last batches, random state and readings."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreshock.alarms.event import Event
from foreshock.alarms.reading import HostReading

BATCHES, READ_STEPS = 3, 50
"""Batches, and steps with readings, that are kept for a snapshot."""


class Evidence:
    """The recent past of a training, in memory, written only where an alarm asks for it.

    ``write`` makes ``<folder>/step-<step>-<signal>/`` with ``event.json``; ``batches.pt``, a list of ``{step,
    arguments, named}``, the watched rows of the last batches on the host; ``random_state.pt``, of Python, NumPy and
    torch (every CUDA device too) after the step; and ``readings.jsonl``, a line a step, with signals as lists (layers,
    heads).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._batches: deque[dict[str, Any]] = deque(maxlen=BATCHES)
        self._readings: deque[tuple[int, list[HostReading]]] = deque(maxlen=READ_STEPS)

    def keep(self, step: int, readings: list[HostReading], batch: Any) -> None:
        """batch: the rows that the watch keeps (``models.anatomies.watched_rows``), or None."""
        self._readings.append((step, readings))
        if batch is not None:
            self._batches.append({"step": step, "arguments": batch.arguments, "named": dict(batch.named)})

    def write(self, event: Event) -> Path:
        """The folder. Raises OSError where it cannot be written."""
        name = f"step-{event.step:09d}-{event.signal}"
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "event.json").write_text(event.json() + "\n", encoding="utf-8")
        torch.save(torch.utils._pytree.tree_map(_on_host, list(self._batches)), folder / "batches.pt")
        torch.save(random_state(), folder / "random_state.pt")
        lines = [
            json.dumps({"step": step} | {r.signal.name: _plain(r.value) for r in rs}) for step, rs in self._readings
        ]
        (folder / "readings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder


def random_state() -> dict[str, Any]:
    """Of every generator that a training draws from by default."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _on_host(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf


def _plain(values: np.ndarray) -> list[list[float | str]]:
    return [[float(x) if np.isfinite(x) else str(float(x)) for x in row] for row in values]
