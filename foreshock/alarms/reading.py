"""Readings on the host, as rules and writers take them: one copy from the device for all signals of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreshock.monitors.base import Masked, Reading
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class HostReading:
    """One signal at one step.

    value: FP64, (layers, heads), an absent axis of length 1; NaN and Inf as they were read. undefined: (layers, heads),
    samples that do not exist.
    """

    signal: Signal
    step: int
    value: np.ndarray
    undefined: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """(layers, heads): the value, NaN where it is missing or not finite."""
        return np.where(self.undefined | ~np.isfinite(self.value), np.nan, self.value)

    @property
    def lost(self) -> np.ndarray:
        """(layers, heads): whether a value is not finite and not missing."""
        return ~np.isfinite(self.value) & ~self.undefined

    def place(self, index: int) -> tuple[int | None, int | None]:
        """Layer and head of a flat index, None where the signal has no such axis."""
        layer, head = divmod(index, self.value.shape[1])
        return (layer if "layer" in self.signal.axes else None, head if "head" in self.signal.axes else None)


def on_host(step: int, readings: Mapping[str, Reading], signals: Mapping[str, Signal]) -> list[HostReading]:
    """The readings of a step. signals: by name; a reading of none of them is left out."""
    kept = {name: reading for name, reading in readings.items() if name in signals}
    parts: list[Tensor] = []
    for reading in kept.values():
        masked = isinstance(reading, Masked)
        parts.append((reading.value if isinstance(reading, Masked) else reading).detach().double().flatten())
        if isinstance(reading, Masked):
            parts.append(reading.undefined.expand(reading.value.shape).double().flatten())
        assert masked or isinstance(reading, Tensor)
    if not parts:
        return []
    flat, at, found = torch.cat(parts).cpu().numpy(), 0, []
    for name, reading in kept.items():
        shape = (reading.value if isinstance(reading, Masked) else reading).shape
        size, cells = shape.numel(), (*shape, 1, 1)[:2]
        value = flat[at : at + size].reshape(cells)
        at += size
        undefined = np.zeros(cells, bool)
        if isinstance(reading, Masked):
            undefined = flat[at : at + size].reshape(cells) > 0
            at += size
        found.append(HostReading(signals[name], step, value, undefined))
    return found
