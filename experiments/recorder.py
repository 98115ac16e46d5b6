"""Readings of one run, or of all runs of a stack, from one trace part to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments import trace
from monitors.base import Masked, Reading


@dataclass(frozen=True)
class Samples:
    """One signal's readings on the host: steps and tokens (S,), values and undefined (S, ...)."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray
    undefined: np.ndarray

    @classmethod
    def of(cls, readings: Sequence[tuple[int, int, Reading]]) -> Samples:
        """From step, tokens and reading of each; one copy from the device."""
        steps, tokens, taken = zip(*readings, strict=True)
        masked = isinstance(taken[0], Masked)
        values = torch.stack([one.value for one in taken] if masked else taken).double().cpu().numpy()
        undefined = (
            torch.stack([one.undefined for one in taken]).cpu().numpy() if masked else np.zeros_like(values, bool)
        )
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

    One of a stack takes readings with a run axis in front, and has the columns of each of its runs. stack: the one of
    the stack that this run is in, if any, at ``row``: what it took for all runs is this run's too.
    """

    def __init__(self, stack: Recorder | None = None, row: int | None = None) -> None:
        self._stack, self._row = stack, row
        self.clear()

    def clear(self) -> None:
        """Forget this one's own readings."""
        self._first_step: int | None = None
        self._readings: dict[str, list[tuple[int, int, Reading]]] = {}
        self._on_host: dict[str, Samples] = {}

    @property
    def first_step(self) -> int | None:
        """The first step that has a reading, None without any."""
        steps = [one._first_step for one in (self, self._stack) if one is not None and one._first_step is not None]
        return min(steps, default=None)

    def add(self, step: int, tokens: int, name: str, reading: Reading) -> None:
        self._first_step = step if self._first_step is None else self._first_step
        self._readings.setdefault(name, []).append((step, tokens, reading))
        self._on_host.pop(name, None)

    def samples(self) -> Mapping[str, Samples]:
        """All readings by signal, copied to the host once."""
        for name, readings in self._readings.items():
            if name not in self._on_host:
                self._on_host[name] = Samples.of(readings)
        return self._on_host

    def columns(self) -> dict[str, Any]:
        """The columns of a part."""
        samples = list(self.samples().items())
        if self._stack is not None:
            samples += [(name, stacked.of_run(self._row)) for name, stacked in self._stack.samples().items()]
        blocks = [one.columns(name) for name, one in samples]
        return {column: np.concatenate([block[column] for block in blocks]) for column in trace.SCHEMA.names}
