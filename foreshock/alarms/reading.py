"""Readings on the host, as rules and writers take them: one copy from the device for all signals of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreshock.monitors.base import Masked, Reading
from foreshock.monitors.signal import Signal


@dataclass(frozen=True)
class HostReading:
    """One signal at one step; arrays are (layers, heads), an absent axis of length 1.

    value: FP64, NaN and Inf as they were read; undefined: samples that do not exist; lost: whether a value is not
    finite and not missing; finite: the value, NaN where it is missing or not finite.
    """

    signal: Signal
    step: int
    value: np.ndarray
    undefined: np.ndarray
    lost: np.ndarray
    finite: np.ndarray

    @classmethod
    def of(cls, signal: Signal, step: int, value: np.ndarray, undefined: np.ndarray) -> HostReading:
        return cls(signal, step, value, undefined, *_told_apart(value, undefined))

    def place(self, index: int) -> tuple[int | None, int | None]:
        """Layer and head of a flat index, None where the signal has no such axis."""
        layer, head = divmod(index, self.value.shape[1])
        return (layer if "layer" in self.signal.axes else None, head if "head" in self.signal.axes else None)


def on_host(step: int, readings: Mapping[str, Reading], signals: Mapping[str, Signal]) -> list[HostReading]:
    """The readings of a step. signals: by name; a reading of none of them is left out."""
    kept = {name: reading for name, reading in readings.items() if name in signals}
    if not kept:
        return []
    value = _flat([reading.value if isinstance(reading, Masked) else reading for reading in kept.values()])
    undefined = np.zeros(value.shape, bool)
    sizes = [_shape(reading).numel() for reading in kept.values()]
    masked = [i for i, reading in enumerate(kept.values()) if isinstance(reading, Masked)]
    ends = np.cumsum(sizes)
    if masked:
        masks = _flat([r.undefined.expand(r.value.shape) for r in kept.values() if isinstance(r, Masked)]) > 0
        undefined[np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in masked])] = masks
    parts = (value, undefined, *_told_apart(value, undefined))  # of all signals at once: most have few values
    return [
        HostReading(signals[name], step, *(part[end - size : end].reshape(_cells(reading)) for part in parts))
        for (name, reading), size, end in zip(kept.items(), sizes, ends, strict=True)
    ]


def _told_apart(value: np.ndarray, undefined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which values are lost, and the finite ones."""
    finite = np.isfinite(value)
    return ~finite & ~undefined, np.where(finite & ~undefined, value, np.nan)


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    flat: np.ndarray = torch.cat([x.detach().double().flatten() for x in tensors]).cpu().numpy()
    return flat


def _shape(reading: Reading) -> torch.Size:
    return (reading.value if isinstance(reading, Masked) else reading).shape


def _cells(reading: Reading) -> tuple[int, int]:
    layers, heads = (*_shape(reading), 1, 1)[:2]
    return layers, heads
