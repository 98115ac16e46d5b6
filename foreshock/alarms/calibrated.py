"""Thresholds from one's own healthy runs, out of a file that may change while training goes on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from foreshock.alarms.online_charts import OnlineChart, chart_of
from foreshock.alarms.reading import HostReading
from foreshock.alarms.rules import SIGNS, Breach, OwnPast
from foreshock.analysis.detect.calibration import FLOOR, SELF
from foreshock.analysis.detect.thresholds import SignalThreshold, Thresholds
from foreshock.monitors.signal import Signal


class Calibrated:
    """``calibrated``: the chart of a signal above the threshold that ``foreshock calibrate`` set on healthy runs.

    declined: by signal of the file, why this run's readings are not those that it was calibrated on. The rate is
    alpha over the horizon of the calibration runs, for all signals together; beyond that horizon a band by step ends,
    and the promise with it.
    """

    name = "calibrated"

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError, in one line, where the file is missing or is none of thresholds."""
        self._path = Path(path)
        self._seen = _mark(self._path)
        self.thresholds = Thresholds.read(self._path)
        self.declined: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        self._own = OwnPast()
        self._charts: dict[str, list[OnlineChart]] = {}
        self._statistics: dict[str, list[float]] = {}

    def reload(self) -> bool:
        """Read the file again where it has changed. Charts go on where only thresholds are new.

        Raises ValueError for a changed file that is none of thresholds: the old ones stay.
        """
        mark = _mark(self._path)
        if mark == self._seen:
            return False
        self._seen = mark
        new = Thresholds.read(self._path)
        if (new.track, new.chart) != (self.thresholds.track, self.thresholds.chart):
            self._forget()
        self.thresholds, self.declined = new, {}
        return True

    def applies(self, signal: Signal) -> bool:
        return True  # a signal may enter with a file that changes

    def judge(self, reading: HostReading) -> Breach | None:
        signal = reading.signal
        known = self.thresholds.signals.get(signal.name)
        if known is None or signal.name in self.declined:
            return None
        if (reason := known.unlike(signal)) is not None:
            self.declined[signal.name] = reason
            return None
        z = self._z(known, reading)
        if z is None:
            return None
        signs = SIGNS[signal.bad]
        charts = self._charts.setdefault(signal.name, [chart_of(self.thresholds.chart) for _ in signs])
        statistics = self._statistics.setdefault(signal.name, [-np.inf] * len(signs))
        if not np.isnan(z).all():
            for side, (sign, chart) in enumerate(zip(signs, charts, strict=True)):
                statistics[side] = chart.update(float(np.nanmax(sign * z)))
        side = int(np.argmax(statistics))
        if not statistics[side] > known.limit:
            return None
        worst = np.where(np.isnan(z), -np.inf, signs[side] * z)
        return Breach(int(worst.argmax()), statistics[side], known.limit, "above" if signs[side] > 0 else "below")

    def _z(self, known: SignalThreshold, reading: HostReading) -> np.ndarray | None:
        """(layers, heads), or None where the track has no yardstick at this step."""
        if self.thresholds.track == SELF:
            return self._own.z(reading)
        if self.thresholds.track == FLOOR:
            return reading.finite - known.expected
        at = int(np.searchsorted(known.positions, reading.step))
        if at == len(known.positions) or known.positions[at] != reading.step:
            return None
        centre, scale = (np.asarray(part[at])[:, None] for part in (known.centre, known.scale))
        return (reading.finite - centre) / scale

    def per_million_steps(self, step: int) -> float:
        return self.thresholds.per_million_steps


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
