"""Readings as TensorBoard scalars, alarms as its texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from foreshock.alarms.event import Event
from foreshock.writers.base import missing


class TensorBoard:
    """Scalars under ``foreshock/``, and a text ``foreshock/alarm/<severity>`` for each alarm.

    folder: for ``tensorboard --logdir``. Raises ImportError without the package ``tensorboard``.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing("tensorboard", "tensorboard") from None
        self._folder, self._writer_of = str(folder), SummaryWriter

    def open(self) -> None:
        self._writer = self._writer_of(self._folder)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"foreshock/{name}", value, step)

    def alarm(self, event: Event) -> None:
        self._writer.add_text(f"foreshock/alarm/{event.severity}", event.line(), event.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
