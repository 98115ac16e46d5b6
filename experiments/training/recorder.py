"""Readings of one run, or of all runs of a stack, from one trace part to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from foreshock.experiments import trace
from foreshock.monitors.base import Masked, Reading


@dataclass(frozen=True)
class Samples:
    """One signal's readings on the host: steps and tokens (S,), values and undefined (S, ...)."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    undefined: np.ndarray

    @classmethod
    def of(cls, readings: Sequence[tuple[int, int, Reading]]) -> Samples:
        """From step, tokens and reading of each, some masked, some not; one copy from the device."""
        steps, tokens, taken = zip(*readings, strict=True)
        plain = [reading.value if isinstance(reading, Masked) else reading for reading in taken]
        values = torch.stack(plain).double().cpu().numpy()
        undefined = np.zeros_like(values, bool)
        if any(isinstance(reading, Masked) for reading in taken):
            masks = [r.undefined if isinstance(r, Masked) else torch.zeros_like(r, dtype=torch.bool) for r in taken]
            undefined = torch.stack(masks).cpu().numpy()
        return cls(np.array(steps), np.array(tokens), values, undefined)

    def of_run(self, index: int) -> Samples:
        """One run's, of readings with a run axis."""
        return replace(self, values=self.values[:, index], undefined=self.undefined[:, index])

    def columns(self, name: str) -> dict[str, Any]:
        """A row for each value, of a signal of this name."""
        index, size = np.indices(self.values.shape).reshape(self.values.ndim, -1), self.values.size
        return {
            "step": self.steps[index[0]],
            "tokens": self.tokens[index[0]],
            "signal": np.full(size, name, dtype=object),
            "layer": index[1] if self.values.ndim > 1 else np.full(size, -1),
            "head": index[2] if self.values.ndim > 2 else np.full(size, -1),
            "value": self.values.ravel(),
            "undefined": self.undefined.ravel(),
        }


class Recorder:
    """Readings since the last part; they stay on the device until the part is written.

    In a stack every reading has an axis of runs in front.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.first_step: int | None = None
        self._readings: dict[str, list[tuple[int, int, Reading]]] = {}
        self._on_host: dict[str, Samples] = {}

    def add(self, step: int, tokens: int, readings: Mapping[str, Reading]) -> None:
        """Readings of a step, by signal; ``first_step`` is the first that was given any, None without one."""
        for name, reading in readings.items():
            self.first_step = step if self.first_step is None else self.first_step
            self._readings.setdefault(name, []).append((step, tokens, reading))
            self._on_host.pop(name, None)

    def forget_broken(self) -> None:
        """Drop the signals whose readings make no columns, such as those of several shapes."""
        for name, readings in list(self._readings.items()):
            try:
                Samples.of(readings).columns(name)
            except Exception:
                del self._readings[name]
        if not self._readings:
            self.clear()

    def columns(self, run: int | None = None, without: Collection[str] = ()) -> dict[str, Any]:
        """The columns of a part, of one run of a stack or, without ``run``, of the only one; without some signals."""
        for name, readings in self._readings.items():
            if name not in self._on_host:  # copied to the host once, for all runs
                self._on_host[name] = Samples.of(readings)
        samples = [(name, of_all) for name, of_all in self._on_host.items() if name not in without]
        blocks = [(of_all if run is None else of_all.of_run(run)).columns(name) for name, of_all in samples]
        return {column: np.concatenate([block[column] for block in blocks]) for column in trace.SCHEMA.names}
