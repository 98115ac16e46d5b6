"""Alarms for the eye while a run trains: each signal against its own recent past, uncalibrated.

The scores come from ``analysis``, with thresholds at equal false-alarm rates. Here a signal is named
when its worst layer and head stands ``LIMIT`` robust standard deviations from its own lagged window,
the samples t - 2W to t - W of the protocol's self track with W = 10. It cannot see a step that was
there from the start. A reading that is not finite is an alarm; a missing one is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from foreshock.monitors.base import Masked, Reading, Signal
from foreshock.monitors.signal import EXACT

WINDOW_SAMPLES = 10
KEPT = 2 * WINDOW_SAMPLES + 1
LIMIT = 12.0
MAD_TO_SIGMA = 1.4826


class LiveAlarms:
    """Keeps the last 2W + 1 readings of every signal on the device; computes only when asked.

    stacked: every reading has an axis of runs in front, and each run is judged by itself.
    """

    def __init__(self, signals: Iterable[Signal], stacked: bool = False) -> None:
        self._stacked = stacked
        self._signals = {signal.name: signal for signal in signals if signal.kind != EXACT}
        self._recent: dict[str, deque[Tensor]] = {name: deque(maxlen=KEPT) for name in self._signals}

    def add(self, readings: Mapping[str, Reading]) -> None:
        for name, reading in readings.items():
            if name in self._recent:
                value, undefined = (
                    (reading.value, reading.undefined) if isinstance(reading, Masked) else (reading, None)
                )
                value = torch.where(value.isfinite(), value, torch.inf)  # broken, which is bad in every direction
                value = value if undefined is None else value.masked_fill(undefined, torch.nan)
                self._recent[name].append(value.detach() if self._stacked else value.detach()[None])

    def raised(self) -> dict[str, float]:
        """Signals of the one run above the limit, with their distance in robust standard deviations, largest first."""
        return self.raised_by_run().get(0, {})

    def raised_by_run(self) -> dict[int, dict[str, float]]:
        """The same for every run that has such a signal, by its place in the stack."""
        found: dict[int, dict[str, float]] = {}
        for name, recent in self._recent.items():
            if len(recent) < KEPT:
                continue
            values = torch.stack(list(recent)).double()
            past = values[: WINDOW_SAMPLES + 1]
            centre = past.nanmedian(0).values
            scale = MAD_TO_SIGMA * (past - centre).abs().nanmedian(0).values
            distance = (values[-1] - centre) / scale
            bad = self._signals[name].bad
            oriented = distance.abs() if bad == "both" else distance if bad == "up" else -distance
            oriented = torch.where(values[-1].isposinf(), torch.inf, oriented)
            worst = oriented.nan_to_num(nan=-torch.inf, posinf=torch.inf).reshape(len(oriented), -1).amax(1)
            for run, distance_of_run in enumerate(worst.tolist()):
                if distance_of_run > LIMIT:
                    found.setdefault(run, {})[name] = distance_of_run
        return {run: dict(sorted(alarms.items(), key=lambda item: -item[1])) for run, alarms in found.items()}
